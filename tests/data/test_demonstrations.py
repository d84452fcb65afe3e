import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rl.data.demonstrations import DemonstrationEpisode, chunks, observations, read, write
from embodied_rl.errors import UserError


def episode(steps: int = 5, seed: int = 0, success: bool = True, images: bool = False) -> DemonstrationEpisode:
    random = np.random.default_rng(seed)
    ends = np.arange(steps) == steps - 1
    return DemonstrationEpisode(
        states=random.standard_normal((steps + 1, 7)).astype(np.float32),
        actions=random.uniform(-1, 1, (steps, 3)).astype(np.float32),
        rewards=random.random(steps).astype(np.float32),
        success=ends if success else None,
        terminated=ends,
        truncated=np.zeros(steps, bool),
        seed=seed,
        images={"base_camera": random.integers(0, 256, (steps + 1, 4, 6, 3), np.uint8)} if images else {},
    )


def assert_same(ours: DemonstrationEpisode, theirs: DemonstrationEpisode) -> None:
    for name in ("states", "actions", "rewards", "success", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), strict=True)
    assert (ours.seed, ours.task) == (theirs.seed, theirs.task)
    assert ours.images.keys() == theirs.images.keys()
    for camera, frames in ours.images.items():
        np.testing.assert_array_equal(frames, theirs.images[camera], strict=True)


@pytest.mark.parametrize("images", [False, True])
def test_round_trip(tmp_path: Path, images: bool) -> None:
    written = [episode(steps, seed, images=images) for seed, steps in enumerate([3, 1, 12] + [2] * 9)]
    written[1].task = 4
    write(tmp_path / "demos.h5", written, "PickCube-v1", "pd_ee_delta_pos")
    for ours, theirs in zip(written, read(tmp_path / "demos.h5", "PickCube-v1", "pd_ee_delta_pos"), strict=True):
        assert_same(ours, theirs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos.h5", "demos.json"]


def test_what_was_seen_before_every_action() -> None:
    episodes = [episode(3, 1, images=True), episode(2, 2, images=True)]
    episodes[1].task = 1
    seen = observations(episodes, ("reach", "push"))
    assert seen.texts() == ["reach"] * 3 + ["push"] * 2 and seen.task.tolist() == [0, 0, 0, 1, 1]
    for rows, each in ((slice(0, 3), episodes[0]), (slice(3, 5), episodes[1])):
        np.testing.assert_array_equal(seen.state[rows], each.states[:-1])
        np.testing.assert_array_equal(seen.images["base_camera"][rows], each.images["base_camera"][:-1])
    assert not observations([*episodes, episode(2, 3)], ("reach", "push")).images


def test_a_task_without_success_keeps_none(tmp_path: Path) -> None:
    write(tmp_path / "demos.h5", [episode(success=False)], "MS-Ant-v1", "pd_joint_delta_pos")
    (back,) = read(tmp_path / "demos.h5")
    assert back.success is None and not back.succeeded


def test_maniskills_reader_reads_our_file(tmp_path: Path) -> None:
    from mani_skill.trajectory.dataset import ManiSkillTrajectoryDataset

    written = [episode(4, 1), episode(6, 2)]
    write(tmp_path / "demos.h5", written, "PickCube-v1", "pd_ee_delta_pos")
    dataset = ManiSkillTrajectoryDataset(str(tmp_path / "demos.h5"), success_only=True)
    assert len(dataset) == 10 and dataset.env_id == "PickCube-v1"
    np.testing.assert_array_equal(dataset.obs, np.concatenate([e.states[:-1] for e in written]))
    np.testing.assert_array_equal(dataset.actions, np.concatenate([e.actions for e in written]))
    np.testing.assert_array_equal(dataset.rewards, np.concatenate([e.rewards for e in written]))


RECORD = """
import sys
import numpy as np
from embodied_rl.simulators.maniskill import headless
headless.install()
import gymnasium
from mani_skill.utils.wrappers import RecordEpisode
env = gymnasium.make("PickCube-v1", obs_mode="state", reward_mode="normalized_dense", control_mode="pd_ee_delta_pos",
                     render_backend="none")
env = RecordEpisode(env, sys.argv[1], trajectory_name="demos", save_video=False)
action = np.array([0.1, -0.2, 0.3, 1.0], np.float32)
states, rewards = [], []
for seed in (11, 12):
    states.append(env.reset(seed=seed)[0][0].numpy())
    for _ in range(3):
        state, reward, *_ = env.step(action)
        states.append(state[0].numpy()), rewards.append(float(reward))
env.close()
np.savez(sys.argv[1] + "/seen.npz", states=states, rewards=np.float32(rewards))
"""


def test_we_read_what_maniskill_records(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", RECORD, str(tmp_path)], check=True, timeout=90, capture_output=True)
    episodes = read(tmp_path / "demos.h5", "PickCube-v1", "pd_ee_delta_pos")
    seen = np.load(tmp_path / "seen.npz")
    assert [e.seed for e in episodes] == [11, 12]
    np.testing.assert_array_equal(np.concatenate([e.states for e in episodes]), seen["states"])
    np.testing.assert_array_equal(np.concatenate([e.rewards for e in episodes]), seen["rewards"])
    for e in episodes:
        np.testing.assert_allclose(e.actions, np.tile([0.1, -0.2, 0.3, 1.0], (3, 1)), rtol=1e-6)
        assert e.success is not None and not e.success.any() and not e.truncated.any()


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 6))
def test_chunks_cover_every_step_and_never_cross_episodes(lengths: list[int], horizon: int) -> None:
    episodes = [episode(steps, seed) for seed, steps in enumerate(lengths)]
    states = observations(episodes, ("reach",)).state
    actions, valid = chunks(episodes, horizon)
    row = 0
    for e in episodes:
        for start in range(len(e)):
            left = e.actions[start : start + horizon]
            np.testing.assert_array_equal(states[row], e.states[start])
            np.testing.assert_array_equal(actions[row, : len(left)], left)
            assert not actions[row, len(left) :].any()
            assert valid[row].tolist() == [True] * len(left) + [False] * (horizon - len(left))
            row += 1
    assert len(states) == len(actions) == len(valid) == row == sum(lengths)
    assert actions.dtype == np.float32 and valid.dtype == bool


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    write(tmp_path / "demos.h5", [episode(), episode(seed=1)], "PickCube-v1", "pd_ee_delta_pos")
    return tmp_path / "demos.h5"


def edit(path: Path, action) -> None:
    with h5py.File(path, "r+") as file:
        action(file)


def drop(key: str):
    return lambda file: file["traj_1"].__delitem__(key)


def replace(key: str, value):
    def act(file: h5py.File) -> None:
        del file[key]
        file[key] = value

    return act


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "not a readable"),
        (lambda path: path.with_suffix(".json").unlink(), "not a readable"),
        (lambda path: path.with_suffix(".json").write_text("[]"), "does not belong to demos.json"),
        (lambda path: path.with_suffix(".json").write_bytes(b"\xff"), "not a readable"),
        (lambda path: path.write_bytes(b"not HDF5"), "not a readable"),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "not a readable"),
        (lambda path: edit(path, lambda file: file.__delitem__("traj_1")), "not a readable"),
        (lambda path: edit(path, drop("actions")), "not a readable"),
        (lambda path: edit(path, drop("obs")), "--obs-mode state"),
        (lambda path: edit(path, drop("rewards")), "--record-rewards"),
        (lambda path: edit(path, replace("traj_1/rewards", np.zeros(3))), "has 5 actions but"),
        (lambda path: edit(path, replace("traj_0/obs", np.full((6, 7), np.nan))), "non-finite number in its states"),
        (lambda path: edit(path, replace("traj_0/actions", np.zeros(5))), "not a readable"),
    ],
)
def test_damaged_files_are_refused(stored: Path, damage, message: str) -> None:
    damage(stored)
    with pytest.raises(UserError, match=message) as error:
        read(stored)
    assert str(stored) in str(error.value) and "\n" not in str(error.value)


def test_another_task_or_controller_is_refused(stored: Path) -> None:
    with pytest.raises(UserError, match="recorded with task PickCube-v1, this run uses PushCube-v1"):
        read(stored, task="PushCube-v1")
    with pytest.raises(UserError, match="controller pd_ee_delta_pos, this run uses pd_joint_pos"):
        read(stored, control_mode="pd_joint_pos")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "demos.h5", [], "PickCube-v1", "pd_ee_delta_pos")
    with pytest.raises(UserError, match="holds no episodes"):
        read(tmp_path / "demos.h5")


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_leaves_the_old_file(stored: Path) -> None:
    before = read(stored)
    shutil.copy(stored.with_suffix(".json"), stored.with_name("kept.json"))
    with no_file_larger_than(600), pytest.raises(UserError, match="cannot write"):
        write(stored, [episode(200)], "PickCube-v1", "pd_ee_delta_pos")
    for ours, theirs in zip(before, read(stored), strict=True):
        assert_same(ours, theirs)
    assert not list(stored.parent.glob(".*"))


def test_a_torn_pair_is_recognised(stored: Path) -> None:
    metadata = json.loads(stored.with_suffix(".json").read_text())
    metadata["episodes"][0]["episode_seed"] = 99
    stored.with_suffix(".json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="does not belong"):
        read(stored)

"""The ManiSkill adapter apart from its numbers: errors, specs, seeding, images, the batched form, the demonstrator."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied_rl.errors import UserError
from embodied_rl.simulators import vulkan
from embodied_rl.simulators.base import InitialState
from embodied_rl.simulators.maniskill import headless
from embodied_rl.simulators.maniskill.batched import ManiSkillBatchedEnvironment
from embodied_rl.simulators.maniskill.config import ManiSkillConfig, instruction
from embodied_rl.simulators.maniskill.config import tasks as listed
from embodied_rl.simulators.maniskill.demonstrator import CARRY, ScriptedPickCube, pick_cube
from embodied_rl.simulators.maniskill.environment import ManiSkillEnvironment
from embodied_rl.simulators.maniskill.rows import ManiSkillRows


@pytest.fixture(scope="module")
def pick() -> ManiSkillEnvironment:
    return ManiSkillEnvironment("PickCube-v1", "pd_ee_delta_pos", reward="sparse")


def test_configuration_imports_no_simulator() -> None:
    code = (
        "import sys; from embodied_rl.simulators.maniskill.config import ManiSkillConfig; print(ManiSkillConfig());"
        "sys.exit(any(m.split('.')[0] in ('mani_skill', 'sapien', 'torch') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_configuration_names_its_environment() -> None:
    target, kwargs = ManiSkillConfig("PushCube-v1", reward="dense", max_steps=7).environment
    assert target == f"{ManiSkillRows.__module__}:{ManiSkillRows.__name__}"
    env = ManiSkillRows(num_envs=1, **kwargs)
    assert env.tasks[0].max_steps == 7
    assert env.tasks[0].reward == "dense"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"observation": "rbg"}, "rgb"),
        ({"reward": "densse"}, "dense"),
        ({"backend": "tpu"}, "cpu"),
        ({"num_envs": 0}, "num_envs is 0"),
    ],
)
def test_wrong_configuration(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ManiSkillConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"task": "PikCube-v1"}, "did you mean PickCube-v1"),
        ({"task": "PickCube-v1", "control_mode": "pd_ee_delta_po"}, "did you mean pd_ee_delta_pos"),
        ({"task": "PlugCharger-v1", "reward": "dense"}, "it has: .*sparse"),
        ({"task": "PickSingleYCB-v1"}, "download_asset PickSingleYCB-v1"),  # assets that the registry lists
        ({"task": "PickCubeWidowXAI-v1"}, "download_asset widowxai"),  # a robot that it does not list
        ({"task": "TwoRobotPickCube-v1"}, "Dict action space"),
    ],
)
def test_what_cannot_run_is_a_user_error_and_never_a_question(
    wrong: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mani_skill.utils import assets

    def ask(_: str) -> str:
        raise AssertionError("asked on standard input")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(assets, "is_data_source_downloaded", lambda _: False)
    with pytest.raises(UserError, match=says):
        ManiSkillEnvironment(**wrong)


def test_gpu_without_cuda_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA device"):
        ManiSkillBatchedEnvironment("PickCube-v1", num_envs=4)


def test_images_without_a_renderer_are_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headless, "installed", lambda: False)
    monkeypatch.setattr(headless, "can_render", lambda: False)
    with pytest.raises(UserError, match=f"{vulkan.SETUP}, or use observation 'state'"):
        ManiSkillEnvironment("PickCube-v1", observation="rgb")


def test_images_need_a_process_that_can_render(pick: ManiSkillEnvironment) -> None:
    with pytest.raises(UserError, match="process of their own"):
        ManiSkillEnvironment("PickCube-v1", observation="rgb")


RENDER = """
import numpy as np
from embodied_rl.simulators import vulkan
from embodied_rl.simulators.base import InitialState
from embodied_rl.simulators.maniskill.environment import ManiSkillEnvironment

for observation, size in (("rgb", 29), ("state+rgb", 42)):
    env = ManiSkillEnvironment("PickCube-v1", observation=observation, image_size=64)
    camera = env.observation_spec.cameras["base_camera"]
    assert (env.observation_spec.state, camera.height, camera.width) == (size, 64, 64)
    names = env.observation_spec.state_names
    assert len(names) == size and names[:9] == tuple(f"agent.qpos.{i}" for i in range(9))
    env.reset(InitialState(0, 1))
    first = env.observe()
    tip = env.env.agent.tcp.pose.raw_pose[0].numpy()
    assert (first["state"][names.index("extra.tcp_pose.0") :][:7] == tip).all()
    assert {k: (v.shape, v.dtype.name) for k, v in first.items()} == {
        "state": ((size,), "float32"), "image.base_camera": ((64, 64, 3), "uint8")
    }
    assert first["image.base_camera"].std() > 10
    for _ in range(3):
        env.step(np.ones(env.action_spec.dim, np.float32))
    assert (env.observe()["image.base_camera"] != first["image.base_camera"]).any()
    env.reset(InitialState(0, 1))
    assert (env.observe()["image.base_camera"] == first["image.base_camera"]).all()
print("rendered")
"""


def test_images_where_there_is_a_renderer() -> None:
    if reason := vulkan.problem():
        pytest.skip(reason)
    child = subprocess.run([sys.executable, "-c", RENDER], capture_output=True, text=True, timeout=110, check=False)
    assert child.stdout.endswith("rendered\n"), child.stderr


def test_specs(pick: ManiSkillEnvironment) -> None:
    assert pick.observation_spec.state == 42
    spec = pick.action_spec
    assert (spec.low, spec.high, spec.hold) == ((-1.0,) * 4, (1.0,) * 4, (0.0,) * 4)
    assert (spec.control, spec.gripper, spec.gripper_open) == ("pd_ee_delta_pos", 3, 1)
    task = pick.tasks[0]
    assert (task.name, task.instruction, task.max_steps, task.has_success) == ("PickCube-v1", "pick cube", 50, True)
    assert instruction("PickCubeSO100-v1") == "pick cube so 100"


def test_the_list_of_tasks_is_that_of_the_installed_maniskill(pick: ManiSkillEnvironment) -> None:
    from mani_skill.utils.registration import REGISTERED_ENVS

    tasks = {task.name: task for task in listed()}
    assert {name: task.max_steps for name, task in tasks.items()} == {
        name: env.max_episode_steps for name, env in REGISTERED_ENVS.items()
    }
    listing = tasks["PickCube-v1"]
    assert (listing.instruction, listing.cameras, listing.action_dim) == ("pick cube", ("base_camera",), 8)
    assert (*listing.reward.split(", "), "none") == REGISTERED_ENVS["PickCube-v1"].cls.SUPPORTED_REWARD_MODES
    assert tasks["PegInsertionSide-v1"].cameras == ("base_camera", "hand_camera")


def test_a_missing_asset_is_missing_until_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    before = {task.name: task.missing for task in listed()}
    assert "download_asset PickSingleYCB-v1" in before["PickSingleYCB-v1"] and not before["PickCube-v1"]
    (tmp_path / "data/assets/mani_skill2_ycb").mkdir(parents=True)
    after = {task.name: task.missing for task in listed()}
    assert not after["PickSingleYCB-v1"] and after["PickClutterYCB-v1"]


def test_holding_an_absolute_controller_keeps_the_joints() -> None:
    env = ManiSkillEnvironment("PickCube-v1", "pd_joint_pos")
    assert env.action_spec.hold[7] == 0  # the gripper is scaled: half open
    env.reset(InitialState(0, 2022))
    before = env.observe()["state"][:7]
    for _ in range(5):
        env.step(np.array(env.action_spec.hold, np.float32))
    assert np.abs(env.observe()["state"][:7] - before).max() < 0.1


def test_success_is_none_where_the_task_has_none() -> None:
    env = ManiSkillEnvironment("MS-HopperHop-v1", reward="normalized_dense")
    env.reset(InitialState(0, 1))
    assert env.step(np.zeros(env.action_spec.dim, np.float32))[1:] == (False, False, None)
    assert not env.tasks[0].has_success


def test_time_limit_truncates(pick: ManiSkillEnvironment) -> None:
    pick.reset(InitialState(0, 3))
    ends = [pick.step(np.zeros(4, np.float32))[1:3] for _ in range(50)]
    assert ends == [(False, False)] * 49 + [(False, True)]


def draws() -> list[float]:
    import random

    import torch

    return [float(torch.rand(1)), float(np.random.rand()), random.random()]  # noqa: NPY002 - the global generators


def test_a_reset_depends_on_its_seed_alone(pick: ManiSkillEnvironment) -> None:
    import torch

    pick.reset(InitialState(0, 7))
    first, noise = pick.observe()["state"], draws()
    torch.manual_seed(123)
    pick.reset(InitialState(0, 8))
    other, other_noise = pick.observe()["state"], draws()
    for _ in range(12):
        pick.step(np.array([1, -1, -1, 0.3], np.float32))
    pick.reset(InitialState(0, 7))
    np.testing.assert_array_equal(pick.observe()["state"], first)
    assert draws() == noise
    assert not np.array_equal(other[29:32], first[29:32])
    assert not set(noise) & set(other_noise)


def _forked(pick: ManiSkillEnvironment, seed: int, pipe: Any) -> None:
    pick.reset(InitialState(0, seed))
    pipe.send((pick.observe()["state"].tolist(), draws()))
    pipe.close()


def test_forked_workers_do_not_share_their_randomness(pick: ManiSkillEnvironment) -> None:
    """Forked processes inherit the global generators, from which ManiSkill draws unless a reset seeds them."""
    context = multiprocessing.get_context("fork")
    answers = []
    for seed in (1, 2, 1):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_forked, args=(pick, seed, there))
        process.start()
        assert here.poll(60)
        answers.append(here.recv())
        process.join(10)
        assert process.exitcode == 0
    assert answers[0] == answers[2]
    assert answers[0][0][29:32] != answers[1][0][29:32]  # where the cube lies
    assert not set(answers[0][1]) & set(answers[1][1])  # what would be drawn while stepping


def test_batched_form_with_one_environment_equals_the_single_one() -> None:
    one = ManiSkillEnvironment("PushCube-v1", reward="dense", max_steps=6)
    batch = ManiSkillBatchedEnvironment("PushCube-v1", 1, reward="dense", max_steps=6, device="cpu")
    assert (batch.observation_spec, batch.action_spec, batch.tasks) == (
        one.observation_spec,
        one.action_spec,
        one.tasks,
    )
    row = np.array([0])
    random = np.random.default_rng(0)
    for seed in (4, 9):
        one.reset(InitialState(0, seed))
        batch.reset(row, [InitialState(0, seed)])
        for _ in range(6):
            np.testing.assert_array_equal(batch.observe(row)["state"], one.observe()["state"][None])
            action = random.uniform(-1, 1, one.action_spec.dim).astype(np.float32)
            reward, terminated, truncated, success = one.step(action)
            got = batch.step(action[None])
            assert [x.shape for x in got if x is not None] == [(1,)] * 4
            assert [x.item() for x in got if x is not None] == [np.float32(reward), terminated, truncated, success]
        assert truncated


def test_demonstrator_solves_its_task(pick: ManiSkillEnvironment) -> None:
    script = ScriptedPickCube()
    for seed in range(8):
        pick.reset(InitialState(0, seed))
        script.reset(np.array([0]), np.array([0]))
        for _ in range(25):
            _, terminated, _, success = pick.step(script.actions(pick.observe()["state"][None])[0])
            if terminated:
                break
        assert success, seed


def test_demonstrator_rows_do_not_mix() -> None:
    state = np.random.default_rng(0).normal(size=(5, 42)).astype(np.float32)
    phase = np.array([0, 1, 2, 3, 0])
    actions, after = pick_cube(state, phase)
    for row in range(5):
        alone, alone_after = pick_cube(state[row : row + 1], phase[row : row + 1])
        np.testing.assert_array_equal(actions[row], alone[0])
        assert after[row] == alone_after[0]
    assert np.abs(actions).max() <= 1


def test_demonstrator_starts_again_when_the_cube_slips() -> None:
    state = np.zeros((1, 42), np.float32)
    state[0, 36] = 0.2  # the cube is 20 cm away and not grasped
    actions, phase = pick_cube(state, np.array([CARRY]))
    assert phase[0] != CARRY
    assert actions[0, 3] == 1  # open


def test_demonstrator_refuses_other_tasks() -> None:
    with pytest.raises(UserError, match="PickCube-v1"):
        ScriptedPickCube("PushCube-v1")
    with pytest.raises(UserError, match=r"\[1,42\]"):
        ScriptedPickCube().actions(np.zeros((1, 35), np.float32))


def test_a_rebuilt_scene_remembers_no_earlier_episode():
    """Seed 53 pushes the cube with two parts of the robot; in a scene that is kept, more than half of its replays
    differ from step 33 on."""
    environment = ManiSkillEnvironment("PickCube-v1", rebuild=True)

    def episode(seed, steps):
        random = np.random.default_rng(seed)
        environment.reset(InitialState(0, seed))
        states = []
        for step in range(steps):
            if step % 8 == 0:
                action = random.uniform(-1, 1, environment.action_spec.dim).astype(np.float32)
            environment.step(action)
            states.append(environment.observe()["state"])
        return np.stack(states)

    first = episode(53, 40)
    for other in range(6):
        episode(other, 30)
        np.testing.assert_array_equal(episode(53, 40), first)
    environment.close()

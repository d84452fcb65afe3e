"""The LIBERO adapter against LIBERO's own `OffScreenRenderEnv`, which steps, settles and renders in a process of its
own (it draws into whatever OpenGL context is current): the same bits."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from embodied_rl.errors import UserError
from embodied_rl.simulators.libero import assets, init_states, installed, suites
from embodied_rl.simulators.libero.control import looks
from embodied_rl.simulators.libero.scene import NO_OP, Scene, World, axis_angle

SIZE, SEED, KNOB = 64, 11, 1.0
STEPS = 20
ACTIONS = np.random.default_rng(0).uniform(-1.2, 1.2, (STEPS, 7)).astype(np.float32)
ACTIONS[4:8, 3:6] = 0  # no rotation: the controller keeps its old goal
ACTIONS[8] = 0

try:
    assets.folder()
except UserError as error:
    pytestmark = pytest.mark.skip(reason=str(error))


def reference(suite: str, number: int, index: int | None, out: str) -> None:
    """LIBERO's way: seed, reset, recorded state, ten steps of no motion, then ACTIONS, cameras on throughout."""
    installed.problems()
    from libero.libero.envs import OffScreenRenderEnv

    task = suites.suite_tasks(suite)[number]
    env = OffScreenRenderEnv(bddl_file_name=str(task.bddl), camera_heights=SIZE, camera_widths=SIZE)
    env.seed(SEED)
    seen = env.reset()
    if index is not None:
        seen = env.set_init_state(init_states.read(task.init_states)[index])
    reward, done = 0.0, False
    rows = []
    for step in range(-10, STEPS):
        if step >= 0:
            rows.append(_row(env, seen, reward, done))
        if step == STEPS // 2:
            for knob in _knobs(env.sim.model._model):
                env.sim.data._data.qpos[knob] = KNOB
        seen, reward, done, _ = env.step(NO_OP if step < 0 else ACTIONS[step])
    rows.append(_row(env, seen, reward, done))
    np.savez(out, **{name: np.stack([row[name] for row in rows]) for name in rows[0]})
    env.close()


def _row(env, seen, reward, done) -> dict[str, np.ndarray]:
    data, model = env.sim.data._data, env.sim.model._model
    return {
        "physics": np.concatenate([[data.time], data.qpos, data.qvel, data.ctrl, data.qacc_warmstart]),
        "fixtures": np.concatenate([model.body_pos.ravel(), model.body_quat.ravel()]),
        "proprioception": np.concatenate(
            [seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"]]
        ),
        "objects": np.concatenate(
            [np.concatenate([seen[f"{thing.name}_pos"], seen[f"{thing.name}_quat"]]) for thing in env.env.objects]
        ),
        "result": np.array([reward, done, env.check_success()], float),
        **{name: seen[f"{name}_image"][::-1, ::-1] for name in suites.CAMERAS},
    }


def _knobs(model) -> list[int]:
    names = [model.joint(i).name for i in range(model.njnt)]
    return [model.jnt_qposadr[i] for i, name in enumerate(names) if "flat_stove" in name]


def ours(scene: Scene, world: World, index: int | None, photos: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The same through the adapter, with images after the steps `photos` only."""
    scene.reset(world, index, SEED, 10)
    success, rows, images = False, [], {name: np.zeros((SIZE, SIZE, 3), np.uint8) for name in suites.CAMERAS}
    for step in range(STEPS + 1):
        data, model = world.data, scene.model
        if step in photos:
            images = scene.images(world)
        rows.append(
            {
                "physics": np.concatenate([[data.time], data.qpos, data.qvel, data.ctrl, data.qacc_warmstart]),
                "fixtures": np.concatenate([model.body_pos.ravel(), model.body_quat.ravel()]),
                "proprioception": scene.proprioception(world),
                "objects": scene.objects(world)[: 7 * len(scene.env.objects)],
                "result": np.array([float(success), success, success], float),
                **images,
            }
        )
        if step == STEPS // 2:
            for knob in _knobs(model):
                data.qpos[knob] = KNOB
        if step < STEPS:
            success = scene.step(world, ACTIONS[step])
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@cache
def libero(suite: str, number: int, index: int | None) -> dict[str, np.ndarray]:
    with TemporaryDirectory() as folder:
        out = Path(folder) / "reference.npz"
        command = [sys.executable, __file__, suite, str(number), str(index), str(out)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        with np.load(out) as arrays:
            return dict(arrays)


@cache
def scene(suite: str, number: int) -> Scene:
    return Scene(suites.suite_tasks(suite)[number], SIZE)


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], photos: tuple[int, ...]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        rows = list(photos) if name in suites.CAMERAS else slice(None)
        np.testing.assert_array_equal(ours[name][rows], theirs[name][rows], err_msg=name)


CASES = [
    pytest.param("libero_spatial", 0, 3),
    pytest.param("libero_object", 1, None),
    pytest.param("libero_90", 0, None, marks=pytest.mark.slow),  # drawers that LIBERO opens at random
    pytest.param("libero_spatial", 4, 49, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("suite", "number", "index"), CASES)
def test_episodes_equal_liberos_whatever_ran_before(suite: str, number: int, index: int | None) -> None:
    """Physics with its warm start, fixtures, observations as robosuite's sensors sample them, rewards, images; the
    first time, after another episode, and from a start that was kept."""
    theirs = libero(suite, number, index)
    task = scene(suite, number)
    world = task.world()
    some = (0, 1, 11, 12, STEPS)
    assert_equal(ours(task, world, index, some), theirs, some)
    task.reset(world, 0, 5, 1)
    for action in ACTIONS[::-1]:
        task.step(world, action)
    task._starts.clear()
    assert_equal(ours(task, world, index, (0,)), theirs, (0,))
    other = task.world()
    task.reset(other, 1, 6, 2)
    assert_equal(ours(task, world, index, (0,)), theirs, (0,))
    changed = np.abs(np.diff(theirs["agentview"].astype(int), axis=0)).max()
    assert changed > 20, "the cameras see something move"


def test_sensors_are_sampled_when_robosuite_samples_them() -> None:
    installed.problems()
    from robosuite.utils.observables import Observable, sensor

    now = 0

    @sensor(modality="test")
    def count(_cache: object) -> np.ndarray:
        return np.array([now, now])

    for forced in (1, 2):
        observable = Observable("count", count, sampling_rate=20)
        for _ in range(forced):
            observable.update(0.002, {}, force=True)
        expected: list[int | None] = []
        before = -1
        for step in range(600):
            for substep in range(25):
                now = 25 * step + substep
                observable.update(0.002, {})
            seen = int(observable.obs[0])
            expected.append(seen - 25 * step if seen != before else None)
            before = seen
        assert looks(600, forced) == expected


def test_axis_angle() -> None:
    from scipy.spatial.transform import Rotation

    quaternions = np.random.default_rng(0).normal(size=(100, 4))
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    for quaternion in quaternions:
        before = quaternion.copy()
        ours = axis_angle(quaternion)
        turned = Rotation.from_quat(quaternion)
        np.testing.assert_allclose(Rotation.from_rotvec(ours).as_matrix(), turned.as_matrix(), atol=1e-12)
        assert np.array_equal(before, quaternion)
        if quaternion[3] > 0:
            np.testing.assert_allclose(ours, turned.as_rotvec(), atol=1e-12)
    assert np.array_equal(axis_angle(np.array([0.0, 0, 0, 1.0000001])), np.zeros(3))


def test_shapes_left_out_of_an_image_change_no_pixel() -> None:
    task = scene("libero_spatial", 0)
    world = task.world()
    left_out = 0
    for index in range(3):
        task.reset(world, index, 0, 0)
        for k in range(10 * index):
            task.step(world, np.clip(ACTIONS[index] + 0.3 * ACTIONS[k], -1, 1))
        images = task.images(world)
        unseen, task._renderer._unseen = task._renderer._unseen, lambda data, camera: np.zeros(task.model.ngeom, bool)
        whole = task.images(world)
        task._renderer._unseen = unseen
        for name in suites.CAMERAS:
            np.testing.assert_array_equal(images[name], whole[name])
            left_out += unseen(task._view, task.model.camera(name).id).sum()
    assert left_out > 100


if __name__ == "__main__":
    reference(sys.argv[1], int(sys.argv[2]), None if sys.argv[3] == "None" else int(sys.argv[3]), sys.argv[4])

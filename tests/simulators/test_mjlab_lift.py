"""The adapter of mjlab on the tasks with an arm, a cube, a goal and a camera; long."""

import copy

import numpy as np
import pytest
from mjlab_case import Reference

from embodied_rl.simulators.base import InitialState
from embodied_rl.simulators.check import check
from embodied_rl.simulators.mjlab.config import MjlabConfig
from embodied_rl.simulators.mjlab.tasks import TASKS
from embodied_rl.simulators.reset_schedule import FixedSchedule

STATE, RGB = "Mjlab-Lift-Cube-Yam", "Mjlab-Lift-Cube-Yam-Rgb"
SEEDS = (21, 22)
SCHEDULE = FixedSchedule([InitialState(0, seed) for seed in SEEDS])
STEPS = 20
ACTIONS = np.random.default_rng(1).uniform(-2, 2, (STEPS, 7)).astype(np.float32)
ROWS = np.arange(len(SEEDS))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module", params=[STATE, RGB])
def task(request):
    return request.param


@pytest.fixture(scope="module")
def kwargs(task):
    return {"task": task, "observation": "rgb" if task == RGB else "state", "max_steps": STEPS}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, task, kwargs):
    parts = ["own", "unhosted"] + ["at_the_goal"] * (task == STATE)
    order = {"parts": parts, "task": task, "seeds": SEEDS, "actions": ACTIONS.tolist(), "kwargs": kwargs}
    run = Reference(tmp_path_factory.mktemp("mjlab"), **order)
    yield run.arrays()
    run.close()


@pytest.fixture(scope="module")
def simulator(task, kwargs):
    workers = 2 if task == STATE else 1
    with MjlabConfig(**kwargs, num_envs=len(SEEDS), workers=workers).build(SCHEDULE) as simulator:
        yield simulator


def play(simulator, steps=ACTIONS, tickets=ROWS):
    """(observations [N] at the start and after every step, result) of one chunk; copies."""
    first = simulator.reset(tickets=tickets).copy()
    result = copy.deepcopy(simulator.step(np.tile(steps, (len(tickets), 1, 1)), "all", None))
    return [first, *result.intermediate], result


def test_the_contract_is_kept(simulator):
    check(simulator)


def test_episodes_are_those_of_mjlab_itself(simulator, reference):
    frames, result = play(simulator)
    assert np.array_equal(np.stack([frame.state for frame in frames], axis=1), reference["own.actor"])
    assert np.array_equal(np.stack([frame.privileged for frame in frames], axis=1), reference["own.critic"])
    assert np.array_equal(result.reward, reference["own.reward"])
    assert np.array_equal(result.terminated, reference["own.terminated"])
    assert not result.success.any()


def test_images_are_those_of_mjlab_itself(simulator, reference, task):
    if task != RGB:
        assert simulator.observation_spec.cameras == {}
        return
    frames, _ = play(simulator)
    ours = np.stack([frame.images["camera_d405_rgb"] for frame in frames], axis=1)
    own = np.rint(reference["own.camera"] * 255).astype(np.uint8)
    assert np.array_equal(ours, np.moveaxis(own, 2, -1))
    assert len(np.unique(ours)) > 20


def test_worker_processes_change_nothing(simulator, reference):
    frames, result = play(simulator)
    assert np.array_equal(frames[0].state, reference["unhosted.first"])
    assert np.array_equal(frames[-1].state, reference["unhosted.last"])
    assert np.array_equal(result.reward, reference["unhosted.reward"])
    for name, images in frames[-1].images.items():
        assert np.array_equal(images, reference[f"unhosted.last.{name}"])


def test_the_specs(simulator, task):
    facts, spec = TASKS[task], simulator.action_spec
    assert spec.dim == facts.action_dim == 7
    assert (spec.gripper, spec.gripper_open) == (6, 1)
    assert tuple(simulator.observation_spec.cameras) == facts.cameras
    assert simulator.tasks[0].has_success


def test_a_cube_at_its_goal_is_a_success(reference, task):
    if task == STATE:
        assert reference["goal.success"].tolist() == [False, True]
        assert reference["goal.reward"].tolist() == [0.0, 1.0]


def test_new_goals_within_an_episode_depend_on_its_seed_alone():
    still = np.zeros((620, 7), np.float32)  # goals last 400 to 600 steps
    with MjlabConfig(STATE, num_envs=2, max_steps=len(still)).build(SCHEDULE) as simulator:
        frames, result = play(simulator, still)
        swapped, again = play(simulator, still, ROWS[::-1])
    assert result.valid.all()
    assert np.array_equal(result.reward, again.reward[::-1])
    for one, other in zip(frames, swapped, strict=True):
        assert np.array_equal(one.state, other.state[::-1])
    names = [f"actor.cube_to_goal.{i}" for i in range(3)]
    at = [simulator.observation_spec.state_names.index(name) for name in names]
    jumps = np.abs(np.diff(np.stack([frame.state[:, at] for frame in frames]), axis=0)).max(axis=2)
    assert ((jumps[400:] > 0.05).sum(axis=0) == 1).all()

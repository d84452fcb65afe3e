"""The adapter of mjlab, on Mjlab-Cartpole-Balance, held to mjlab's own interface."""

import json

import numpy as np
import pytest
from mjlab_case import Reference, interpreter

from embodied_rl.simulators.base import WAIT, InitialState
from embodied_rl.simulators.check import check
from embodied_rl.simulators.mjlab.config import MjlabConfig
from embodied_rl.simulators.mjlab.tasks import TASKS

TASK = "Mjlab-Cartpole-Balance"
SEEDS = (11, 12, 13)
STEPS = 20
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (STEPS, 1)).astype(np.float32)
ROWS = np.arange(len(SEEDS))

pytestmark = pytest.mark.slow


class Schedule:
    """A ticket's seed is its number, but for the first ones."""

    def state(self, ticket):
        return InitialState(0, SEEDS[ticket] if ticket < len(SEEDS) else ticket)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    order = {
        "parts": ["own", "unhosted"],
        "task": TASK,
        "seeds": SEEDS,
        "actions": ACTIONS.tolist(),
        "kwargs": {"task": TASK, "max_steps": STEPS},
    }
    run = Reference(tmp_path_factory.mktemp("mjlab"), **order)
    yield run
    run.close()


@pytest.fixture(scope="module")
def simulator(reference):  # the reference runs meanwhile
    interpreter()
    config = MjlabConfig(TASK, num_envs=len(SEEDS), max_steps=STEPS)
    with config.build(Schedule()) as simulator:
        yield simulator


def play(simulator, tickets=ROWS, chunk=STEPS, disturb=False):
    """{name: [N,...]} of the episodes `tickets` under ACTIONS; with `disturb`, row 0 is reset on the way."""
    first = simulator.reset(tickets=tickets).copy()
    parts = {name: [] for name in ("reward", "terminated", "truncated", "valid")}
    observations = {"state": [first.state], "privileged": [first.privileged]}
    for start in range(0, STEPS, chunk):
        if disturb and start >= STEPS // 2:
            simulator.reset(np.array([0]), np.array([99]))
            disturb = False
        actions = np.tile(ACTIONS[start : start + chunk], (len(tickets), 1, 1))
        result = simulator.step(actions, "all", None)
        for name, values in parts.items():
            values.append(getattr(result, name).copy())
        for name, values in observations.items():
            values += [getattr(frame, name).copy() for frame in result.intermediate]
    arrays = {name: np.concatenate(values, axis=1) for name, values in parts.items()}
    return arrays | {name: np.stack(values, axis=1) for name, values in observations.items()}


def assert_same(one, other, rows=ROWS, other_rows=ROWS):
    assert one.keys() == other.keys()
    for name in one:
        assert np.array_equal(one[name][rows], other[name][other_rows]), name


def test_the_contract_is_kept(simulator):
    check(simulator)


def test_episodes_are_those_of_mjlab_itself(simulator, reference):
    ours, own = play(simulator), reference.arrays()
    assert np.array_equal(ours["state"], own["own.actor"])
    assert np.array_equal(ours["privileged"], own["own.critic"])
    assert np.array_equal(ours["reward"], own["own.reward"])
    assert np.array_equal(ours["terminated"], own["own.terminated"])


def test_the_time_limit_truncates_and_the_final_observation_is_the_true_one(simulator, reference):
    simulator.reset(tickets=ROWS)
    result = simulator.step(np.tile(ACTIONS, (len(ROWS), 1, 1)), "last", ROWS + 50)
    assert result.truncated[:, -1].all()
    assert not result.truncated[:, :-1].any()
    assert not result.terminated.any()
    assert np.array_equal(result.final_observation.state, reference.arrays()["own.actor"][:, -1])
    assert not np.array_equal(result.observation.state, result.final_observation.state)
    assert result.success is None


def test_a_worker_process_changes_nothing(simulator, reference):
    unhosted = reference.arrays()
    ours = play(simulator)
    assert np.array_equal(ours["state"][:, 0], unhosted["unhosted.first"])
    assert np.array_equal(ours["state"][:, -1], unhosted["unhosted.last"])
    assert np.array_equal(ours["reward"], unhosted["unhosted.reward"])
    assert np.array_equal(ours["truncated"], unhosted["unhosted.truncated"])


def test_the_same_seed_is_the_same_episode_in_any_row_whatever_ran_before(simulator):
    whole = play(simulator)
    for tickets in (np.array([2, 2, 2]), np.array([1, 0, 1])):
        play(simulator, tickets + 70)
        assert_same(play(simulator, tickets), whole, ROWS, tickets)


def test_a_reset_of_one_row_leaves_the_others_as_they_were(simulator):
    assert_same(play(simulator, chunk=5), play(simulator, chunk=5, disturb=True), ROWS[1:], ROWS[1:])


@pytest.mark.parametrize("chunk", [1, 8])
def test_the_length_of_chunks_does_not_matter(simulator, chunk):
    assert_same(play(simulator, chunk=STEPS), play(simulator, chunk=chunk))


def test_a_waiting_row_is_not_stepped(simulator):
    simulator.reset(tickets=np.array([0, WAIT, 2]))
    result = simulator.step(np.tile(ACTIONS[:2], (len(ROWS), 1, 1)))
    assert result.valid.sum(1).tolist() == [2, 0, 2]


def test_the_names_of_the_state_and_the_actions(simulator):
    names = ("cart_pos.0", "pole_angle.0", "pole_angle.1", "cart_vel.0", "pole_vel.0")
    assert simulator.observation_spec.state_names == tuple(f"actor.{name}" for name in names)
    assert (simulator.action_spec.low, simulator.action_spec.high) == ((-1.0,), (1.0,))
    assert simulator.action_spec.dim == TASKS[TASK].action_dim


def test_the_table_of_tasks_is_that_of_mjlab(reference):
    facts = json.loads(str(reference.arrays()["facts"]))
    ours = {
        name: {"max_steps": task.max_steps, "cameras": list(task.cameras), "has_success": task.has_success}
        for name, task in TASKS.items()
    }
    assert ours == facts

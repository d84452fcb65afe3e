"""Two Isaac Lab tasks, one direct and one manager-based, in worker processes, against Isaac Lab's own environments."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from isaaclab_case import Reference, check_against_isaac_lab, check_hosting, needs_isaaclab
from isaaclab_reference import CARTPOLE, LIMIT, REACH, SEEDS, Seeds, play

from embodied_rl.simulators.base import Simulator
from embodied_rl.simulators.check import check
from embodied_rl.simulators.isaaclab.config import IsaacLabConfig

pytestmark = [needs_isaaclab, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    running = Reference([CARTPOLE, REACH], tmp_path_factory.mktemp("isaaclab"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def cartpole(reference: Reference) -> Iterator[Simulator]:
    with IsaacLabConfig(CARTPOLE, num_envs=len(SEEDS), max_steps=LIMIT[CARTPOLE]).build(Seeds()) as simulator:
        yield simulator


@pytest.fixture(scope="module")
def reach(reference: Reference) -> Iterator[Simulator]:
    with IsaacLabConfig(REACH, num_envs=len(SEEDS), max_steps=LIMIT[REACH]).build(Seeds()) as simulator:
        yield simulator


def test_a_direct_task_keeps_the_contract(cartpole: Simulator) -> None:
    check(cartpole, steps=10)


def test_a_manager_based_task_keeps_the_contract(reach: Simulator) -> None:
    check(reach, steps=4)


def test_a_direct_task_has_isaac_labs_numbers(cartpole: Simulator, reference: Reference) -> None:
    numbers = reference.numbers(CARTPOLE)
    check_against_isaac_lab(CARTPOLE, numbers, LIMIT[CARTPOLE])
    check_hosting(play(cartpole, CARTPOLE), numbers)
    off_the_rail = numbers["terminated"][2].nonzero()[0][0]
    assert off_the_rail + 1 < LIMIT[CARTPOLE]
    assert abs(numbers["final"][2][0]) > 3.0  # metres; a reset puts the cart within 1


def test_a_manager_based_task_has_isaac_labs_numbers(reach: Simulator, reference: Reference) -> None:
    numbers = reference.numbers(REACH)
    check_against_isaac_lab(REACH, numbers, LIMIT[REACH])
    check_hosting(play(reach, REACH), numbers)


def test_an_episode_starts_the_same_in_every_row(reach: Simulator) -> None:
    starts = reach.reset(tickets=np.array([7, 7, 7])).state
    assert np.array_equal(starts[0], starts[1]) and np.array_equal(starts[0], starts[2])
    assert not np.array_equal(starts, reach.reset(tickets=np.array([7, 8, 9])).state)


def test_a_reset_forgets_what_the_last_episode_did(reach: Simulator) -> None:
    spec = reach.observation_spec
    at = [spec.state_names.index(f"policy.actions.{i}") for i in range(7)]
    reach.reset(tickets=np.arange(3))
    after = reach.step(np.full((3, 2, 7), 0.5, np.float32)).observation.state
    assert (after[:, at] == 0.5).all()
    assert (reach.reset(np.array([1]), np.array([5])).state[:, at] == 0).all()
    following = reach.step(np.full((3, 1, 7), 0.25, np.float32)).observation.state
    assert (following[:, at] == 0.25).all()


def test_goals_in_the_middle_of_an_episode_belong_to_its_seed(reference: Reference) -> None:
    later, exchanged = reference.numbers(REACH)["later"]
    assert np.array_equal(later, exchanged[::-1])
    assert len(np.unique(later[:, :3], axis=0)) == len(SEEDS)


def test_success_is_the_tasks_own_term(cartpole: Simulator, reach: Simulator, reference: Reference) -> None:
    assert not cartpole.tasks[0].has_success and reach.tasks[0].has_success
    _, terminated, truncated, success = reference.numbers(REACH)["reached"]
    assert success.tolist() == terminated.tolist() == [1.0, 0.0, 0.0]
    assert not truncated.any()


def test_names_and_quaternions_say_what_the_state_holds(reach: Simulator) -> None:
    spec = reach.observation_spec
    assert (spec.state, len(spec.state_names), spec.quaternion) == (32, 32, "xyzw")
    assert [spec.state_names[at] for at in spec.quaternion_at] == ["policy.pose_command.3"]
    # The hand is to point straight down: half a turn about y, then any turn about the vertical, has neither z nor w.
    goal = reach.reset(tickets=np.arange(3)).state[:, spec.quaternion_at[0] :][:, :4]
    assert np.allclose(np.linalg.norm(goal, axis=1), 1.0, atol=1e-5)
    assert np.allclose(goal[:, 2:], 0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("unknown", "did you mean Isaac-Reach-Franka"),
        ("preset", "cannot run with physics 'newton_mjwarp'"),
        ("camera", "has no cameras"),
        ("cuda", "needs CUDA"),
        ("assets", "set ISAACSIM_ASSET_ROOT"),
        ("reward", "it has: task"),
    ],
)
def test_what_cannot_be_built_is_refused_on_one_line(reference: Reference, what: str, says: str) -> None:
    reference.numbers(CARTPOLE)
    refused = str(reference.numbers("refused")[what])
    assert says in refused and "\n" not in refused

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embodied_rl.simulators.base import InitialState
from embodied_rl.simulators.reset_schedule import (
    STREAMS,
    FixedSchedule,
    GroupSchedule,
    OrderedSchedule,
    RandomSchedule,
    draw_seed,
)

STATES = st.integers(0, 50)
TICKETS = st.integers(0, 2**62)
SEEDS = st.integers(0, 2**62)


@given(SEEDS, TICKETS, st.integers(1, 50), st.text(), STATES)
def test_random_states_are_pure_and_in_range(
    seed: int, ticket: int, num_tasks: int, stream: str, num_states: int
) -> None:
    state = RandomSchedule(seed, num_tasks, stream, num_states).state(ticket)
    assert state == RandomSchedule(seed, num_tasks, stream, num_states).state(ticket)
    assert 0 <= state.seed < 2**31
    assert 0 <= state.task < num_tasks
    assert state.index is None if num_states == 0 else state.index in range(num_states)


def test_an_evaluation_uses_every_recorded_state_of_every_task_once_before_any_twice() -> None:
    schedule = OrderedSchedule.draw("test", 2 * 3 * 5, num_tasks=3, num_states=5)
    states = [schedule.state(ticket) for ticket in range(len(schedule))]
    once = [(task, index) for index in range(5) for task in range(3)]
    assert [(state.task, state.index) for state in states] == 2 * once


@given(SEEDS, SEEDS, TICKETS, TICKETS)
def test_training_development_and_test_seeds_are_disjoint(seed: int, other: int, a: int, b: int) -> None:
    seeds = {(stream, draw_seed(stream, s, t)) for stream in (*STREAMS, "video") for s, t in ((seed, a), (other, b))}
    quarters = {stream: {s // 2**29 for name, s in seeds if name == stream} for stream, _ in seeds}
    assert all(len(quarter) == 1 for quarter in quarters.values())
    assert len(set.union(*quarters.values())) == 4


def test_seeds_and_streams_give_different_sequences() -> None:
    def sequence(stream: str, seed: int) -> list[int]:
        return [draw_seed(stream, seed, i) % 2**29 for i in range(1000)]

    sequences = [sequence(stream, seed) for stream in ("training", "test", "a", "b") for seed in range(3)]
    assert len({s for one in sequences for s in one}) > 11_900


def test_random_tasks_are_uniform() -> None:
    counts = [0] * 4
    for ticket in range(4000):
        counts[RandomSchedule(7, num_tasks=4).state(ticket).task] += 1
    assert all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in counts)


def test_seeds_are_the_same_in_every_process() -> None:
    """Python randomises hash() per process; the schedules must not depend on it."""
    program = (
        "from embodied_rl.simulators.reset_schedule import RandomSchedule\n"
        "print([(s.task, s.seed) for s in map(RandomSchedule(3, 5).state, range(4))])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": h}, capture_output=True, text=True
        ).stdout
        for h in ("1", "2")
    }
    assert printed == {str([(s.task, s.seed) for s in map(RandomSchedule(3, 5).state, range(4))]) + "\n"}


@given(SEEDS, st.integers(1, 20), st.integers(0, 1000), st.integers(1, 5))
def test_a_group_shares_one_state_and_groups_differ(seed: int, size: int, group: int, num_tasks: int) -> None:
    schedule = GroupSchedule(seed, size, num_tasks)
    members = {schedule.state(group * size + member) for member in range(size)}
    assert members == {RandomSchedule(seed, num_tasks).state(group)}
    assert schedule.state((group + 1) * size) not in members


def test_fixed_states_repeat() -> None:
    states = [InitialState(0, 5, 2), InitialState(1, 6)]
    assert [FixedSchedule(states).state(t) for t in range(5)] == [*states, *states, states[0]]


def test_ordered_states_come_once_and_in_order() -> None:
    schedule = OrderedSchedule([7, 8, 7], [0, 1, 2])
    assert len(schedule) == 3
    assert [schedule.state(t) for t in range(3)] == [InitialState(0, 7), InitialState(1, 8), InitialState(2, 7)]
    for ticket in (3, -1):
        with pytest.raises(IndexError, match="3 episodes"):
            schedule.state(ticket)
    with pytest.raises(ValueError, match="2 seeds for 1 tasks"):
        OrderedSchedule([1, 2], [0])


def test_drawn_evaluation_episodes() -> None:
    schedule = OrderedSchedule.draw("test", 100, num_tasks=3)
    assert [schedule.state(t).task for t in range(6)] == [0, 1, 2, 0, 1, 2]
    assert len({schedule.state(t).seed for t in range(100)}) == 100
    assert all(schedule.state(t).seed // 2**29 == STREAMS.index("test") for t in range(100))

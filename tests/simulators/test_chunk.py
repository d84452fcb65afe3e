from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_toys import ACTION, Counter, Together, assert_same

from embodied_rl.simulators.base import WAIT, InitialState, Simulator
from embodied_rl.simulators.chunk import BatchedSimulator, Steps, run_chunk
from embodied_rl.simulators.reset_schedule import FixedSchedule, RandomSchedule
from embodied_rl.simulators.workers import WorkerSimulator
from embodied_rl.types import Episode

N = 3
SCHEDULE = RandomSchedule(5, num_tasks=2)


def together(longest: int = 9) -> BatchedSimulator:
    return BatchedSimulator(Together([Counter(longest) for _ in range(N)]), SCHEDULE)


@pytest.fixture(scope="module")
def apart() -> Iterator[WorkerSimulator]:
    with WorkerSimulator("simulator_toys:Counter", {}, N, 2, SCHEDULE) as simulator:
        yield simulator


Chunk = tuple[np.ndarray, Literal["last", "all"], np.ndarray | None]


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    actions = generator.uniform(-1, 1, (N, draw(st.integers(1, 6)), ACTION.dim)).astype(np.float32)
    tickets = st.lists(st.just(WAIT) | st.integers(0, 40), min_size=N, max_size=N)
    return actions, draw(st.sampled_from(("last", "all"))), draw(st.none() | tickets.map(np.array))


@st.composite
def resets(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    rows = draw(st.permutations(range(N)))[: draw(st.integers(1, N))]
    return np.array(rows), np.array(draw(st.lists(st.integers(WAIT, 40), min_size=len(rows), max_size=len(rows))))


@settings(max_examples=60)
@given(st.lists(chunks() | resets(), min_size=1, max_size=8))
def test_both_executors_give_the_same_results(
    apart: WorkerSimulator, calls: list[Chunk | tuple[np.ndarray, np.ndarray]]
) -> None:
    def play(simulator: Simulator) -> Iterator[Any]:
        # Rows that never ran show zeros, so every play starts from the same last observations.
        yield simulator.reset(tickets=np.arange(N))
        for call in calls:
            yield simulator.step(*call) if len(call) == 3 else simulator.reset(*call)

    for one, other in zip(play(apart), play(together()), strict=True):
        assert_same(one, other)


class Oracle:
    """One environment followed step by step, with plain numbers."""

    def __init__(self, ticket: int) -> None:
        self.environment = Counter()
        self.start(ticket)

    def start(self, ticket: int) -> None:
        self.ticket, self.rewards, self.won = ticket, [], []
        if ticket != WAIT:
            self.environment.reset(SCHEDULE.state(ticket))

    def run(self, row: int, actions: np.ndarray, next_ticket: int) -> tuple[list[tuple], Episode | None, Any]:
        executed: list[tuple] = []
        for action in actions if self.ticket != WAIT else []:
            reward, terminated, truncated, success = self.environment.step(action)
            executed.append((np.float32(reward), terminated, truncated and not terminated, bool(success)))
            self.rewards.append(float(np.float32(reward)))
            self.won.append(success)
            if terminated or truncated:
                task = self.environment.task
                last, once = (self.won[-1], any(self.won)) if task == 0 else (None, None)
                length, total = len(self.won), sum(self.rewards)
                episode = Episode(self.ticket, task, row, length, total, once, last, truncated=not terminated)
                final = self.environment.observe()
                self.start(next_ticket)
                return executed, episode, final
        return executed, None, None


@settings(max_examples=100)
@given(st.lists(chunks(), min_size=1, max_size=8))
def test_results_are_what_step_by_step_execution_gives(calls: list[Chunk]) -> None:
    simulator = together()
    simulator.reset(tickets=np.arange(N))
    oracles = [Oracle(ticket) for ticket in range(N)]
    for actions, observe, next_tickets in calls:
        tickets = np.full(N, WAIT) if next_tickets is None else next_tickets
        result = simulator.step(actions, observe, next_tickets)
        expected = [oracle.run(n, actions[n], tickets[n]) for n, oracle in enumerate(oracles)]
        ended = [n for n in range(N) if expected[n][1]]
        assert result.success is not None
        assert result.final_rows.tolist() == ended
        assert result.episodes == [expected[n][1] for n in ended]
        for n, oracle in enumerate(oracles):
            executed = expected[n][0]
            assert result.valid[n].tolist() == [True] * len(executed) + [False] * (actions.shape[1] - len(executed))
            arrays = (result.reward, result.terminated, result.truncated, result.success)
            assert [tuple(array[n, k] for array in arrays) for k in range(len(executed))] == executed
            assert not any(array[n, len(executed) :].any() for array in arrays)
            assert result.tickets[n] == oracle.ticket
            observed = expected[n][2] if oracle.ticket == WAIT else oracle.environment.observe()
            if observed is not None:
                np.testing.assert_array_equal(result.observation.state[n], observed["state"])
                np.testing.assert_array_equal(result.observation.images["wrist"][n], observed["image.wrist"])
        final = result.final_observation
        assert bool(ended) == (final is not None)
        for e, n in enumerate(ended):
            assert final is not None
            np.testing.assert_array_equal(final.state[e], expected[n][2]["state"])
            assert final.task[e] == result.episodes[e].task


@given(st.integers(1, 7), st.integers(0, 1000))
def test_a_chunk_of_k_is_k_chunks_of_one(chunk: int, ticket: int) -> None:
    actions = np.random.default_rng(ticket).uniform(-1, 1, (N, chunk, ACTION.dim)).astype(np.float32)
    tickets = np.arange(ticket, ticket + N)
    whole, parts = together(longest=chunk + 2), together(longest=chunk + 2)
    whole.reset(tickets=tickets)
    parts.reset(tickets=tickets)
    one = whole.step(actions, "all")
    many = [parts.step(actions[:, k : k + 1]) for k in range(chunk)]
    assert_same(one.observation, many[-1].observation)
    for name in ("reward", "terminated", "truncated", "valid", "success"):
        np.testing.assert_array_equal(getattr(one, name), np.concatenate([getattr(part, name) for part in many], 1))
    by_row = sorted((episode for part in many for episode in part.episodes), key=lambda episode: episode.env_id)
    assert one.episodes == by_row
    assert one.intermediate is not None
    np.testing.assert_array_equal(one.intermediate[-1].state, one.observation.state)


def test_one_environment_executes_nothing_after_its_end() -> None:
    environment = Counter(longest=1)
    environment.reset(InitialState(0, 0))
    steps = Steps.zeros(4)
    seen: list[int] = []
    assert run_chunk(environment, np.zeros((4, 2), np.float32), steps, seen.append) == (1, True)
    assert len(environment.steps) == 1
    assert seen == [0]
    assert steps.valid.tolist() == [True, False, False, False]


def test_ended_rows_of_a_batch_hold_to_the_border() -> None:
    environments = [Counter(), Counter()]
    ends = [next(s for s in range(100) if ends_after(s) == length) for length in (2, 9)]
    schedule = FixedSchedule([InitialState(0, seed) for seed in ends])
    simulator = BatchedSimulator(Together(environments), schedule)
    simulator.reset(tickets=np.arange(2))
    simulator.step(np.full((2, 5, 2), 0.25, np.float32))
    hold, given = list(ACTION.hold), [0.25, 0.25]
    assert [step.tolist() for step in environments[0].steps] == [given, given, hold, hold, hold]
    assert [step.tolist() for step in environments[1].steps] == [given] * 5
    simulator.step(np.full((2, 2, 2), 0.5, np.float32))
    assert [step.tolist() for step in environments[0].steps[5:]] == [hold, hold]


def test_termination_wins_over_truncation() -> None:
    seed = next(s for s in range(1000) if ends_after(s) == 3 and both(s))
    simulator = BatchedSimulator(Together([Counter()]), FixedSchedule([InitialState(0, seed)]))
    simulator.reset(tickets=np.array([0]))
    result = simulator.step(np.zeros((1, 4, 2), np.float32))
    assert result.terminated.tolist() == [[False, False, True, False]]
    assert not result.truncated.any()
    assert not result.episodes[0].truncated


def test_only_what_is_acted_on_next_and_final_observations_are_rendered() -> None:
    environments = [Counter(longest=1), Counter(longest=10**6)]
    simulator = BatchedSimulator(Together(environments), FixedSchedule([InitialState(0, 4)]))
    simulator.reset(tickets=np.array([0, 0]))
    for environment in environments:
        environment.observations = 0
    simulator.step(np.zeros((2, 6, 2), np.float32), next_tickets=np.array([1, 1]))
    assert [environment.observations for environment in environments] == [2, 1]


def test_success_is_none_where_no_task_defines_it() -> None:
    environment = Together([Counter(longest=1, success=False)])
    environment.tasks = environment.tasks[1:]
    simulator = BatchedSimulator(environment, FixedSchedule([InitialState(0, 4)]))
    simulator.reset(tickets=np.array([0]))
    result = simulator.step(np.zeros((1, 1, 2), np.float32))
    assert result.success is None
    assert result.episodes[0].success_once is None
    assert result.episodes[0].success_at_end is None


@pytest.mark.parametrize("executor", ["apart", "together"])
def test_wrong_arguments_are_refused_before_anything_moves(executor: str, apart: WorkerSimulator) -> None:
    simulator = apart if executor == "apart" else together()
    first = simulator.reset(tickets=np.arange(N)).copy()
    good = np.zeros((N, 2, 2), np.float32)
    for wrong in (good[:2], good[:, :0], good[..., :1], good[0]):
        with pytest.raises(ValueError, match="actions"):
            simulator.send(wrong)
    for tickets in (np.arange(N + 1), np.array([0, 0, -2])):
        with pytest.raises(ValueError, match="ticket"):
            simulator.send(good, next_tickets=tickets)
    with pytest.raises(ValueError, match="different rows"):
        simulator.reset(np.array([0, 0]), np.array([1, 2]))
    with pytest.raises(ValueError, match="different rows"):
        simulator.reset(np.array([N]), np.array([1]))
    with pytest.raises(ValueError, match="ticket"):
        simulator.reset()
    with pytest.raises(RuntimeError, match="receive without send"):
        simulator.receive()
    simulator.send(good)
    with pytest.raises(RuntimeError, match="send before"):
        simulator.send(good)
    with pytest.raises(RuntimeError, match="between send and receive"):
        simulator.reset(np.array([0]), np.array([0]))
    assert_same(simulator.reset(tickets=np.arange(N)).copy(), first)  # abandons the chunk in flight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.pop("privileged"), "gave .* where observation_spec has"),
        (lambda o: o.update(extra=o["state"]), "gave .*extra"),
        (lambda o: o.update(state=o["state"].astype(np.float64)), "'state' as float64"),
        (lambda o: o.update({"image.front": o["image.front"][..., :1]}), r"'image.front' as uint8 .*4, 1.*4, 3"),
    ],
)
def test_an_observation_that_breaks_its_spec_is_refused(change: Any, message: str) -> None:
    environment = Together([Counter()])
    observe = environment.observe

    def changed(rows: np.ndarray) -> dict[str, np.ndarray]:
        observation = observe(rows)
        change(observation)
        return observation

    environment.observe = changed
    simulator = BatchedSimulator(environment, SCHEDULE)
    with pytest.raises(ValueError, match=message):
        simulator.reset(tickets=np.array([0]))


def ends_after(seed: int) -> int:
    environment = Counter()
    environment.reset(InitialState(0, seed))
    return environment.length


def both(seed: int) -> bool:
    environment = Counter()
    environment.reset(InitialState(0, seed))
    return environment.end == 2

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from simulator_toys import ACTION, TASKS, Counter, Together

from embodied_rl.errors import ContractError
from embodied_rl.simulators import check
from embodied_rl.simulators.base import InitialState
from embodied_rl.simulators.chunk import BatchedSimulator
from embodied_rl.simulators.reset_schedule import OrderedSchedule, RandomSchedule
from embodied_rl.simulators.workers import WorkerSimulator
from embodied_rl.specs import CameraSpec, ObservationSpec
from embodied_rl.types import ChunkResult, Observation

N = 3


def toy(environment: type[Counter] = Counter, **options: Any) -> BatchedSimulator:
    return BatchedSimulator(Together([environment(**options) for _ in range(N)]), RandomSchedule(0, num_tasks=2))


def test_good_simulators_pass() -> None:
    check(toy())
    check(toy(longest=100))
    check(BatchedSimulator(Together([Counter(longest=3)]), OrderedSchedule.draw("test", 2)), steps=7)
    with WorkerSimulator("simulator_toys:Counter", {}, N, 2, RandomSchedule(0, num_tasks=2)) as simulator:
        check(simulator)


class Forgetful(Counter):
    """Something of the last episode survives the reset."""

    def reset(self, state: InitialState) -> None:
        before = getattr(self, "sum", 0.0)
        super().reset(state)
        self.sum += 1e-3 * (before > 2)


class Unseeded(Counter):
    """Noise that no ticket seeds."""

    noise = np.random.default_rng(0)

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool | None]:
        return super().step(action + self.noise.normal())


class PerRow(Counter):
    """Every environment is a little different."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        PerRow.count += 1
        self.offset = PerRow.count

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool | None]:
        reward, terminated, truncated, success = super().step(action)
        return reward + self.offset, terminated, truncated, success


class Endless(Counter):
    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool | None]:
        reward, _, _, success = super().step(action)
        return reward, False, False, success


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (Forgetful, "ticket .*state differs"),
        (Unseeded, "played again: .*differs"),
        (PerRow, "in another row: reward differs"),
        (Endless, "goes on after 100 steps"),
    ],
)
def test_broken_environments_are_caught(environment: type[Counter], message: str) -> None:
    with pytest.raises(ContractError, match=message) as raised:
        check(toy(environment))
    assert "\n" not in str(raised.value)


def test_a_reward_that_is_not_finite() -> None:
    class Infinite(Counter):
        def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool | None]:
            reward, terminated, truncated, success = super().step(action)
            return (np.inf if self.at == 3 else reward), terminated, truncated, success

    with pytest.raises(ContractError, match="reward is not finite"):
        check(toy(Infinite))


class Disturbed(Together):
    """Resetting some rows moves the others."""

    def reset(self, rows: np.ndarray, states: list[InitialState]) -> None:
        super().reset(rows, states)
        if len(rows) < self.num_envs:
            for row in set(range(self.num_envs)) - set(rows.tolist()):
                self.environments[row].sum += 0.5


def test_a_partial_reset_that_moves_other_rows() -> None:
    at_the_border = BatchedSimulator(Disturbed([Counter(100) for _ in range(N)]), RandomSchedule(6))
    with pytest.raises(ContractError, match=r"rows that go on, .* where others were reset: state differs"):
        check(at_the_border)

    class OnRequest(BatchedSimulator):
        def reset(self, env_ids: np.ndarray | None = None, tickets: np.ndarray | None = None) -> Observation:
            if env_ids is not None and len(env_ids) < N:
                toys[1].sum += 0.5
            return super().reset(env_ids, tickets)

    toys = [Counter(100) for _ in range(N)]
    with pytest.raises(ContractError, match=r"beside one that was reset: .* differs"):
        check(OnRequest(Together(toys), RandomSchedule(6)))


class Broken(BatchedSimulator):
    """A right simulator whose results are bent on their way out."""

    def __init__(self, bend: Callable[[ChunkResult], None]) -> None:
        super().__init__(Together([Counter() for _ in range(N)]), RandomSchedule(0, num_tasks=2))
        self.bend = bend

    def receive(self) -> ChunkResult:
        result = super().receive()
        self.bend(result)
        return result


def set_in(name: str, index: Any, value: Any) -> Callable[[ChunkResult], None]:
    return lambda result: getattr(result, name).__setitem__(index, value)


def replace_in(name: str, change: Callable[[Any], Any]) -> Callable[[ChunkResult], None]:
    return lambda result: setattr(result, name, change(getattr(result, name)))


def first_episode(**changes: Any) -> Callable[[ChunkResult], None]:
    return replace_in("episodes", lambda episodes: [replace(episode, **changes) for episode in episodes])


def rewarded_after_the_end(result: ChunkResult) -> None:
    result.reward[~result.valid] = 1.0


def late_final_observation(result: ChunkResult) -> None:
    """The final observation is taken after the reset, as naive auto-reset does."""
    if result.final_observation is not None:
        result.final_observation = result.observation.rows(result.final_rows)


def one_row_too_many(result: ChunkResult) -> None:
    result.observation = Observation.concatenate([result.observation, result.observation.rows([0])])


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (set_in("valid", (slice(None), 0), False), "valid is not a prefix"),
        (rewarded_after_the_end, "reward is not 0 where invalid"),
        (set_in("terminated", (slice(None), -1), True), "terminated at an invalid step"),
        (set_in("truncated", slice(None), True), "truncated at an invalid step|one step"),
        (set_in("lost", 0, True), "worker died"),
        (set_in("tickets", 0, 99), "ChunkResult.tickets"),
        (replace_in("reward", lambda reward: reward.astype(np.float64)), r"reward is float64 .*float32 \[3, 6\]"),
        (replace_in("valid", lambda valid: valid[:, :1]), r"valid is bool \[3, 1\] where bool \[3, 6\]"),
        (replace_in("success", lambda success: None), "success must be None exactly"),
        (replace_in("final_rows", lambda rows: rows[:-1]), "final_rows .* where rows"),
        (replace_in("episodes", lambda episodes: episodes[:-1]), "episodes where"),
        (replace_in("final_observation", lambda observation: None), "final_observation must be there"),
        (replace_in("intermediate", lambda frames: frames and frames[1:]), "5 observations of a chunk of 6"),
        (late_final_observation, "the final observation of row . and intermediate"),
        (one_row_too_many, r"observation: state is float32 \[4, 3\] where float32 \[3, 3\]"),
        (first_episode(ticket=77), "Episode.ticket of row . is 77"),
        (first_episode(length=1000), "Episode.length"),
        (first_episode(episode_return=-1e6), "Episode.episode_return"),
        (first_episode(success_once="maybe"), "Episode.success_once"),
        (first_episode(truncated=None), "Episode.truncated"),
    ],
)
def test_broken_results_are_caught(bend: Callable[[ChunkResult], None], message: str) -> None:
    with pytest.raises(ContractError, match=message) as raised:
        check(Broken(bend))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_spec": replace(ACTION, hold=(0.0, 2.0))}, "hold must lie between"),
        ({"action_spec": replace(ACTION, high=(1.0,))}, "2 low, 1 high and 2 hold"),
        ({"action_spec": replace(ACTION, gripper=2)}, "gripper is 2"),
        ({"action_spec": replace(ACTION, low=(1.0, 1.0))}, "low must be below high"),
        ({"tasks": ()}, "tasks is empty"),
        ({"tasks": (replace(TASKS[0], max_steps=0),)}, "max_steps = 0"),
        ({"tasks": TASKS[:1]}, "task .* outside its table of 1"),
        ({"num_envs": 0}, "num_envs is 0"),
        ({"observation_spec": ObservationSpec(state=4)}, r"state is float32 \[3, 3\] where float32 \[3, 4\]"),
        ({"observation_spec": ObservationSpec(state=3, cameras={"top": CameraSpec(2, 2)})}, "cameras .*front"),
    ],
)
def test_specs_that_do_not_hold_are_caught(changes: dict[str, Any], message: str) -> None:
    simulator = toy()
    for name, value in changes.items():
        setattr(simulator, name, value)
    with pytest.raises(ContractError, match=message):
        check(simulator)


def test_a_tolerance_allows_for_rounding() -> None:
    class Rounds(Counter):
        noise = np.random.default_rng(0)

        def observe(self) -> dict[str, np.ndarray]:
            observation = super().observe()
            self.jitter = getattr(self, "jitter", 0.0)
            observation["state"][1] += 1e-6 * (self.jitter + self.noise.random() * (self.at == 0))
            return observation

    with pytest.raises(ContractError, match="reset again: state differs by up to"):
        check(toy(Rounds))
    check(toy(Rounds), tolerance=1e-5)

"""Environments of this process as one simulator, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from embodied_rl.simulators.base import BatchedEnvironment, Environment, InitialState, ResetSchedule
from embodied_rl.simulators.chunk import BatchedSimulator


class OneByOne(BatchedEnvironment):
    """`num_envs` environments, stepped one after the other."""

    def __init__(self, make: Callable[[], Environment], num_envs: int) -> None:
        self.num_envs = num_envs
        self.each = [make() for _ in range(num_envs)]
        first = self.each[0]
        self.observation_spec, self.action_spec, self.tasks = first.observation_spec, first.action_spec, first.tasks

    def reset(self, rows: np.ndarray, states: list[InitialState]) -> None:
        for row, state in zip(rows, states, strict=True):
            self.each[row].reset(state)

    def step(self, actions: np.ndarray) -> Any:
        steps = zip(*(env.step(action) for env, action in zip(self.each, actions, strict=True)), strict=True)
        reward, terminated, truncated, success = (np.array(values) for values in steps)
        return reward, terminated, truncated, None if success[0] is None else success

    def observe(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        frames = [self.each[row].observe() for row in rows]
        return {name: np.stack([frame[name] for frame in frames]) for name in frames[0]}

    def close(self) -> None:
        for env in self.each:
            env.close()


def unhosted(make: Callable[[], Environment], num_envs: int, schedule: ResetSchedule) -> BatchedSimulator:
    return BatchedSimulator(OneByOne(make, num_envs), schedule)

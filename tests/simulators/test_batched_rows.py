"""A worker that steps its environments together gives what a worker gives that steps them one by one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from embodied_rl.simulators.base import WAIT, InitialState
from embodied_rl.simulators.workers import WorkerSimulator
from embodied_rl.types import ChunkResult, Observation


class Numbered:
    """Tickets are seeds; every third is of the second task."""

    def state(self, ticket: int) -> InitialState:
        return InitialState(ticket % 3 // 2, ticket, ticket)


def build(target: str, num_envs: int = 5, workers: int = 2) -> WorkerSimulator:
    return WorkerSimulator(target, {"longest": 7}, num_envs, workers, Numbered())


def plain(value: Any) -> Any:
    """Comparable copies of whatever a simulator returns."""
    if isinstance(value, Observation | ChunkResult):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("observe", ["last", "all"])
def test_together_equals_one_by_one(observe: Any) -> None:
    random = np.random.default_rng(0)
    with build("simulator_toys:Counter") as apart, build("batched_toys:CountersTogether") as together:
        tickets = np.array([3, 1, WAIT, 4, 15])
        assert plain(together.reset(tickets=tickets)) == plain(apart.reset(tickets=tickets))
        for chunk in range(12):
            actions = random.uniform(-1, 1, (5, 1 + chunk % 5, 2)).astype(np.float32)
            following = random.integers(0, 1000, 5)
            following[random.random(5) < 0.3] = WAIT
            a = plain(apart.step(actions, observe, following))
            b = plain(together.step(actions, observe, following))
            assert a == b, chunk
            if chunk % 4 == 3:
                rows = np.array([0, 2])
                again = np.array([100 + chunk, 200 + chunk])
                assert plain(together.reset(rows, again)) == plain(apart.reset(rows, again))

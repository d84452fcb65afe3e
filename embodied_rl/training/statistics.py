"""What a policy without demonstrations normalises states by: those that it meets before it is trained."""

from __future__ import annotations

from typing import Any

import numpy as np

from embodied_rl.data.demonstrations import mixture_statistics
from embodied_rl.errors import UserError
from embodied_rl.pipeline.executor import Collector
from embodied_rl.pipeline.rollout import RolloutWorker
from embodied_rl.pipeline.tickets import TicketList


def fit(worker: Collector, policy: Any, tickets: range) -> int:
    """Set the statistics of `policy` to those of the states before its decisions in the episodes `tickets`; returns the
    environment steps that took. Abandons what `worker` was doing. Raises `UserError` for a policy without statistics.
    """
    if not hasattr(policy, "set_statistics"):
        raise UserError(
            f"training.statistics_episodes does nothing for {type(policy).__name__}, which normalises no state: "
            f"leave it at 0"
        )
    parts, steps = zip(*worker.apart(policy, states, tickets), strict=True)
    found = np.concatenate(parts).astype(np.float64)
    policy.set_statistics(*mixture_statistics(found, found, 0.0))
    return sum(steps)


def states(worker: RolloutWorker, tickets: range) -> tuple[np.ndarray, int]:
    """(float32 [M,S], environment steps) of the episodes `tickets`, each run once by the policy as it explores."""
    worker.restart(TicketList(tickets))
    seen: list[np.ndarray] = [np.zeros((0, worker.policy.observation_spec.state), np.float32)]
    while worker.running:
        before = worker.connection.observation(worker.observation).state.copy()
        worker.begin()
        seen.append(before[worker.finish().result.valid.any(axis=1)])
    return np.concatenate(seen), worker.env_steps

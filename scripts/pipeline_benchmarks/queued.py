"""The same simulator and the same loop with central channels: actions go to the simulator's actor, what it observes
comes back, and segments go to the learner, through one `ray.util.queue` each, which is an actor of its own."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pipeline_benchmarks.simulated import Simulated

from embodied_rl.algorithms.base import Metrics
from embodied_rl.pipeline.transfer import pack, unpack
from embodied_rl.simulators.base import ResetSchedule, Simulator
from embodied_rl.simulators.chunk import BatchedSimulator
from embodied_rl.training.on_policy import SegmentWorkflow
from embodied_rl.types import ChunkResult, Observation

PATIENCE = 120.0
"""Seconds to wait for a message."""
_SHARE: dict[str, Any] = {"num_cpus": 0.01}
"""Of the machine that Ray reserves for an actor: all modes have theirs at once, and what does not fit is waited for."""


class Host:
    """The actor: one simulator, which does what the queue of orders says and puts the answers into the other."""

    def __init__(self, path: list[str]) -> None:
        sys.path += [folder for folder in path if folder not in sys.path]

    def serve(self, num_envs: int, seconds: float, schedule: ResetSchedule, orders: Any, answers: Any) -> None:
        with BatchedSimulator(Simulated(num_envs, seconds), schedule) as simulator:
            while (order := orders.get(timeout=PATIENCE)) is not None:
                method, arguments = order
                answers.put(getattr(simulator, method)(*arguments), timeout=PATIENCE)


class QueuedSimulator(Simulator):
    """The near side."""

    def __init__(self, num_envs: int, seconds: float, schedule: ResetSchedule) -> None:
        import ray
        from ray.util.queue import Queue

        known = Simulated(num_envs, seconds)
        self.num_envs = num_envs
        self.observation_spec, self.action_spec, self.tasks = known.observation_spec, known.action_spec, known.tasks
        self._orders, self._answers = Queue(actor_options=_SHARE), Queue(actor_options=_SHARE)
        decorate: Any = ray.remote(**_SHARE)
        self._host = decorate(Host).remote(sys.path)
        self._serving = self._host.serve.remote(num_envs, seconds, schedule, self._orders, self._answers)

    def reset(self, env_ids: np.ndarray | None = None, tickets: np.ndarray | None = None) -> Observation:
        self._orders.put(("reset", (env_ids, tickets)), timeout=PATIENCE)
        return self._answers.get(timeout=PATIENCE)

    def send(
        self, actions: np.ndarray, observe: Literal["last", "all"] = "last", next_tickets: np.ndarray | None = None
    ) -> None:
        self._orders.put(("step", (actions, observe, next_tickets)), timeout=PATIENCE)

    def receive(self) -> ChunkResult:
        return self._answers.get(timeout=PATIENCE)

    def close(self) -> None:
        import ray

        self._orders.put(None, timeout=PATIENCE)
        ray.get(self._serving, timeout=PATIENCE)
        ray.kill(self._host)
        self._orders.shutdown()
        self._answers.shutdown()


class QueuedWorkflow(SegmentWorkflow):
    """Learns from segments that come through a queue."""

    def __init__(self, *arguments: Any) -> None:
        from ray.util.queue import Queue

        super().__init__(*arguments)
        self._segments = Queue(actor_options=_SHARE)

    def collect(self) -> Any:
        """What stands for a segment that is on its way."""
        segment = super().collect()
        self._segments.put(pack(segment), timeout=PATIENCE)
        return replace(segment, inputs={}, trace={})

    def _improve(self, batch: Any) -> Metrics:
        return super()._improve(unpack(self._segments.get(timeout=PATIENCE)))

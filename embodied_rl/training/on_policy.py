"""The loops of algorithms that learn from what the current weights, or slightly older ones, collected."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import Any

import numpy as np
import torch

from embodied_rl.algorithms.base import EpisodicAlgorithm, Metrics, OnPolicyAlgorithm
from embodied_rl.errors import UserError
from embodied_rl.pipeline.episodes import in_order, selected
from embodied_rl.pipeline.executor import Collector
from embodied_rl.pipeline.learning import Beside, Replica
from embodied_rl.pipeline.tickets import TicketCounter
from embodied_rl.training.workflows import episode_metrics
from embodied_rl.types import EpisodeBatch, Trajectory


class OnPolicyWorkflow(ABC):
    """Collect a batch, learn from it, repeat.

    With a staleness of s a batch is learned from in a thread of its own, while the worker collects the s-th after it by
    the weights from before. Which weights collect which batch is fixed, so the numbers do not depend on who is faster
    and a run repeats. Before a border everything collected is learned from.
    """

    def __init__(
        self, worker: Collector, algorithm: OnPolicyAlgorithm | EpisodicAlgorithm, generator: torch.Generator
    ) -> None:
        if worker.intervene is not None:
            raise UserError("this algorithm learns from the policy's own choices alone: interventions need sac")
        self.worker = worker
        self.algorithm: Any = algorithm
        self.generator = generator
        self.version = 0
        self.waiting: deque[Trajectory | EpisodeBatch] = deque()
        self.replica = Replica(algorithm.policy) if algorithm.staleness else None

    @property
    def pending(self) -> int:
        return len(self.waiting)

    @abstractmethod
    def restart(self, tickets: TicketCounter) -> None:
        """Begin fresh episodes with tickets from `tickets`: at the start and after a border."""

    @abstractmethod
    def collect(self) -> Trajectory | EpisodeBatch:
        """A batch by the current weights."""

    def iterate(self, border: bool) -> Metrics:
        """Learn from a batch, or before a border from all that are left; the metrics are those of the last."""
        if not self.waiting:
            self.waiting.append(self.collect())
        if border or self.replica is None:
            metrics = self._learn(self.waiting.popleft())
        else:
            metrics = self._learn_beside(self.replica)
        while border and self.waiting:
            metrics |= self._learn(self.waiting.popleft())
        return metrics

    def _learn_beside(self, replica: Replica) -> Metrics:
        """Learn from the oldest batch while as many as the staleness allows are collected by the weights so far."""
        replica.follow()
        batch = self.waiting.popleft()
        self.worker.policy = replica.policy
        try:
            with Beside(lambda: self._improve(batch)) as learning:
                self.worker.check = learning.check
                while len(self.waiting) < self.algorithm.staleness:
                    self.waiting.append(self.collect())
                metrics = learning.result()
        finally:
            self.worker.policy, self.worker.check = self.algorithm.policy, lambda: None
        self.version += 1
        return metrics

    def _learn(self, batch: Trajectory | EpisodeBatch) -> Metrics:
        metrics = self._improve(batch)
        self.version += 1
        return metrics

    def _improve(self, batch: Trajectory | EpisodeBatch) -> Metrics:
        """The metrics of learning from `batch`, which the weights of this or of a recent version collected."""
        behind = self.version - batch.version
        if not 0 <= behind <= self.algorithm.staleness:
            raise RuntimeError(f"version {self.version} would learn from what version {batch.version} collected")
        metrics = episode_metrics(batch.episodes)
        metrics |= {f"loss/{name}": value for name, value in self.algorithm.learn(batch, self.generator).items()}
        return metrics | {"train/staleness": behind} if self.algorithm.staleness else metrics

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.version = state["version"]


class SegmentWorkflow(OnPolicyWorkflow):
    """Segments of a fixed number of decisions; episodes go on from one to the next."""

    def __init__(
        self, worker: Collector, algorithm: OnPolicyAlgorithm, decisions: int, generator: torch.Generator
    ) -> None:
        super().__init__(worker, algorithm, generator)
        self.decisions = decisions

    def restart(self, tickets: TicketCounter) -> None:
        self.worker.restart(tickets)

    def collect(self) -> Trajectory:
        return self.worker.collect(self.decisions, self.version)


class EpisodeWorkflow(OnPolicyWorkflow):
    """Groups of whole episodes: every one that is begun is run to its end in the same weights, rows without one wait.

    Groups that say nothing are replaced (`EpisodicAlgorithm.further_groups`): at least as many as are missing, and as
    many as the rows hold at once. Only decisions that are learned from are kept.
    """

    algorithm: EpisodicAlgorithm

    def restart(self, tickets: TicketCounter) -> None:
        if tickets.retry:
            raise UserError("training.retry_failed breaks groups of equal initial states: leave it at 0")
        self.tickets = tickets

    def collect(self) -> EpisodeBatch:
        algorithm = self.algorithm
        size, budget = algorithm.group_size, algorithm.further_groups
        missing = count = algorithm.groups_per_iteration
        parts: list[EpisodeBatch] = []
        while missing > 0 and count > 0:
            part = self.worker.collect_episodes(self.tickets.take(count * size), self.version)
            informative = algorithm.informative(part.episodes)
            parts.append(_only(part, informative))
            missing -= int(informative.sum()) // size
            count = min(budget, max(missing, self.worker.simulator.num_envs // size))
            budget -= count
        return parts[0] if len(parts) == 1 else in_order(parts)


def _only(batch: EpisodeBatch, chosen: np.ndarray) -> EpisodeBatch:
    """Without the decisions of the episodes that are not `chosen` (bool [E])."""
    if chosen.all():
        return batch
    tickets = [episode.ticket for episode, keep in zip(batch.episodes, chosen, strict=True) if keep]
    return selected(batch, torch.isin(batch.tickets, torch.tensor(tickets, dtype=torch.int64)))

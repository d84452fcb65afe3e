"""The contract of an algorithm: it owns its hyper-parameters, masks, granularity, losses and optimizers, receives a
typed batch and improves the policy.

Five families, one per workflow: `OnPolicyAlgorithm` learns from trajectory segments, `EpisodicAlgorithm` from groups of
whole episodes, `OffPolicyAlgorithm` from a replay buffer, `OfflineAlgorithm` from recorded decisions and their rewards,
`ImitationAlgorithm` from demonstrations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rl.algorithms.off_policy import OfflineConfig, OffPolicyConfig, Replay
from embodied_rl.errors import UserError
from embodied_rl.randomness import RowNoise
from embodied_rl.types import ActionSample, Episode, EpisodeBatch, Trajectory

if TYPE_CHECKING:
    from embodied_rl.algorithms.cotraining import CoTraining

Metrics = dict[str, float]


class Algorithm(ABC):
    """State that a checkpoint needs is in `modules()` (networks the algorithm owns besides the policy),
    `optimizers()` and `counters()`; the checkpoint saves and restores them by name."""

    policy: Any

    def modules(self) -> dict[str, nn.Module]:
        """Networks owned by the algorithm (critics, targets), by name."""
        return {}

    @abstractmethod
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Optimizers by name."""

    def cotrain(self, cotraining: CoTraining) -> None:
        """Add its loss to the actor's from now on, once in every step of the actor's optimizer. Raises `UserError` for
        an algorithm that does not do that."""
        raise UserError(
            f"{type(self).__name__} does not co-train: use ppo, grpo, sac or flow_actor_critic, or "
            f"set cotraining.beta to 0"
        )

    def counters(self) -> dict[str, float]:
        """Plain numbers to restore (update counts, adaptive coefficients)."""
        return {}

    def load_counters(self, counters: dict[str, float]) -> None:  # noqa: B027 - optional
        """Restore `counters()`."""


class OnPolicyAlgorithm(Algorithm):
    staleness: int = 0
    """Updates by which the weights that collected a segment may be behind."""

    @abstractmethod
    def learn(self, trajectory: Trajectory, generator: torch.Generator) -> Metrics:
        """Improve the policy from one segment; `generator` (CPU) is the only source of shuffling."""


class EpisodicAlgorithm(Algorithm):
    """Tickets g*G to g*G+G-1 are the group g: G episodes from one initial state (`GroupSchedule`)."""

    staleness: int = 0
    """Updates by which the weights that collected a batch may be behind."""
    group_size: int
    """G."""
    groups_per_iteration: int
    further_groups: int = 0
    """Groups that an iteration may collect in place of those that `informative` refuses."""

    def informative(self, episodes: Sequence[Episode]) -> np.ndarray:
        """bool [E]: which of these whole groups to learn from; the members of a group are all True or all False."""
        return np.ones(len(episodes), dtype=bool)

    @abstractmethod
    def learn(self, batch: EpisodeBatch, generator: torch.Generator) -> Metrics:
        """Improve the policy from whole groups; `generator` (CPU) is the only source of shuffling."""


class OffPolicyAlgorithm(Algorithm):
    config: OffPolicyConfig
    updates: int
    """Updates made."""
    warmup_updates: int = 0
    """Updates owed at once when learning starts."""
    exploration: float = 0.0
    """Standard deviation of Gaussian noise on executed chunks, in units of half the action range."""
    successes_kept: int = 20_000
    """How many recent decisions of successful episodes the replay tells from the others."""
    demonstrations: Literal["chunks", "decisions"] | None = None
    """What `draw` gets of the demonstrations: their chunks {"inputs", "actions" [M,H,A], "valid" [M,H]}, a `Replay` of
    their decisions, or nothing."""

    def act(self, inputs: dict[str, Tensor], noise: RowNoise) -> ActionSample:
        """How training episodes act (before exploration noise); evaluation acts by the policy alone."""
        return self.policy.act(inputs, deterministic=True, noise=noise)

    def recorded(self, sample: ActionSample) -> Tensor:
        """What the replay keeps of a decision: the executed actions [N,K,A], or [N,1,Z], one choice for the chunk."""
        return sample.actions

    @abstractmethod
    def draw(self, replay: Replay, demonstrations: Any, rng: np.random.Generator) -> dict[str, Any]:
        """The batch of the next `update`."""

    @abstractmethod
    def update(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """One gradient update from a replay batch; returns detached scalar tensors (no host synchronisation)."""


class OfflineAlgorithm(Algorithm):
    config: OfflineConfig
    updates: int
    """Updates made."""

    @abstractmethod
    def draw(self, replay: Replay, rng: np.random.Generator) -> dict[str, Any]:
        """The batch of the next `update`."""

    @abstractmethod
    def update(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """One gradient update; returns detached scalar tensors (no host synchronisation)."""


class ImitationAlgorithm(Algorithm):
    @abstractmethod
    def update(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """One gradient update from a batch {"inputs", "actions" [B,H,A], "valid" [B,H]}."""

"""Group-relative policy optimisation (arXiv 2402.03300) of policies that act in chunks, and its relatives.

There is no critic: an episode is compared with others that started from the same state. DAPO (arXiv 2503.14476) and
REINFORCE++ (arXiv 2501.03262) are other settings of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from embodied_rl.algorithms.advantages import (
    group_advantages,
    group_statistics,
    normalize,
    overlong_penalty,
    returns_to_go,
)
from embodied_rl.algorithms.base import EpisodicAlgorithm, Metrics
from embodied_rl.algorithms.policy_gradient import PolicyGradient, PolicyGradientConfig, episode_weights
from embodied_rl.errors import UserError
from embodied_rl.types import Episode, EpisodeBatch

UNIFORM = 1e-6
"""Scores of a group with a smaller standard deviation are equal but for rounding."""


@dataclass(frozen=True)
class GRPOConfig(PolicyGradientConfig):
    """Whole episodes in groups of equal initial states, without a critic."""

    group_size: int = 8
    """G, episodes from one initial state."""
    groups_per_iteration: int = 8
    score: Literal["return", "success"] = "return"
    """What an episode is judged by: its undiscounted return, or 1 when it ever succeeded and 0 otherwise."""
    advantage: Literal["grpo", "reinforce++", "reinforce++_baseline"] = "grpo"
    """"grpo": the score relative to its group. "reinforce++": the return from each decision on, normalised over the
    batch. "reinforce++_baseline": the score minus the group's mean, normalised over the batch."""
    normalize_std: bool = True
    """"grpo" divides by the standard deviation of the group; without it, Dr. GRPO."""
    gamma: float = 1.0
    """Discount per decision of "reinforce++"; the others do not discount."""
    drop_uniform: bool = False
    """Leave out groups whose scores are all equal: they say nothing."""
    keep_mean: tuple[float, float] | None = None
    """Leave out groups whose mean score is outside these bounds: too hard or too easy."""
    further_groups: int = 0
    """Groups that an iteration may collect in place of those left out (dynamic sampling)."""
    max_length: int | None = None
    """Steps at which an episode has the whole `overlong_penalty`; none penalises no length."""
    overlong_buffer: int = 16
    """Steps before `max_length` over which the penalty grows linearly."""
    overlong_penalty: float = 1.0
    """Taken from the score of an overlong episode."""
    mean_over: Literal["terms", "rows", "episodes"] = "episodes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2 and self.advantage != "reinforce++":
            raise UserError(f"grpo: group_size must be at least 2, not {self.group_size}: there is nothing to compare")
        if self.group_size < 1 or self.groups_per_iteration < 1 or self.further_groups < 0:
            raise UserError("grpo: group_size and groups_per_iteration must be at least 1, further_groups at least 0")
        if self.further_groups and not (self.drop_uniform or self.keep_mean):
            raise UserError("grpo: further_groups replaces groups left out: set drop_uniform or keep_mean, too")
        if self.keep_mean and self.keep_mean[0] > self.keep_mean[1]:
            raise UserError(f"grpo: keep_mean must be (lower, upper), not {self.keep_mean}")
        if not 0 < self.gamma <= 1 or self.overlong_buffer < 1:
            raise UserError("grpo: needs 0 < gamma <= 1 and overlong_buffer of at least 1")

    def build(self, policy: Any, seed: int) -> GRPO:
        """The algorithm on `policy`, which needs no value head; it has no randomness of its own."""
        return GRPO(self, policy)


@dataclass(frozen=True)
class DAPOConfig(GRPOConfig):
    """GRPO with clip-higher, equal weight of all ratios and dynamic sampling (arXiv 2503.14476); set `max_length` for
    the penalty of overlong episodes."""

    clip_high: float = 0.28
    mean_over: Literal["terms", "rows", "episodes"] = "terms"
    drop_uniform: bool = True
    further_groups: int = 16


@dataclass(frozen=True)
class ReinforcePlusPlusConfig(GRPOConfig):
    """REINFORCE++ (arXiv 2501.03262): one episode per initial state; --algorithm.advantage reinforce++_baseline with
    groups is its variant with a baseline."""

    group_size: int = 1
    groups_per_iteration: int = 64
    advantage: Literal["grpo", "reinforce++", "reinforce++_baseline"] = "reinforce++"
    mean_over: Literal["terms", "rows", "episodes"] = "terms"


class GRPO(PolicyGradient, EpisodicAlgorithm):
    def __init__(self, config: GRPOConfig, policy: Any) -> None:
        super().__init__(config, policy)
        self.group_size = config.group_size
        self.groups_per_iteration = config.groups_per_iteration
        self.further_groups = config.further_groups

    def informative(self, episodes: Sequence[Episode]) -> np.ndarray:
        score, group = self._scored(episodes)
        mean, std = group_statistics(score, group)
        keep = std > UNIFORM if self.config.drop_uniform else torch.ones_like(std, dtype=torch.bool)
        if self.config.keep_mean:
            lower, upper = self.config.keep_mean
            keep &= (lower <= mean) & (mean <= upper)
        return keep.numpy()

    def learn(self, batch: EpisodeBatch, generator: torch.Generator) -> Metrics:
        """Several epochs over the decisions of `batch`.

        Metrics: those of `PolicyGradient.policy_loss`, grad_norm (means over the updates made), score and score_std
        (within groups) of all episodes, groups, uniform_groups (share), decisions, updates. Raises `UserError` when one
        of them is not finite, leaving the policy as it was before that update.
        """
        score, group = self._scored(batch.episodes)
        _, std = group_statistics(score, group)
        data = {
            "inputs": batch.inputs,
            "trace": batch.trace,
            "log_prob": batch.log_prob,
            "valid": batch.valid,
            "advantages": self.advantages(batch).to(batch.log_prob),
            "weight": episode_weights(batch.valid, batch.tickets),
        }
        return self.improve(data, batch.version, generator) | {
            "score": float(score.mean()),
            "score_std": float(std.mean()),
            "groups": float(len(group.unique())),
            "uniform_groups": float((std <= UNIFORM).double().mean()),
        }

    def advantages(self, batch: EpisodeBatch) -> Tensor:
        """float64 [R], of each decision. Every statistic of a group is over all its episodes; those over the batch are
        over its decisions."""
        config = self.config
        score, group = self._scored(batch.episodes)
        length = torch.tensor([episode.length for episode in batch.episodes], dtype=torch.float64)
        if config.max_length is not None:
            score = score + overlong_penalty(length, config.max_length, config.overlong_buffer, config.overlong_penalty)
        row = _rows_of(batch)
        if config.advantage == "reinforce++":
            advantages = self._returns(batch, score, row)
        else:
            by_std = config.normalize_std and config.advantage == "grpo"
            advantages = group_advantages(score, group, by_std)[row]
        return advantages if config.advantage == "grpo" else normalize(advantages)

    def _returns(self, batch: EpisodeBatch, score: Tensor, row: Tensor) -> Tensor:
        """[R], the discounted return from each decision on. The rewards of an episode add up to its score: what is not
        paid on the way comes with the last decision."""
        paid = torch.where(batch.valid, batch.reward, 0.0).sum(1).double().cpu()
        if self.config.score == "success":
            paid = torch.zeros_like(paid)
        order = row.argsort(stable=True)
        count = row.bincount(minlength=len(score))
        begin = count.cumsum(0) - count
        column = torch.empty_like(row)
        column[order] = torch.arange(len(row)) - begin[row[order]]
        reward = torch.zeros(len(score), int(count.max().clamp(min=1)), dtype=torch.float64)
        reward[row, column] = paid
        present = count > 0
        reward[present, count[present] - 1] += (score - reward.sum(1))[present]
        return returns_to_go(reward, self.config.gamma)[row, column]

    def _scored(self, episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
        """(score float64 [E], group int64 [E])."""
        if self.config.score == "success" and any(episode.success_once is None for episode in episodes):
            raise UserError("grpo.score 'success' needs a task that defines success: use 'return'")
        by_return = self.config.score == "return"
        score = [episode.episode_return if by_return else float(bool(episode.success_once)) for episode in episodes]
        group = [episode.ticket // self.group_size for episode in episodes]
        return torch.tensor(score, dtype=torch.float64), torch.tensor(group)


def _rows_of(batch: EpisodeBatch) -> Tensor:
    """int64 [R], the index in `batch.episodes` of each decision's episode."""
    tickets = torch.tensor([episode.ticket for episode in batch.episodes])
    ascending, order = tickets.sort()
    return order[torch.searchsorted(ascending, batch.tickets.cpu())]

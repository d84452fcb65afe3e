"""Imitation: fit the policy to demonstrated action chunks (behaviour cloning, flow matching, whatever the policy's
own `imitation_loss` is)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from embodied_rl.algorithms.base import ImitationAlgorithm
from embodied_rl.algorithms.optimization import actor_parameters, adam, seed_policy_draws, step
from embodied_rl.errors import UserError

Schedule = Literal["cosine", "constant"]


@dataclass(frozen=True)
class ImitationConfig:
    """Cloning demonstrations."""

    learning_rate: float = 1e-3
    batch_size: int = 256
    """Chunks per update."""
    steps: int = 1000
    """Updates in all; the length of the schedule."""
    schedule: Schedule = "cosine"
    """"cosine" lowers the learning rate to 0 over `steps`."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UserError("imitation: steps and batch_size must be at least 1")

    def build(self, policy: Any, seed: int) -> Imitation:
        """The algorithm on `policy`; it has no randomness of its own."""
        return Imitation(self, policy)


class Imitation(ImitationAlgorithm):
    def __init__(self, config: ImitationConfig, policy: Any) -> None:
        self.config = config
        self.policy = policy
        self.optimizer = adam(actor_parameters(policy), config.learning_rate, config.weight_decay)
        self.updates = 0

    def update(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """One update from {"inputs", "actions" [B,H,A], "valid" bool [B,H]}; metrics "loss", "grad_norm"."""
        seed_policy_draws(generator, self.policy.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = mean_imitation_loss(self.policy, batch)
        norm = step(loss, self.optimizer, self.config.max_grad_norm)
        self.updates += 1
        return {"loss": loss.detach(), "grad_norm": norm}

    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return scheduled(self.config.learning_rate, self.config.schedule, self.updates / self.config.steps)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self.optimizer}

    def counters(self) -> dict[str, float]:
        return {"updates": self.updates}

    def load_counters(self, counters: dict[str, float]) -> None:
        self.updates = int(counters["updates"])


def take(data: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The rows [B] of chunks {"inputs", "actions" [M,H,A], "valid" [M,H]}."""
    return {
        "inputs": {name: column[rows] for name, column in data["inputs"].items()},
        "actions": data["actions"][rows],
        "valid": data["valid"][rows],
    }


def scheduled(learning_rate: float, schedule: Schedule, progress: float) -> float:
    """The learning rate after the share `progress` of all updates."""
    return learning_rate if schedule == "constant" else learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


def to_horizon(actions: Tensor, valid: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Chunks [B,K,A] and valid [B,K] as `imitation_loss` wants them, [B,H,A] and [B,H]: what is missing does not
    count."""
    missing = horizon - actions.shape[1]
    return F.pad(actions, (0, 0, 0, missing)), F.pad(valid, (0, missing))


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The rows of both."""
    return {
        name: join(column, second[name]) if isinstance(column, dict) else torch.cat([column, second[name]])
        for name, column in first.items()
    }


def mean_imitation_loss(policy: Any, batch: dict[str, Any], weight: Tensor | None = None) -> Tensor:
    """Mean of `policy.imitation_loss`, times `weight` [B], over the rows that have a valid step; 0 when none has."""
    loss = policy.imitation_loss(batch["inputs"], batch["actions"], batch["valid"])
    if weight is not None:
        loss = weight * loss
    counted = batch["valid"].any(dim=1)
    return torch.where(counted, loss, 0.0).sum() / counted.sum().clamp(min=1)

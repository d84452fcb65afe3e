"""What off-policy and offline algorithms share: the settings of their loops, and what a batch of replayed decisions is
worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from embodied_rl.algorithms.advantages import chunk_return
from embodied_rl.errors import UserError

GammaPer = Literal["decision", "step"]


@dataclass(frozen=True)
class TransitionConfig:
    """What a decision is worth."""

    batch_size: int = 256
    """Decisions per update."""
    gamma: float = 0.99
    gamma_per: GammaPer | None = None
    """"decision" discounts every chunk by gamma, "step" by gamma^executed steps (and within the chunk). Chunks of one
    action need no choice."""
    reward_scale: float = 1.0
    shaping: float = 0.0
    """Weight of potential-based shaping: reward + discount * potential(next) - potential, with potential 0 after
    termination, so that the best policy stays the same (Ng, Harada and Russell, ICML 1999). Success is then the reward
    and the environment's dense reward the potential; with 0 the environment's reward is learned from as it is."""

    def require(self, name: str) -> None:
        """Raise `UserError`, saying that it is about algorithm `name`, for values that make no sense."""
        if self.batch_size < 1:
            raise UserError(f"{name}: batch_size must be at least 1, not {self.batch_size}")
        if not 0 < self.gamma <= 1:
            raise UserError(f"{name}: gamma must be above 0 and at most 1, not {self.gamma}")

    def require_discount(self, name: str, chunk: int) -> None:
        """Raise `UserError` when chunks of `chunk` actions leave open what gamma discounts."""
        if self.gamma_per is None and chunk > 1:
            raise UserError(f"{name}: a chunk has {chunk} actions: choose gamma_per, 'decision' or 'step'")


@dataclass(frozen=True)
class OffPolicyConfig(TransitionConfig):
    """Replay, and how much is learned from it."""

    replay_capacity: int = 200_000
    """Decisions kept."""
    replay_on_disk: bool = False
    """Keep them in memory-mapped files in the run's folder, which may be larger than memory; checkpoints copy these."""
    learning_starts: int = 1000
    """Environment steps collected before the first update."""
    updates_per_decision: float = 1.0
    """Updates per decision of one environment."""

    def require(self, name: str) -> None:
        super().require(name)
        if self.replay_capacity < self.batch_size:
            raise UserError(f"{name}: replay_capacity {self.replay_capacity} is below batch_size {self.batch_size}")
        if self.updates_per_decision <= 0:
            raise UserError(f"{name}: updates_per_decision must be above 0, not {self.updates_per_decision}")


@dataclass(frozen=True)
class OfflineConfig(TransitionConfig):
    """Learning from recorded decisions alone."""

    steps: int = 100_000
    """Updates in all."""
    updates_per_iteration: int = 1000

    def require(self, name: str) -> None:
        super().require(name)
        for count in ("steps", "updates_per_iteration"):
            if getattr(self, count) < 1:
                raise UserError(f"{name}: {count} must be at least 1, not {getattr(self, count)}")


class Replay(Protocol):
    """What an algorithm asks of a replay buffer, `embodied_rl.data.replay_buffer.ReplayBuffer`."""

    def sample(self, batch: int, generator: np.random.Generator, decisions: int = 1) -> dict[str, Any]:
        """Decisions, each with what followed during `decisions` of them."""
        ...

    def sample_successful(self, batch: int, generator: np.random.Generator) -> dict[str, Any]:
        """Chunks of successful episodes."""
        ...

    @property
    def successful(self) -> int:
        """Decisions that `sample_successful` draws from."""
        ...


def n_step_return(reward: Tensor, valid: Tensor, gamma: float, gamma_per: GammaPer) -> tuple[Tensor, Tensor]:
    """What n successive decisions earned, and how the value after them is discounted.

    `reward`, `valid` [B,n,K] -> return [B], discount [B]; a decision without a valid step was not made and neither
    earns nor discounts. n = 1 is `chunk_return`.
    """
    if reward.shape[1] == 1:
        return chunk_return(reward[:, 0], valid[:, 0], gamma, gamma_per)
    earned, discount = chunk_return(reward, valid, gamma, gamma_per)
    discount = torch.where(valid.any(-1), discount, 1.0)
    before = torch.cat([torch.ones_like(discount[:, :1]), discount[:, :-1].cumprod(1)], 1)
    return (before * earned).sum(1), discount.prod(1)


def transitions(replay: dict[str, Any], config: TransitionConfig, device: torch.device) -> dict[str, Any]:
    """What critics learn from, on `device`: "inputs", "next_inputs", "actions" [B,L,A], "valid" [B,L] (of the first
    decision), "reward" [B] (scaled and shaped) and "discount" [B] (0 when terminated), from a sample of a `Replay`."""
    names = ("inputs", "next_inputs", "actions", "valid", "reward", "terminated", "potential", "next_potential")
    data = {name: to_device(replay[name], device) for name in names}
    earned, discount = n_step_return(data["reward"], data["valid"], config.gamma, config.gamma_per or "decision")
    discount = torch.where(data.pop("terminated"), 0.0, discount)
    before, after = data.pop("potential"), data.pop("next_potential")
    reward = config.reward_scale * earned
    if config.shaping:
        reward = reward + config.shaping * (discount * after - before)
    valid = data["valid"][:, 0, : data["actions"].shape[1]]
    return data | {"valid": valid, "reward": reward, "discount": discount}


def interleave(first: Any, second: Any) -> Any:
    """Rows of two equally long batches, taking turns: those of `first` at even places."""
    if isinstance(first, dict):
        return {name: interleave(first[name], second[name]) for name in first}
    return torch.stack([first, second], 1).flatten(0, 1)


def to_device(data: Any, device: torch.device) -> Any:
    """Tensors on `device` from numpy arrays or tensors, alone or in dicts."""
    if isinstance(data, dict):
        return {name: to_device(value, device) for name, value in data.items()}
    return torch.as_tensor(data, device=device)

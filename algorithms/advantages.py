"""Returns and advantages, as pure functions of tensors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def chunk_return(
    reward: Tensor, valid: Tensor, gamma: float, gamma_per: Literal["decision", "step"]
) -> tuple[Tensor, Tensor]:
    """What a decision earned and how the value after it is discounted.

    `reward`, `valid` [...,K] -> return [...], discount [...]. "decision": the plain sum, gamma. "step":
    sum_k gamma^k r_k, gamma^(executed steps). Rewards of invalid steps do not count.
    """
    reward = torch.where(valid, reward, 0.0)
    if gamma_per == "decision":
        return reward.sum(-1), torch.full_like(reward[..., 0], gamma)
    powers = gamma ** torch.arange(reward.shape[-1], device=reward.device, dtype=reward.dtype)
    return (reward * powers).sum(-1), gamma ** valid.sum(-1).to(reward.dtype)

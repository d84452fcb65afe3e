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


def gae(
    reward: Tensor,
    value: Tensor,
    last_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    final_value: Tensor,
    discount: Tensor,
    gae_lambda: float,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438): (advantages, returns) [T,N].

    All [T,N] but `last_value` [N], the value after the last decision. With d_t = `discount`, which differs per decision
    when chunks differ in length:

        V'_t = 0 if terminated (also when truncated at once), final_value_t if truncated, else value_{t+1}
        A_t  = r_t + d_t V'_t - value_t + d_t lambda A_{t+1}, the last term only within an episode
        returns = A + value

    A decision whose `valid` is False passes nothing on to the one before it; its own entries mean nothing.
    """
    following = torch.cat([value[1:], last_value[None]])
    following = torch.where(truncated, final_value, following).masked_fill(terminated, 0.0)
    delta = reward + discount * following - value
    decay = (discount * gae_lambda).masked_fill(terminated | truncated, 0.0)
    if valid is not None:
        delta = torch.where(valid, delta, 0.0)
        decay = torch.where(valid, decay, 0.0)
    advantages = torch.empty_like(delta)
    running = torch.zeros_like(last_value)
    for t in reversed(range(len(delta))):
        running = delta[t] + decay[t] * running
        advantages[t] = running
    return advantages, advantages + value


def gae_tokens(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """GAE over the tokens of one sequence per row: (advantages, returns) [S,L], 0 after the last token.

    Tokens where `mask` [S,L] is False are skipped: the value and the advantage of the next real token stand in for
    theirs.
    """
    advantages = torch.empty_like(value)
    following = running = torch.zeros_like(value[:, 0])
    for t in reversed(range(value.shape[1])):
        delta = reward[:, t] + gamma * following - value[:, t]
        running = torch.where(mask[:, t], delta + gamma * gae_lambda * running, running)
        following = torch.where(mask[:, t], value[:, t], following)
        advantages[:, t] = running
    return advantages, advantages + value


def group_advantages(score: Tensor, group: Tensor, by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """(s - mean) / (std + eps) [E] with the mean and the unbiased std of the episode's own `group` (integers [E]):
    GRPO (arXiv 2402.03300); without `by_std` only s - mean (Dr. GRPO, arXiv 2503.20783). A group of one gets 0."""
    mean, std = group_statistics(score, group)
    return (score - mean) / (std + eps) if by_std else score - mean


def group_statistics(score: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, unbiased std) [E] of `score` [E] within each member's `group` [E]."""
    index, count = group.unique(return_inverse=True, return_counts=True)[1:]
    count = count.to(score.dtype)

    def total(x: Tensor) -> Tensor:
        return torch.zeros_like(count).index_add(0, index, x)

    mean = (total(score) / count)[index]
    variance = total((score - mean).square()) / (count - 1).clamp(min=1)
    return mean, variance.sqrt()[index]


def returns_to_go(reward: Tensor, gamma: float) -> Tensor:
    """sum over t' >= t of gamma^(t' - t) r_t' of each row of `reward` [S,L], which is 0 after its end."""
    returns = torch.empty_like(reward)
    running = torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        running = reward[:, t] + gamma * running
        returns[:, t] = running
    return returns


def overlong_penalty(length: Tensor, limit: int, buffer: int, penalty: float) -> Tensor:
    """DAPO's penalty of long episodes (arXiv 2503.14476): 0 up to `limit` - `buffer` steps, then falling linearly, to
    -`penalty` at `limit`."""
    return -penalty * ((length - (limit - buffer)) / buffer).clamp(min=0)


def normalize(x: Tensor, mask: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """(x - mean) / (std + eps), mean and unbiased std over the entries where `mask` is True, applied to all."""
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    count = mask.sum()
    mean = torch.where(mask, x, 0.0).sum() / count.clamp(min=1)
    variance = torch.where(mask, x - mean, 0.0).square().sum() / (count - 1).clamp(min=1)
    return (x - mean) / (variance.sqrt() + eps)


def explained_variance(value: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - value) / Var(returns) []: 1 for a perfect critic, 0 for a constant one; 0 when the returns
    do not vary."""
    variance = returns.var(correction=0)
    explained = 1 - (returns - value).var(correction=0) / variance
    return torch.where(variance > 0, explained, 0.0)

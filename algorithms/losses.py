"""Losses, as pure functions of tensors.

Elementwise functions return one number per ratio; `aggregate` makes a loss of them. Masked entries never get a
gradient, whatever they hold; where a mask may be None, that is one of True everywhere and spares the time of masking.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Granularity = Literal["token", "action", "chunk"]


def term_mask(valid: Tensor, term_step: Tensor, log_prob_mask: Tensor | None = None) -> Tensor:
    """bool [B,L]: which log-prob terms count. A term counts when its action does (`valid` bool [B,K]); terms of the
    whole chunk (`term_step` [L] or [B,L] is -1) count in every row with a valid action."""
    steps = term_step.expand(len(valid), -1)
    mask = torch.where(steps < 0, valid.any(1, keepdim=True), valid.gather(1, steps.clamp(min=0)))
    return mask if log_prob_mask is None else mask & log_prob_mask


def segment_sums(
    terms: Tensor, mask: Tensor | None, term_step: Tensor, steps: int, granularity: Granularity
) -> tuple[Tensor, Tensor | None]:
    """Sum the terms [B,L] that share a probability ratio: (sums, mask), each [B,L], [B,steps] or [B,1] for "token",
    "action" and "chunk". Masked terms add nothing; a sum without any term is masked. "action" needs `term_step` >= 0.
    """
    terms = _kept(terms, mask)
    if granularity == "token":
        return terms, mask
    if granularity == "chunk":
        return terms.sum(1, keepdim=True), None if mask is None else mask.any(1, keepdim=True)
    index = term_step.expand(len(terms), -1)
    sums = terms.new_zeros(len(terms), steps).scatter_add(1, index, terms)
    mask = torch.ones_like(terms, dtype=torch.bool) if mask is None else mask
    counts = terms.new_zeros(len(terms), steps).scatter_add(1, index, mask.to(terms.dtype))
    return sums, counts > 0


def aggregate(
    x: Tensor, mask: Tensor | None, over: Literal["terms", "rows"] = "terms", weight: Tensor | None = None
) -> Tensor:
    """Masked mean []: "terms" weighs every True entry of `mask` [B,M] alike, "rows" every row that has one, or by its
    `weight` [B]. 0 when nothing is True."""
    if mask is None:
        if over == "terms" or weight is None:
            return x.mean()
        mask = torch.ones_like(x, dtype=torch.bool)
    x = _kept(x, mask)
    if over == "terms":
        return x.sum() / mask.sum().clamp(min=1)
    per_row = x.sum(1) / mask.sum(1).clamp(min=1)
    weight = torch.where(mask.any(1), 1.0 if weight is None else weight, 0.0)
    return (per_row * weight).sum() / weight.sum().clamp(min=torch.finfo(x.dtype).tiny)


def policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate of PPO (arXiv 1707.06347): (loss, clipped) with the shape of `log_prob`.

        rho  = exp(log_prob - old_log_prob)
        loss = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), at most dual_clip * |A| where A < 0

    `clipped` is True where the first bound cuts the gradient. Clip-higher: arXiv 2503.14476; dual clip (> 1):
    arXiv 1912.09729. `advantages` broadcasts.
    """
    ratio = _kept(log_prob - old_log_prob, mask).exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, bounded)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    clipped = bounded > plain
    return loss, clipped if mask is None else clipped & mask


def importance_weight(proximal: Tensor, behavior: Tensor, mask: Tensor | None, limit: float) -> Tensor:
    """Weights of the decoupled objective of asynchronous PPO (arXiv 2505.24298), with the shape of the log-probs:

        w = exp(proximal - behavior), 0 where masked or w > limit

    `behavior` are the log-probs of the weights that acted, `proximal` those of the weights around which is clipped. The
    loss keeps the denominator it has without weights, so what is dropped does not make the rest count more.
    """
    weight = _kept(proximal - behavior, mask).exp()
    kept = weight <= limit
    return torch.where(kept if mask is None else kept & mask, weight, 0.0)


def interpolate(behavior: Tensor, log_prob: Tensor, lag: int) -> Tensor:
    """Log-probs of the weights at the start of an update, between those of the weights that acted `lag` >= 0 updates
    earlier and the current ones, as if every update had moved them alike:

        behavior + lag / (lag + 1) * (log_prob - behavior)
    """
    return torch.lerp(behavior, log_prob, lag / (lag + 1))


def value_loss(
    value: Tensor,
    old_value: Tensor,
    returns: Tensor,
    clip: float | None = None,
    huber_delta: float | None = None,
) -> Tensor:
    """Elementwise error of the critic: (V - R)^2 / 2, or Huber's function of V - R, quadratic up to `huber_delta`.
    With `clip`, the larger of this and the same for V limited to `old_value` +- clip."""

    def error(prediction: Tensor) -> Tensor:
        if huber_delta is None:
            return 0.5 * (prediction - returns).square()
        return F.huber_loss(prediction, returns, reduction="none", delta=huber_delta)

    loss = error(value)
    if clip is None:
        return loss
    return torch.maximum(loss, error(old_value + (value - old_value).clamp(-clip, clip)))


def kl_estimate(log_prob: Tensor, ref_log_prob: Tensor, kind: Literal["k1", "abs", "k2", "k3"]) -> Tensor:
    """Elementwise estimate of KL(p || ref) from samples of p, whose log-probs these are.

        k1 = d, abs = |d|, k2 = d^2 / 2, k3 = exp(-d) - 1 + d with d = log_prob - ref_log_prob

    k3 (http://joschu.net/blog/kl-approx.html) is unbiased and never negative; d is limited to +-20, the result to 10.
    """
    difference = log_prob - ref_log_prob
    if kind == "k1":
        return difference
    if kind == "abs":
        return difference.abs()
    if kind == "k2":
        return 0.5 * difference.square()
    difference = difference.clamp(-20, 20)
    return (torch.exp(-difference) - 1 + difference).clamp(max=10)


def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    """Elementwise |expectile - 1(error < 0)| error^2 of error = target - prediction: least for the `expectile`, in
    (0, 1), of the targets, which is their mean at 0.5 and nearly their maximum at 1 (arXiv 2110.06169, equation 5)."""
    return (expectile - (error < 0).to(error.dtype)).abs() * error.square()


def advantage_weight(advantages: Tensor, inverse_temperature: float, limit: float) -> Tensor:
    """Elementwise min(exp(inverse_temperature * A), limit), without a gradient: how much to imitate an action (arXiv
    1910.00177, equation 3)."""
    return (inverse_temperature * advantages.detach()).exp().clamp(max=limit)


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0.0)

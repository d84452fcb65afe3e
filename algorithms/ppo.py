"""Proximal policy optimisation (arXiv 1707.06347) of policies that act in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from embodied_rl.algorithms.advantages import chunk_return, explained_variance, gae, normalize
from embodied_rl.algorithms.base import Metrics, OnPolicyAlgorithm
from embodied_rl.algorithms.losses import (
    Granularity,
    aggregate,
    kl_estimate,
    policy_loss,
    segment_sums,
    term_mask,
    value_loss,
)
from embodied_rl.algorithms.optimization import actor_parameters, adam, apply, backward, read_finite, seed_policy_draws
from embodied_rl.errors import UserError
from embodied_rl.types import Score, Trajectory

Batch = dict[str, Any]


@dataclass(frozen=True)
class PPOConfig:
    """PPO with an advantage per decision."""

    learning_rate: float = 1e-4
    value_learning_rate: float = 1e-3
    gamma: float = 0.97
    gamma_per: Literal["decision", "step"] = "decision"
    """"decision" discounts every chunk by gamma, "step" by gamma^executed steps (and within the chunk)."""
    gae_lambda: float = 0.95
    """Per decision."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    """Above 1: the loss of a bad action is at most this many times its advantage."""
    value_clip: float | None = None
    huber_delta: float | None = None
    """None = squared error."""
    value_coefficient: float = 0.5
    entropy_coefficient: float = 0.0
    granularity: Granularity = "chunk"
    """What has a probability ratio of its own: the chunk, each action, or each log-prob term."""
    mean_over: Literal["terms", "rows"] = "terms"
    """"terms" weighs all ratios alike, "rows" all decisions."""
    normalize_advantages: bool = True
    """Over all valid decisions of the segment."""
    epochs: int = 5
    minibatches: int = 4
    """Per epoch."""
    max_grad_norm: float = 1.0
    """Of each optimizer's own parameters."""
    target_kl: float | None = None
    """Stop learning from a segment when a minibatch shows a larger approximate KL."""
    critic_warmup: int = 2
    """First iterations, which train the critic alone."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.minibatches < 1:
            raise UserError("ppo: epochs and minibatches must be at least 1")
        if not (0 < self.gamma <= 1 and 0 <= self.gae_lambda <= 1):
            raise UserError(f"ppo: needs 0 < gamma <= 1 and 0 <= gae_lambda <= 1, not {self.gamma}, {self.gae_lambda}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"ppo: dual_clip must be above 1, not {self.dual_clip}; leave it out to switch it off")

    def build(self, policy: Any, seed: int) -> PPO:
        """The algorithm on `policy`; it has no randomness of its own."""
        return PPO(self, policy)


class PPO(OnPolicyAlgorithm):
    def __init__(self, config: PPOConfig, policy: Any) -> None:
        self.config = config
        self.policy = policy
        self.policy_optimizer = adam(actor_parameters(policy), config.learning_rate)
        self.value_optimizer = adam(policy.parameter_groups()["value"], config.value_learning_rate)
        self.iterations = 0
        self.updates = 0

    def learn(self, trajectory: Trajectory, generator: torch.Generator) -> Metrics:
        """Several epochs over the decisions of `trajectory` that have a valid step.

        Metrics: policy_loss, value_loss, approx_kl, clip_fraction, entropy, grad_norm, value_grad_norm (means over the
        updates made), explained_variance, value, return, decisions, updates. Raises `UserError` when one of them is not
        finite, leaving the policy as it was before that update.
        """
        self.iterations += 1
        train_policy = self.iterations > self.config.critic_warmup
        data = self.prepare(trajectory)
        rows = len(data["value"])
        if rows == 0:
            return {"decisions": 0.0, "updates": 0.0}
        seed_policy_draws(generator, self.policy.device)
        history: list[Metrics] = []
        for index in self._minibatches(rows, generator):
            metrics = self._update(select(data, index.to(data["value"].device)), train_policy)
            if metrics is None:
                break
            history.append(metrics)
        means = {name: sum(metrics[name] for metrics in history) / len(history) for name in (history or [{}])[0]}
        summary = {
            "explained_variance": explained_variance(data["value"], data["returns"]),
            "value": data["value"].mean(),
            "return": data["returns"].mean(),
        }
        return means | read_finite(summary, self.updates) | {"decisions": float(rows), "updates": float(len(history))}

    @torch.no_grad()
    def prepare(self, trajectory: Trajectory) -> Batch:
        """One row per valid decision: inputs, trace, log_prob [R,L], valid [R,K], value, returns, advantages [R]."""
        config, valid = self.config, trajectory.valid
        decided = valid.any(-1)
        reward, discount = chunk_return(trajectory.reward, valid, config.gamma, config.gamma_per)
        advantages, returns = gae(
            reward,
            trajectory.value,
            trajectory.last_value,
            (trajectory.terminated & valid).any(-1),
            (trajectory.truncated & valid).any(-1),
            trajectory.final_value,
            discount,
            config.gae_lambda,
            decided,
        )
        if config.normalize_advantages:
            advantages = normalize(advantages, decided)
        data = {
            "inputs": trajectory.inputs,
            "trace": trajectory.trace,
            "log_prob": trajectory.log_prob,
            "valid": valid,
            "value": trajectory.value,
            "returns": returns,
            "advantages": advantages,
        }
        flat = tree_map(data, lambda tensor: tensor.flatten(0, 1))
        if decided.all():
            return flat
        return select(flat, decided.flatten().nonzero().squeeze(1))

    def _minibatches(self, rows: int, generator: torch.Generator) -> Any:
        """Row indices of every minibatch of every epoch, each epoch in a fresh order."""
        for _ in range(self.config.epochs):
            order = torch.randperm(rows, generator=generator)
            yield from order.tensor_split(min(self.config.minibatches, rows))

    def _update(self, batch: Batch, train_policy: bool) -> Metrics | None:
        """One minibatch; None, and nothing changed, when the policy has moved too far."""
        config = self.config
        score = self.policy.evaluate_actions(batch["inputs"], batch["trace"]) if train_policy else None
        value = None if score is None else score.value
        if value is None:
            value = self.policy.value(batch["inputs"])
        error = value_loss(value, batch["value"], batch["returns"], config.value_clip, config.huber_delta)
        metrics = {"value_loss": error.mean()}
        loss = config.value_coefficient * metrics["value_loss"]
        optimizers = {"value_grad_norm": self.value_optimizer}
        if score is not None:
            surrogate, metrics_of_policy = self._policy_loss(batch, score)
            loss, metrics = loss + surrogate, metrics | metrics_of_policy
            optimizers = {"grad_norm": self.policy_optimizer} | optimizers
        norms = backward(loss, optimizers)
        values = read_finite(metrics | norms, self.updates)
        if config.target_kl is not None and values.get("approx_kl", 0.0) > config.target_kl:
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            return None
        apply(optimizers, norms, config.max_grad_norm)
        self.updates += 1
        return values

    def _policy_loss(self, batch: Batch, score: Score) -> tuple[Tensor, dict[str, Tensor]]:
        config, valid = self.config, batch["valid"]
        if config.granularity == "action" and bool((score.term_step < 0).any()):
            raise UserError(
                f"ppo.granularity 'action' needs log-prob terms per action, but {type(self.policy).__name__} scores "
                f"the whole chunk: use 'chunk'"
            )
        terms = term_mask(valid, score.term_step, score.log_prob_mask)

        def sums(x: Tensor) -> tuple[Tensor, Tensor]:
            return segment_sums(x, terms, score.term_step, valid.shape[1], config.granularity)

        log_prob, mask = sums(score.log_prob)
        old_log_prob, _ = sums(batch["log_prob"])
        advantages = batch["advantages"][:, None]
        losses, clipped = policy_loss(
            log_prob, old_log_prob, advantages, mask, config.clip_low, config.clip_high, config.dual_clip
        )
        loss = aggregate(losses, mask, config.mean_over)
        entropy = aggregate(sums(score.entropy)[0], mask, config.mean_over)
        metrics = {
            "policy_loss": loss,
            "approx_kl": aggregate(kl_estimate(old_log_prob, log_prob.detach(), "k3"), mask),
            "clip_fraction": aggregate(clipped.float(), mask),
            "entropy": entropy,
        }
        return loss - config.entropy_coefficient * entropy, metrics

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self.policy_optimizer, "value": self.value_optimizer}

    def counters(self) -> dict[str, float]:
        return {"iterations": self.iterations, "updates": self.updates}

    def load_counters(self, counters: dict[str, float]) -> None:
        self.iterations, self.updates = int(counters["iterations"]), int(counters["updates"])


def tree_map(data: Any, function: Any) -> Any:
    """Apply `function` to every tensor in nested dicts."""
    if isinstance(data, dict):
        return {name: tree_map(value, function) for name, value in data.items()}
    return function(data)


def select(data: Batch, index: Tensor) -> Batch:
    """The rows `index` of every tensor."""
    return tree_map(data, lambda tensor: tensor[index])

"""Proximal policy optimisation (arXiv 1707.06347) of policies that act in chunks; asynchronous with `staleness`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from embodied_rl.algorithms.advantages import chunk_return, explained_variance, gae, normalize
from embodied_rl.algorithms.base import Metrics, OnPolicyAlgorithm
from embodied_rl.algorithms.losses import value_loss
from embodied_rl.algorithms.optimization import Optimizers, adam, read_finite
from embodied_rl.algorithms.policy_gradient import (
    Batch,
    PolicyGradient,
    PolicyGradientConfig,
    episode_weights,
    select,
    tree_map,
)
from embodied_rl.errors import UserError
from embodied_rl.types import Trajectory


@dataclass(frozen=True)
class PPOConfig(PolicyGradientConfig):
    """PPO with an advantage per decision."""

    value_learning_rate: float = 1e-3
    gamma: float = 0.97
    gamma_per: Literal["decision", "step"] = "decision"
    """"decision" discounts every chunk by gamma, "step" by gamma^executed steps (and within the chunk)."""
    gae_lambda: float = 0.95
    """Per decision."""
    reward_scale: float = 1.0
    """Multiplies every reward: a critic learns best when returns are about 1."""
    value_clip: float | None = None
    huber_delta: float | None = None
    """None = squared error."""
    value_coefficient: float = 0.5
    normalize_advantages: bool = True
    """Over all valid decisions of the segment."""
    critic_warmup: int = 2
    """First iterations, which train the critic alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.gamma <= 1 and 0 <= self.gae_lambda <= 1):
            raise UserError(f"ppo: needs 0 < gamma <= 1 and 0 <= gae_lambda <= 1, not {self.gamma}, {self.gae_lambda}")

    def build(self, policy: Any, seed: int) -> PPO:
        """The algorithm on `policy`; it has no randomness of its own. Raises `UserError` without a value head."""
        return PPO(self, policy)


class PPO(PolicyGradient, OnPolicyAlgorithm):
    def __init__(self, config: PPOConfig, policy: Any) -> None:
        super().__init__(config, policy)
        value = policy.parameter_groups().get("value", [])
        if not value:
            raise UserError(f"ppo needs a value head, which {type(policy).__name__} has not: use grpo")
        self.value_optimizer = adam(value, config.value_learning_rate, beta2=config.adam_beta2)

    def learn(self, trajectory: Trajectory, generator: torch.Generator) -> Metrics:
        """Several epochs over the decisions of `trajectory` that have a valid step.

        Metrics: policy_loss, value_loss, approx_kl, clip_fraction, entropy, grad_norm, value_grad_norm (means over the
        updates made), explained_variance, value, return, decisions, updates. Raises `UserError` when one of them is not
        finite, leaving the policy as it was before that update.
        """
        data = self.prepare(trajectory)
        metrics = self.improve(data, trajectory.version, generator)
        if not metrics["decisions"]:
            return metrics
        summary = {
            "explained_variance": explained_variance(data["value"], data["returns"]),
            "value": data["value"].mean(),
            "return": data["returns"].mean(),
        }
        return metrics | read_finite(summary, self.updates)

    @torch.no_grad()
    def prepare(self, trajectory: Trajectory) -> Batch:
        """One row per valid decision: inputs, trace, log_prob [R,L], valid [R,K], value, returns, advantages, weight
        [R]."""
        config, valid = self.config, trajectory.valid
        decided = valid.any(-1)
        reward, discount = chunk_return(config.reward_scale * trajectory.reward, valid, config.gamma, config.gamma_per)
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
        weight = episode_weights(valid.flatten(0, 1), trajectory.tickets.flatten())
        data = {
            "inputs": trajectory.inputs,
            "trace": trajectory.trace,
            "log_prob": trajectory.log_prob,
            "valid": valid,
            "value": trajectory.value,
            "returns": returns,
            "advantages": advantages,
            "weight": weight.view_as(advantages),
        }
        flat = tree_map(data, lambda tensor: tensor.flatten(0, 1))
        if decided.all():
            return flat
        return select(flat, decided.flatten().nonzero().squeeze(1))

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Optimizers]:
        """The critic's error, and the policy's loss unless the critic still warms up."""
        config = self.config
        warm = self.iterations > config.critic_warmup
        score = self.policy.evaluate_actions(batch["inputs"], batch["trace"]) if warm else None
        value = None if score is None else score.value
        if value is None:
            value = self.policy.value(batch["inputs"])
        errors = value_loss(value, batch["value"], batch["returns"], config.value_clip, config.huber_delta)
        error = errors.mean()
        if "row_share" in batch:
            error = batch["row_share"] * error
        loss, metrics = config.value_coefficient * error, {"value_loss": error}
        optimizers: Optimizers = {"value_grad_norm": self.value_optimizer}
        if score is not None:
            surrogate, metrics_of_policy = self.policy_loss(batch, score)
            loss, metrics = loss + surrogate, metrics | metrics_of_policy
            optimizers = {"grad_norm": self.policy_optimizer, **optimizers}
        return loss, metrics, optimizers

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return super().optimizers() | {"value": self.value_optimizer}

"""Soft actor-critic (arXiv 1812.05905) of policies that act in chunks, and what differs from it by configuration alone:
CrossQ (arXiv 1902.05605), RLPD (arXiv 2302.02948) and DSRL (arXiv 2506.15799).

    RLPD    SACConfig(critics=10, target_critics=2, critic_norm="layer", actor_q="mean", symmetric=True,
                      updates_per_decision=20, actor_every=20, entropy_backup=False)
    CrossQ  SACConfig(critic_norm="batch_renorm", actor_norm="batch_renorm", tau=None, critic_hidden=(2048, 2048),
                      actor_every=3, adam_beta1=0.5)
    DSRL    SACConfig(steer="chunk", actor_q="mean") on a flow policy that stays as it is

Works with every policy that has `propose` (`policies/squashed.py` names what that takes), for DSRL with every flow.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rl.algorithms.augmentation import random_shift
from embodied_rl.algorithms.base import OffPolicyAlgorithm
from embodied_rl.algorithms.batch_renorm import BatchRenorm, batch_statistics
from embodied_rl.algorithms.cotraining import CoTraining
from embodied_rl.algorithms.critic import CriticEnsemble, Norm, feature_size, polyak
from embodied_rl.algorithms.off_policy import OffPolicyConfig, Replay, interleave, transitions
from embodied_rl.algorithms.optimization import adam, seed_policy_draws, step
from embodied_rl.errors import UserError
from embodied_rl.randomness import RowNoise
from embodied_rl.types import ActionSample


@dataclass(frozen=True)
class SACConfig(OffPolicyConfig):
    """Soft actor-critic; CrossQ, RLPD and DSRL are settings of it."""

    learning_rate: float = 3e-4
    """Of the actor."""
    critic_learning_rate: float = 3e-4
    """Of the critics, and of the image encoder of a policy that has one."""
    adam_beta1: float = 0.9
    """Of actor and critics; CrossQ's is 0.5."""
    critics: int = 2
    target_critics: int | None = None
    """The target takes the minimum over this many critics, drawn anew in every update; None = all."""
    critic_hidden: tuple[int, ...] = (256, 256)
    critic_norm: Norm = "none"
    """"layer" as in RLPD, "batch_renorm" as in CrossQ."""
    actor_norm: Literal["none", "batch_renorm"] = "none"
    """"batch_renorm" before every linear layer of the actor, as in CrossQ."""
    tau: float | None = 0.005
    """Share of the critics that their targets take over at every update; None = no target networks: one joint pass over
    both observations, as CrossQ's batch renormalisation needs it."""
    actor_q: Literal["min", "mean"] = "min"
    """Over all critics: what the actor climbs."""
    actor_every: int = 1
    """Critic updates per update of actor and temperature."""
    entropy_backup: bool = True
    """The value of the next observation contains the policy's entropy there."""
    initial_temperature: float = 1.0
    temperature_learning_rate: float = 3e-4
    """0 keeps the temperature."""
    target_entropy: float | None = None
    """Of a chunk of actions in [-1, 1], in nats; None = minus the number of its dimensions."""
    n_step: int = 1
    """Decisions whose rewards enter a target before the critics' value does; no correction for older policies."""
    symmetric: bool = False
    """Half of every batch comes from the demonstrations."""
    random_shift: int = 0
    """Images of a batch are shifted by up to this many pixels, each by its own draw (DrQ, arXiv 2004.13649)."""
    random_actions: bool = True
    """Until the first update act at random (over the whole action range; with DSRL as the flow does by itself)."""
    max_grad_norm: float | None = None
    """Of each optimizer's own parameters."""
    steer: Literal["no", "chunk", "step"] = "no"
    """Choose, instead of actions, the initial noise of a flow policy that is not trained: of the whole "chunk", or one
    "step" of it, which all steps share (DSRL)."""
    steer_bound: float = 1.5
    """The chosen noise lies between minus and plus this."""

    def __post_init__(self) -> None:
        self.require("sac")
        for name in ("critics", "actor_every", "n_step"):
            if getattr(self, name) < 1:
                raise UserError(f"sac: {name} must be at least 1, not {getattr(self, name)}")
        if self.target_critics is not None and not 1 <= self.target_critics <= self.critics:
            raise UserError(f"sac: target_critics must be 1 to critics = {self.critics}, not {self.target_critics}")
        if self.tau is not None and not 0 < self.tau <= 1:
            raise UserError(f"sac: tau must be above 0 and at most 1, or none, not {self.tau}")
        if self.tau is not None and self.critic_norm == "batch_renorm":
            raise UserError("sac: batch_renorm critics have no target networks: set tau to none")
        for name in ("initial_temperature", "steer_bound"):
            if getattr(self, name) <= 0:
                raise UserError(f"sac: {name} must be above 0, not {getattr(self, name)}")
        if self.symmetric and self.batch_size % 2:
            raise UserError(f"sac: half of batch_size {self.batch_size} comes from demonstrations: make it even")
        if self.symmetric and self.steer != "no":
            raise UserError("sac: demonstrations tell no noise: use symmetric or steer, not both")

    def build(self, policy: Any, seed: int) -> SAC:
        """The algorithm on `policy`; `seed` initialises what it adds. Raises `UserError` when `policy` does not fit."""
        self.require_discount("sac", policy.chunk)
        if self.steer != "no":
            if not hasattr(policy, "steered"):
                raise UserError(f"sac: steer needs a flow policy, {type(policy).__name__} is none")
            size, shared = feature_size(policy), self.steer == "step"
            policy = policy.steered(size, self.critic_hidden, shared, self.steer_bound, seed)
        if not hasattr(policy, "propose"):
            raise UserError(f"sac: {type(policy).__name__} has no squashed Gaussian actor: use squashed_gaussian_mlp")
        return SAC(self, policy, seed)


class Temperature(nn.Module):
    """The weight of the entropy, exp(log_alpha)."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self) -> Tensor:
        """[]."""
        return self.log_alpha.exp()

    def loss(self, log_prob: Tensor, target_entropy: float) -> Tensor:
        """[], whose gradient raises the temperature when the entropy is below its target; `log_prob` [B]."""
        return -(self.log_alpha.exp() * (log_prob.detach() + target_entropy)).mean()


class SAC(OffPolicyAlgorithm):
    config: SACConfig

    def __init__(self, config: SACConfig, policy: Any, seed: int) -> None:
        self.config = config
        self.policy = policy
        steps, width = policy.latent_shape
        size = feature_size(policy) + steps * width
        ensemble = CriticEnsemble(size, config.critic_hidden, config.critics, seed, config.critic_norm)
        self.critic = ensemble.to(policy.device)
        self.target = None if config.tau is None else copy.deepcopy(self.critic).requires_grad_(False)
        self.temperature = Temperature(config.initial_temperature).to(policy.device)
        self.target_entropy = -float(steps * width) if config.target_entropy is None else config.target_entropy
        if config.actor_norm == "batch_renorm":
            policy.actor.normalise(BatchRenorm)
        groups = policy.parameter_groups()
        self.actor_optimizer = adam(groups["policy"], config.learning_rate)
        encoded = [*self.critic.parameters(), *groups.get("encoder", [])]
        self.critic_optimizer = adam(encoded, config.critic_learning_rate)
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            optimizer.param_groups[0]["betas"] = (config.adam_beta1, 0.999)
        self.temperature_optimizer = adam(self.temperature.parameters(), config.temperature_learning_rate)
        self.max_grad_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
        self.demonstrations = "decisions" if config.symmetric else None
        self.cotraining: CoTraining | None = None
        self.updates = 0

    def cotrain(self, cotraining: CoTraining) -> None:
        if self.config.steer != "no":
            raise UserError("sac: steer leaves the policy as it is, so there is nothing to co-train: use one of them")
        self.cotraining = cotraining

    def act(self, inputs: dict[str, Tensor], noise: RowNoise) -> ActionSample:
        """A sample of the policy; at random before the first update when `random_actions` says so."""
        if self.config.random_actions and not self.updates:
            return self.policy.explore(inputs, noise)
        return self.policy.act(inputs, noise=noise)

    def recorded(self, sample: ActionSample) -> Tensor:
        return self.policy.recorded(sample)

    def draw(self, replay: Replay, demonstrations: Any, rng: np.random.Generator) -> dict[str, Any]:
        """The next batch. With `symmetric`, demonstrations and replay take turns in its rows."""
        config, device = self.config, self.policy.device
        if not config.symmetric:
            return transitions(replay.sample(config.batch_size, rng, config.n_step), config, device)
        online, offline = (each.sample(config.batch_size // 2, rng, config.n_step) for each in (replay, demonstrations))
        return interleave(transitions(offline, config, device), transitions(online, config, device))

    def update(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """One critic update and, every `actor_every`-th time, one of the actor and of the temperature.

        `batch` {"inputs", "next_inputs", "actions" [B,L,A] as `recorded`, "valid" [B,L], "reward" [B], "discount" [B]
        (0 when terminated)}. Metrics: critic_loss, q, target, critic_grad_norm, temperature and, with the actor,
        actor_loss, entropy, actor_grad_norm.
        """
        config = self.config
        seed_policy_draws(generator, self.policy.device)
        inputs, next_inputs = batch["inputs"], batch["next_inputs"]
        if config.random_shift:
            inputs, next_inputs = (random_shift(each, config.random_shift) for each in (inputs, next_inputs))
        features = self.policy.features(inputs)
        alpha = self.temperature().detach()
        q, target = self._critic_targets(features, next_inputs, batch, alpha)
        loss = (q - target).square().mean(1).sum()
        norm = step(loss, self.critic_optimizer, self.max_grad_norm)
        if self.target is not None and config.tau is not None:
            polyak(self.target, self.critic, config.tau)
        self.updates += 1
        metrics = {"critic_loss": loss.detach(), "q": q.detach().mean(), "target": target.mean()}
        metrics |= {"critic_grad_norm": norm, "temperature": alpha}
        if self.updates % config.actor_every == 0:
            metrics |= self._update_actor(features.detach(), alpha)
        return metrics

    def _critic_targets(
        self, features: Tensor, next_inputs: Any, batch: dict[str, Any], alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Q [E,B] of what was done, and the target [B] of all of them."""
        with torch.no_grad():
            next_features = self.policy.features(next_inputs)
            next_latent, next_log_prob = self.policy.propose(next_features)
            following = self._critic_input(next_features, next_latent)
            latent = self.policy.to_latent(batch["actions"])
        done = self._critic_input(features, torch.where(batch["valid"].unsqueeze(-1), latent, 0.0))
        if self.target is None:
            with batch_statistics(self.critic):
                q, next_q = self.critic(torch.cat([done, following])).chunk(2, dim=1)
        else:
            q, next_q = self.critic(done), self.target(following)
        return q, self.target_value(batch["reward"], batch["discount"], next_q.detach(), next_log_prob, alpha)

    @torch.no_grad()
    def target_value(
        self, reward: Tensor, discount: Tensor, next_q: Tensor, next_log_prob: Tensor, alpha: Tensor
    ) -> Tensor:
        """reward + discount * (min of the drawn `next_q` [E,B] - alpha * `next_log_prob`), [B]."""
        if self.config.target_critics is not None:
            next_q = next_q[torch.randperm(len(next_q), device=next_q.device)[: self.config.target_critics]]
        value = next_q.amin(0)
        if self.config.entropy_backup:
            value = value - alpha * next_log_prob
        return reward + discount * value

    def _update_actor(self, features: Tensor, alpha: Tensor) -> dict[str, Tensor]:
        with batch_statistics(self.policy.actor):
            latent, log_prob = self.policy.propose(features)
        loss = self.actor_loss(self.critic(self._critic_input(features, latent)), log_prob, alpha)
        metrics = {"entropy": -log_prob.detach().mean()}
        if self.cotraining is not None:
            extra = self.cotraining.loss(self.updates)
            loss, metrics["cotraining_loss"] = loss + extra, extra.detach()
        norm = step(loss, self.actor_optimizer, self.max_grad_norm)
        if self.config.temperature_learning_rate:
            step(self.temperature.loss(log_prob, self.target_entropy), self.temperature_optimizer, math.inf)
        return metrics | {"actor_loss": loss.detach(), "actor_grad_norm": norm}

    def actor_loss(self, q: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
        """Mean of alpha * log_prob - Q, [], of `q` [E,B] and `log_prob` [B]."""
        q = q.amin(0) if self.config.actor_q == "min" else q.mean(0)
        return (alpha * log_prob - q).mean()

    def _critic_input(self, features: Tensor, latent: Tensor) -> Tensor:
        """[B,F+L*Z]."""
        return torch.cat([features, latent.flatten(1)], 1)

    def modules(self) -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {"critic": self.critic, "temperature": self.temperature}
        return networks if self.target is None else networks | {"target": self.target}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "critic": self.critic_optimizer,
            "actor": self.actor_optimizer,
            "temperature": self.temperature_optimizer,
        }

    def counters(self) -> dict[str, float]:
        return {"updates": self.updates}

    def load_counters(self, counters: dict[str, float]) -> None:
        self.updates = int(counters["updates"])

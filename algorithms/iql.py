"""Implicit Q-learning (arXiv 2110.06169): the best of recorded decisions, without ever asking what another one would
have been worth; and what differs from it by configuration alone.

    V climbs to an expectile of Q_target(s, a) over what was done        critics: Q(s, a) -> R + g V(s')
    the policy imitates what was done, weighted by min(exp(beta (Q_target(s, a) - V(s))), max_weight)

    advantage-weighted cloning (AWR, arXiv 1910.00177)   IQLConfig(advantage="return", expectile=0.5, n_step=...)
    cloning                                              IQLConfig(inverse_temperature=0)

Works with every policy that has `features` and `imitation_loss`. One with `trace` is scored: its loss is minus the
log-prob of the chunk. Others (flows, tokens) have their imitation loss weighted.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rl.algorithms.base import OfflineAlgorithm
from embodied_rl.algorithms.critic import CriticEnsemble, ExecutedChunk, feature_size, polyak
from embodied_rl.algorithms.imitation import Schedule, mean_imitation_loss, scheduled, to_horizon
from embodied_rl.algorithms.losses import advantage_weight, expectile_loss, segment_sums, term_mask
from embodied_rl.algorithms.off_policy import OfflineConfig, Replay, transitions
from embodied_rl.algorithms.optimization import adam, seed_policy_draws, step
from embodied_rl.errors import UserError


@dataclass(frozen=True)
class IQLConfig(OfflineConfig):
    """Implicit Q-learning; advantage-weighted cloning is a setting of it."""

    learning_rate: float = 3e-4
    """Of the policy."""
    schedule: Schedule = "cosine"
    """"cosine" lowers the policy's learning rate to 0 over `steps`."""
    critic_learning_rate: float = 3e-4
    """Of V and of the critics, and of the image encoder of a policy that has one."""
    advantage: Literal["q", "return"] = "q"
    """Of a decision over V: "q" by the target critics; "return" by what it earned, for which no critic is needed."""
    n_step: int = 1
    """Decisions whose rewards enter a target before V does; with "return" and as many as an episode has, its whole
    return."""
    expectile: float = 0.7
    """0.5 makes V the mean over what was done, nearer to 1 its best."""
    inverse_temperature: float = 3.0
    """beta: how much a larger advantage weighs more; 0 weighs all decisions alike."""
    max_weight: float = 100.0
    """The largest weight of a decision."""
    critics: int = 2
    critic_hidden: tuple[int, ...] = (256, 256)
    """Of V and of the critics."""
    tau: float = 0.005
    """Share of the critics that their targets take over at every update."""
    max_grad_norm: float | None = None
    """Of each optimizer's own parameters."""

    def __post_init__(self) -> None:
        self.require("iql")
        for name in ("critics", "n_step"):
            if getattr(self, name) < 1:
                raise UserError(f"iql: {name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.expectile < 1:
            raise UserError(f"iql: expectile must be between 0 and 1, not {self.expectile}")
        if not 0 < self.tau <= 1:
            raise UserError(f"iql: tau must be above 0 and at most 1, not {self.tau}")
        if self.inverse_temperature < 0 or self.max_weight <= 0:
            raise UserError(
                f"iql: needs inverse_temperature >= 0 and max_weight > 0, not {self.inverse_temperature} and "
                f"{self.max_weight}"
            )

    def build(self, policy: Any, seed: int) -> IQL:
        """The algorithm on `policy`; `seed` initialises V and the critics."""
        self.require_discount("iql", policy.chunk)
        return IQL(self, policy, seed)


class IQL(OfflineAlgorithm):
    config: IQLConfig

    def __init__(self, config: IQLConfig, policy: Any, seed: int) -> None:
        self.config = config
        self.policy = policy
        self.executed = ExecutedChunk(policy.action_spec, policy.device)
        size = feature_size(policy)
        self.value = CriticEnsemble(size, config.critic_hidden, 1, seed + 1, "none").to(policy.device)
        networks = {"value": self.value}
        if config.advantage == "q":
            size += policy.chunk * policy.action_spec.dim
            self.critic = CriticEnsemble(size, config.critic_hidden, config.critics, seed, "none").to(policy.device)
            self.target = copy.deepcopy(self.critic).requires_grad_(False)
            networks |= {"critic": self.critic, "target": self.target}
        self.networks: dict[str, nn.Module] = dict(networks)
        groups = policy.parameter_groups()
        encoder = groups.pop("encoder", [])
        critics = [each for name, network in networks.items() if name != "target" for each in network.parameters()]
        self.critic_optimizer = adam([*critics, *encoder], config.critic_learning_rate)
        actor = [parameter for name, group in groups.items() if name != "value" for parameter in group]
        self.actor_optimizer = adam(actor, config.learning_rate)
        self.max_grad_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
        self.updates = 0

    def draw(self, replay: Replay, rng: np.random.Generator) -> dict[str, Any]:
        config = self.config
        return transitions(replay.sample(config.batch_size, rng, config.n_step), config, self.policy.device)

    def update(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """One update of V and the critics, then one of the policy, with the advantages from before.

        `batch` {"inputs", "next_inputs", "actions" [B,K,A], "valid" [B,K], "reward" [B], "discount" [B] (0 when
        terminated)}. Metrics: value_loss, value, advantage_weight, actor_loss, critic_grad_norm, actor_grad_norm and,
        with critics, critic_loss, q.
        """
        seed_policy_draws(generator, self.policy.device)
        losses, advantages, metrics = self.critic_losses(batch)
        loss = torch.stack(list(losses.values())).sum()
        metrics["critic_grad_norm"] = step(loss, self.critic_optimizer, self.max_grad_norm)
        if self.config.advantage == "q":
            polyak(self.target, self.critic, self.config.tau)
        weight = advantage_weight(advantages, self.config.inverse_temperature, self.config.max_weight)
        actor_loss = self.actor_loss(batch, weight)
        for group in self.actor_optimizer.param_groups:
            group["lr"] = scheduled(self.config.learning_rate, self.config.schedule, self.updates / self.config.steps)
        metrics["actor_grad_norm"] = step(actor_loss, self.actor_optimizer, self.max_grad_norm)
        self.updates += 1
        losses["actor_loss"] = actor_loss
        detached = {name: each.detach() for name, each in losses.items()}
        return detached | metrics | {"advantage_weight": weight.mean()}

    def critic_losses(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """(losses [] of V and the critics by name, advantages [B], further metrics)."""
        with torch.no_grad():
            next_value = self.value(self.policy.features(batch["next_inputs"])).squeeze(0)
            earned = batch["reward"] + batch["discount"] * next_value
        features = self.policy.features(batch["inputs"])
        value = self.value(features.detach()).squeeze(0)
        metrics, losses = {"value": value.detach().mean()}, dict[str, Tensor]()
        better = earned
        if self.config.advantage == "q":
            chosen = torch.cat([features, self.executed(batch["actions"], batch["valid"])], 1)
            better = self.target(chosen.detach()).amin(0)
            q = self.critic(chosen)
            metrics["q"] = q.detach().mean()
            losses["critic_loss"] = (q - earned).square().mean()
        advantages = better - value
        losses["value_loss"] = expectile_loss(advantages, self.config.expectile).mean()
        return losses, advantages.detach(), metrics

    def actor_loss(self, batch: dict[str, Any], weight: Tensor) -> Tensor:
        """Mean of `weight` [B] times the loss of imitating each decision, []."""
        inputs, actions, valid = batch["inputs"], batch["actions"], batch["valid"]
        if hasattr(self.policy, "trace"):
            score = self.policy.evaluate_actions(inputs, self.policy.trace(actions))
            mask = term_mask(valid, score.term_step, score.log_prob_mask)
            log_prob, _ = segment_sums(score.log_prob, mask, score.term_step, self.policy.chunk, "chunk")
            return -(weight * log_prob[:, 0]).mean()
        actions, valid = to_horizon(actions, valid, self.policy.horizon)
        return mean_imitation_loss(self.policy, {"inputs": inputs, "actions": actions, "valid": valid}, weight)

    def modules(self) -> dict[str, nn.Module]:
        return self.networks

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"critic": self.critic_optimizer, "actor": self.actor_optimizer}

    def counters(self) -> dict[str, float]:
        return {"updates": self.updates}

    def load_counters(self, counters: dict[str, float]) -> None:
        self.updates = int(counters["updates"])

"""Critic-guided fine-tuning of a flow policy: off-policy, anchored to chunks that succeeded.

Twin critics learn Q of executed chunks; the policy follows their gradient through its own denoising steps (as in
TD3+BC, arXiv 2106.06860, on action chunks as in Q-chunking, arXiv 2507.07969), while its imitation loss on successful
chunks keeps it near actions whose outcome is known. Works with every policy that has `sample`, `features` and
`imitation_loss`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rl.algorithms.base import OffPolicyAlgorithm
from embodied_rl.algorithms.cotraining import CoTraining
from embodied_rl.algorithms.critic import CriticEnsemble, ExecutedChunk, feature_size, polyak
from embodied_rl.algorithms.imitation import mean_imitation_loss, take, to_horizon
from embodied_rl.algorithms.off_policy import GammaPer, OffPolicyConfig, Replay, to_device, transitions
from embodied_rl.algorithms.optimization import actor_parameters, adam, seed_policy_draws, step
from embodied_rl.errors import UserError
from embodied_rl.randomness import RowNoise
from embodied_rl.types import ActionSample


@dataclass(frozen=True)
class FlowActorCriticConfig(OffPolicyConfig):
    """Off-policy fine-tuning guided by critics."""

    critics: int = 2
    critic_hidden: tuple[int, ...] = (256, 256)
    learning_rate: float = 1.5e-4
    """Of the policy."""
    critic_learning_rate: float = 5e-4
    gamma: float = 0.95
    gamma_per: GammaPer | None = "decision"
    tau: float = 0.01
    """Share of the critic that its target takes over at every update."""
    actor_every: int = 2
    """Critic updates per actor update."""
    q_weight: float = 0.2
    """Weight of -Q / std(Q) in the actor's loss; above `flow_weight` the policy may run away from its data."""
    flow_weight: float = 1.0
    """Weight of the imitation loss on the anchor chunks."""
    anchor_batch_size: int = 128
    anchor_chunks: int = 20_000
    """The anchor is drawn from this many most recent chunks of successful episodes ..."""
    anchor_minimum: int = 1500
    """... once there are this many, before that from demonstrations."""
    actor_batch_size: int = 128
    """Decisions of a batch whose Q the actor follows; that gradient runs through every denoising step."""
    q_warmup_updates: int = 1500
    """First actor updates, over which `q_weight` rises linearly: the critics have seen too little to lead at once."""
    critic_warmup_updates: int = 1500
    """First updates, which leave the actor alone and are made at once."""
    max_grad_norm: float = 1.0
    learning_starts: int = 8000
    updates_per_decision: float = 0.25
    candidates: int = 1
    """Chunks that the policy proposes at every training decision; the one the critics value most is executed (rejection
    sampling, as in IDQL, arXiv 2304.10573). It never leaves what the policy would do, so a young critic can do little
    harm, and what succeeds joins the anchor."""
    exploration_noise: float = 0.1
    """Standard deviation of the Gaussian noise on executed chunks, in units of half the action range."""

    def __post_init__(self) -> None:
        self.require("flow_actor_critic")
        for name in ("critics", "anchor_batch_size", "anchor_minimum", "actor_every"):
            if getattr(self, name) < 1:
                raise UserError(f"flow_actor_critic: {name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.tau <= 1:
            raise UserError(f"flow_actor_critic: tau must be above 0 and at most 1, not {self.tau}")

    def build(self, policy: Any, seed: int) -> FlowActorCritic:
        """The algorithm on `policy`; `seed` initialises the critics."""
        self.require_discount("flow_actor_critic", policy.chunk)
        return FlowActorCritic(self, policy, seed)


class FlowActorCritic(OffPolicyAlgorithm):
    config: FlowActorCriticConfig
    demonstrations = "chunks"

    def __init__(self, config: FlowActorCriticConfig, policy: Any, seed: int) -> None:
        self.config = config
        self.warmup_updates = config.critic_warmup_updates
        self.exploration = config.exploration_noise
        self.successes_kept = config.anchor_chunks
        self.policy = policy
        self.executed = ExecutedChunk(policy.action_spec, policy.device)
        size = feature_size(policy) + policy.chunk * policy.action_spec.dim
        self.critic = CriticEnsemble(size, config.critic_hidden, config.critics, seed).to(policy.device)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.critic_optimizer = adam(self.critic.parameters(), config.critic_learning_rate)
        self.actor_optimizer = adam(actor_parameters(policy), config.learning_rate)
        self.cotraining: CoTraining | None = None
        self.updates = 0

    def cotrain(self, cotraining: CoTraining) -> None:
        self.cotraining = cotraining

    @property
    def next_update_trains_actor(self) -> bool:
        """Whether the next `update` reads the anchor."""
        done = self.updates + 1
        return done > self.config.critic_warmup_updates and done % self.config.actor_every == 0

    def draw(self, replay: Replay, demonstrations: Any, rng: np.random.Generator) -> dict[str, Any]:
        """Decisions, and for an update that trains the actor the anchor: chunks that succeeded, of the demonstrations
        until there are enough."""
        config, anchor = self.config, None
        decisions = replay.sample(config.batch_size, rng)
        if self.next_update_trains_actor and config.flow_weight:
            if demonstrations is None or replay.successful >= config.anchor_minimum:
                anchor = replay.sample_successful(config.anchor_batch_size, rng)
            else:
                rows = rng.integers(len(demonstrations["actions"]), size=config.anchor_batch_size)
                anchor = take(demonstrations, torch.from_numpy(rows))
        return self.batch(decisions, anchor)

    def batch(self, replay: dict[str, Any], anchor: dict[str, Any] | None = None) -> dict[str, Any]:
        """What `update` takes: `transitions` of a sample of a `Replay`, and the anchor {"inputs", "actions" [B,H,A],
        "valid" [B,H]}, whose chunks may be shorter than the policy's horizon; what is missing does not count."""
        return transitions(replay, self.config, self.policy.device) | {"anchor": self._padded(anchor)}

    def _padded(self, anchor: dict[str, Any] | None) -> dict[str, Any] | None:
        if anchor is None:
            return None
        data = to_device(anchor, self.policy.device)
        actions, valid = to_horizon(data["actions"], data["valid"], self.policy.horizon)
        return {"inputs": data["inputs"], "actions": actions, "valid": valid}

    @torch.no_grad()
    def act(self, inputs: dict[str, Tensor], noise: RowNoise) -> ActionSample:
        """The best of `candidates` proposals, once the critics have been trained."""
        count = self.config.candidates
        if count == 1 or not self.updates:
            return super().act(inputs, noise)
        repeated = {name: column.repeat_interleave(count, dim=0) for name, column in inputs.items()}
        actions = self.policy.act(repeated, deterministic=True, noise=noise.copies(count)).actions
        q = self.critic(self._critic_input(self.policy.features(repeated), actions)).amin(dim=0)
        best = q.view(-1, count).argmax(dim=1) + count * torch.arange(len(q) // count, device=q.device)
        return ActionSample(actions=actions[best], trace={})

    def update(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """One critic update and, every `actor_every`-th after the warm-up, one actor update.

        `batch` {"inputs", "next_inputs", "actions" [B,K,A], "valid" [B,K], "reward" [B], "discount" [B] (0 when
        terminated), "anchor" {"inputs", "actions" [B,H,A], "valid" [B,H]}, which may be None when
        `next_update_trains_actor` is False or `flow_weight` is 0}. Metrics: critic_loss, q, target, critic_grad_norm
        and, with the actor, actor_loss, flow_loss, actor_grad_norm.
        """
        seed_policy_draws(generator, self.policy.device)
        train_actor = self.next_update_trains_actor
        with torch.no_grad():
            features = self.policy.features(batch["inputs"])
            next_features = self.policy.features(batch["next_inputs"])
            next_actions = self.policy.sample(batch["next_inputs"])
            next_q = self.target(self._critic_input(next_features, next_actions)).amin(dim=0)
            target = batch["reward"] + batch["discount"] * next_q
        q = self.critic(self._critic_input(features, batch["actions"], batch["valid"]))
        loss = (q - target).square().mean(dim=1).sum()
        metrics = {"critic_loss": loss.detach(), "q": q.detach().mean(), "target": target.mean()}
        metrics["critic_grad_norm"] = step(loss, self.critic_optimizer, self.config.max_grad_norm)
        polyak(self.target, self.critic, self.config.tau)
        if train_actor:
            metrics |= self._update_actor(batch["inputs"], features, batch["anchor"])
        self.updates += 1
        return metrics

    def _update_actor(self, inputs: dict[str, Tensor], features: Tensor, anchor: Any) -> dict[str, Tensor]:
        config, losses = self.config, list[Tensor]()
        metrics: dict[str, Tensor] = {}
        if config.q_weight:
            rows = config.actor_batch_size
            inputs, features = {name: column[:rows] for name, column in inputs.items()}, features[:rows]
            q = self.critic(self._critic_input(features, self.policy.sample(inputs))).mean(dim=0)
            losses.append(-self.q_weight() * (q / q.detach().std().clamp(min=1e-6)).mean())
        if config.flow_weight:
            flow_loss = mean_imitation_loss(self.policy, anchor)
            losses.append(config.flow_weight * flow_loss)
            metrics["flow_loss"] = flow_loss.detach()
        if self.cotraining is not None:
            losses.append(self.cotraining.loss(self.updates))
            metrics["cotraining_loss"] = losses[-1].detach()
        loss = torch.stack(losses).sum()
        norm = step(loss, self.actor_optimizer, self.config.max_grad_norm)
        return metrics | {"actor_loss": loss.detach(), "actor_grad_norm": norm}

    def q_weight(self) -> float:
        """The weight of Q in the next actor update."""
        config = self.config
        done = (self.updates + 1 - config.critic_warmup_updates) / config.actor_every
        return config.q_weight * min(1.0, done / max(config.q_warmup_updates, 1))

    def _critic_input(self, features: Tensor, actions: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B,F+K*A]: features and the executed actions."""
        return torch.cat([features, self.executed(actions[:, : self.policy.chunk], valid)], dim=1)

    def modules(self) -> dict[str, nn.Module]:
        return {"critic": self.critic, "target": self.target}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"critic": self.critic_optimizer, "actor": self.actor_optimizer}

    def counters(self) -> dict[str, float]:
        return {"updates": self.updates}

    def load_counters(self, counters: dict[str, float]) -> None:
        self.updates = int(counters["updates"])

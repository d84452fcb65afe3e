"""REINFORCE with a value baseline (Williams, 1992) on the return of each trajectory segment."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from embodied_rl.algorithms.base import Metrics, OnPolicyAlgorithm
from embodied_rl.policies.base import Policy
from embodied_rl.types import Trajectory


@dataclass(frozen=True)
class ReinforceConfig:
    """REINFORCE."""

    learning_rate: float = 0.05
    gamma: float = 0.9

    def build(self, policy: Policy, seed: int) -> Reinforce:
        return Reinforce(self, policy)


class Reinforce(OnPolicyAlgorithm):
    """One step per segment; the return stops at an episode's end."""

    def __init__(self, config: ReinforceConfig, policy: Policy) -> None:
        self.policy = policy
        self.gamma = config.gamma
        self.optimizer = torch.optim.Adam(policy.parameters(), config.learning_rate)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"all": self.optimizer}

    def learn(self, trajectory: Trajectory, generator: torch.Generator) -> Metrics:
        ends = (trajectory.terminated | trajectory.truncated).any(-1)
        target = trajectory.reward.sum(-1)
        following = trajectory.last_value
        for t in reversed(range(len(target))):
            target[t] += self.gamma * torch.where(ends[t], trajectory.final_value[t], following)
            following = target[t]
        flat = {name: value.flatten(0, 1) for name, value in trajectory.inputs.items()}
        trace = {name: value.flatten(0, 1) for name, value in trajectory.trace.items()}
        score = self.policy.evaluate_actions(flat, trace)
        valid = trajectory.valid.flatten(0, 1)
        counts = valid[:, score.term_step]
        value = self.policy.value(flat)
        target, decided = target.flatten(), valid.any(-1)
        advantage = (target - value).detach()
        policy_loss = -(torch.where(counts, score.log_prob, 0.0).sum(-1) * advantage)[decided].mean()
        value_loss = (target - value)[decided].square().mean()
        self.optimizer.zero_grad()
        (policy_loss + value_loss).backward()
        self.optimizer.step()
        return {"policy_loss": float(policy_loss.detach()), "value_loss": float(value_loss.detach())}

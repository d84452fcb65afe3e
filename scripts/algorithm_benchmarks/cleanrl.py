"""The loops of CleanRL's PPO and SAC for continuous actions: the same arithmetic, in our own words.

Everything inline, PyTorch's distributions, one optimizer for actor and critic of PPO, two separate critics for SAC.
"""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal


def perceptron(sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


class PPOLoop:
    """`envs` is a `gymnasium.vector.SyncVectorEnv`."""

    def __init__(self, envs: Any, steps: int, hidden: list[int], epochs: int, minibatch: int) -> None:
        self.envs, self.steps, self.epochs, self.minibatch = envs, steps, epochs, minibatch
        self.low, self.high = envs.single_action_space.low, envs.single_action_space.high
        size, width = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
        self.critic = perceptron([size, *hidden, 1], nn.Tanh)
        self.mean = perceptron([size, *hidden, width], nn.Tanh)
        self.log_std = nn.Parameter(torch.zeros(1, width))
        self.parameters = [*self.critic.parameters(), *self.mean.parameters(), self.log_std]
        self.optimizer = torch.optim.Adam(self.parameters, lr=3e-4, eps=1e-5)
        self.state = torch.tensor(envs.reset(seed=0)[0], dtype=torch.float32)
        self.done = torch.zeros(envs.num_envs)
        shape = steps, envs.num_envs
        self.states, self.actions = torch.zeros(*shape, size), torch.zeros(*shape, width)
        self.log_probs, self.rewards, self.dones, self.values = (torch.zeros(shape) for _ in range(4))

    def act(self, state: Tensor, action: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(action, log-prob, entropy, value)."""
        mean = self.mean(state)
        chosen = Normal(mean, self.log_std.expand_as(mean).exp())
        action = chosen.sample() if action is None else action
        return action, chosen.log_prob(action).sum(1), chosen.entropy().sum(1), self.critic(state)

    def iterate(self) -> None:
        """Collect and learn once."""
        for t in range(self.steps):
            self.states[t], self.dones[t] = self.state, self.done
            with torch.no_grad():
                action, log_prob, _, value = self.act(self.state)
            self.values[t], self.actions[t], self.log_probs[t] = value.flatten(), action, log_prob
            clipped = np.clip(action.numpy(), self.low, self.high)
            state, reward, terminated, truncated, _ = self.envs.step(clipped)
            self.rewards[t] = torch.tensor(reward)
            self.state = torch.tensor(state, dtype=torch.float32)
            self.done = torch.tensor(terminated | truncated, dtype=torch.float32)
        self.learn(*self.advantages())

    @torch.no_grad()
    def advantages(self) -> tuple[Tensor, Tensor]:
        """(advantages, returns), GAE."""
        following, running = self.critic(self.state).flatten(), torch.zeros(self.envs.num_envs)
        going, advantages = 1 - self.done, torch.zeros_like(self.rewards)
        for t in reversed(range(self.steps)):
            delta = self.rewards[t] + 0.99 * following * going - self.values[t]
            running = delta + 0.99 * 0.95 * going * running
            advantages[t], following, going = running, self.values[t], 1 - self.dones[t]
        return advantages, advantages + self.values

    def learn(self, advantages: Tensor, returns: Tensor) -> None:
        """Epochs of minibatches, with the statistics that are logged."""
        columns = self.states, self.actions, self.log_probs, advantages, returns, self.values
        data = [column.flatten(0, 1) for column in columns]
        order, clipped_share = np.arange(len(data[0])), []
        for _ in range(self.epochs):
            np.random.shuffle(order)  # noqa: NPY002 - as they do
            for start in range(0, len(order), self.minibatch):
                rows = order[start : start + self.minibatch]
                state, action, old, advantage, target, before = (column[rows] for column in data)
                _, log_prob, entropy, value = self.act(state, action)
                log_ratio = log_prob - old
                ratio = log_ratio.exp()
                with torch.no_grad():
                    self.kl = (-log_ratio).mean(), ((ratio - 1) - log_ratio).mean()
                    clipped_share.append(((ratio - 1).abs() > 0.2).float().mean().item())
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                policy = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()
                value = value.flatten()
                near = before + (value - before).clamp(-0.2, 0.2)
                error = 0.5 * torch.max((value - target).square(), (near - target).square()).mean()
                loss = policy - 0.0 * entropy.mean() + 0.5 * error
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters, 0.5)
                self.optimizer.step()


class SACLoop:
    """`replay` is a `stable_baselines3.common.buffers.ReplayBuffer`, which CleanRL uses too."""

    def __init__(self, replay: Any, size: int, width: int, hidden: list[int], batch: int) -> None:
        self.replay, self.batch = replay, batch
        self.body = nn.Sequential(*perceptron([size, *hidden], nn.ReLU), nn.ReLU())
        self.heads = nn.Linear(hidden[-1], width), nn.Linear(hidden[-1], width)
        self.critics, self.targets = (
            [perceptron([size + width, *hidden, 1], nn.ReLU) for _ in range(2)] for _ in range(2)
        )
        for critic, target in zip(self.critics, self.targets, strict=True):
            target.load_state_dict(critic.state_dict())
        actor = chain(self.body.parameters(), *(head.parameters() for head in self.heads))
        self.actor_optimizer = torch.optim.Adam(list(actor), lr=3e-4)
        self.critic_optimizer = torch.optim.Adam(list(chain(*(c.parameters() for c in self.critics))), lr=3e-4)
        self.log_alpha = torch.zeros(1, requires_grad=True)
        self.alpha, self.target_entropy = 1.0, -float(width)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=3e-4)

    def act(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """(action, log-prob)."""
        hidden = self.body(state)
        mean, log_std = (head(hidden) for head in self.heads)
        chosen = Normal(mean, (-5 + 3.5 * (log_std.tanh() + 1)).exp())
        x = chosen.rsample()
        action = x.tanh()
        log_prob = chosen.log_prob(x) - torch.log(1 - action.square() + 1e-6)
        return action, log_prob.sum(1, keepdim=True)

    def update(self) -> None:
        """Critics, actor, temperature and targets, once each."""
        data = self.replay.sample(self.batch)
        with torch.no_grad():
            action, log_prob = self.act(data.next_observations)
            following = [target(torch.cat([data.next_observations, action], 1)) for target in self.targets]
            value = torch.min(*following) - self.alpha * log_prob
            wanted = data.rewards.flatten() + (1 - data.dones.flatten()) * 0.99 * value.view(-1)
        done = torch.cat([data.observations, data.actions], 1)
        loss = sum(F.mse_loss(critic(done).view(-1), wanted) for critic in self.critics)
        _descend(loss, self.critic_optimizer)
        action, log_prob = self.act(data.observations)
        tried = torch.cat([data.observations, action], 1)
        q = torch.min(*(critic(tried) for critic in self.critics))
        _descend((self.alpha * log_prob - q).mean(), self.actor_optimizer)
        with torch.no_grad():
            _, log_prob = self.act(data.observations)
        _descend((-self.log_alpha.exp() * (log_prob + self.target_entropy)).mean(), self.alpha_optimizer)
        self.alpha = self.log_alpha.exp().item()
        for critic, target in zip(self.critics, self.targets, strict=True):
            for source, copy in zip(critic.parameters(), target.parameters(), strict=True):
                copy.data.copy_(0.005 * source.data + 0.995 * copy.data)


def _descend(loss: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

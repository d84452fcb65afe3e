"""Small policies that keep the contract, for tests of algorithms."""

import torch
from torch import nn

from embodied_rl.policies.base import Policy
from embodied_rl.specs import ActionSpec, ObservationSpec
from embodied_rl.types import ActionSample, Score


class ToyFlow(Policy):
    """Flow matching by an MLP, four Euler steps from t=1 (noise) to t=0."""

    def __init__(self, state=42, chunk=4, dim=4, width=256, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.observation_spec = ObservationSpec(state=state)
        self.action_spec = ActionSpec(low=(-1.0,) * dim, high=(1.0,) * dim, hold=(0.0,) * dim)
        self.horizon = self.chunk = chunk
        size = chunk * dim
        self.net = nn.Sequential(
            nn.Linear(state + size + 1, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, size),
        )

    def prepare(self, observation):
        return {"state": torch.as_tensor(observation.state)}

    def act(self, inputs, deterministic=False, noise=None):
        return ActionSample(actions=self.sample(inputs), trace={})

    def evaluate_actions(self, inputs, trace):
        raise NotImplementedError

    def velocity(self, state, x, t):
        return self.net(torch.cat([state, x, t], dim=1))

    def sample(self, inputs):
        state = inputs["state"]
        x = torch.randn(len(state), self.chunk * self.action_spec.dim)
        for i in range(4):
            x = x - 0.25 * self.velocity(state, x, torch.full((len(state), 1), 1 - i / 4))
        return x.reshape(len(state), self.chunk, -1)

    def features(self, inputs):
        return inputs["state"]

    def imitation_loss(self, inputs, actions, valid):
        clean = actions.flatten(1)
        noise, t = torch.randn_like(clean), torch.rand(len(clean), 1)
        v = self.velocity(inputs["state"], (1 - t) * clean + t * noise, t)
        error = (v - (noise - clean)).square().reshape(actions.shape).mean(-1)
        return (error * valid).sum(1) / valid.sum(1).clamp(min=1)


class ToyGaussian(Policy):
    """A linear Gaussian policy with a value head; one log-prob term per action dimension."""

    def __init__(self, state=3, chunk=2, dim=2, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.observation_spec = ObservationSpec(state=state)
        self.action_spec = ActionSpec(low=(-1.0,) * dim, high=(1.0,) * dim, hold=(0.0,) * dim)
        self.horizon = self.chunk = chunk
        self.mean = nn.Linear(state, chunk * dim)
        self.log_std = nn.Parameter(torch.full((chunk * dim,), -0.5))
        self.value_head = nn.Linear(state, 1)

    def prepare(self, observation):
        return {"state": torch.as_tensor(observation.state)}

    def _score(self, inputs, x):
        distribution = torch.distributions.Normal(self.mean(inputs["state"]), self.log_std.exp())
        return distribution.log_prob(x), distribution.entropy()

    def act(self, inputs, deterministic=False, noise=None):
        mean = self.mean(inputs["state"])
        x = (mean + torch.randn_like(mean) * self.log_std.exp()).detach()
        log_prob, _ = self._score(inputs, x)
        return ActionSample(x.reshape(len(x), self.chunk, -1), {"x": x}, log_prob.detach(), self.value(inputs).detach())

    def evaluate_actions(self, inputs, trace):
        log_prob, entropy = self._score(inputs, trace["x"])
        steps = torch.arange(self.chunk).repeat_interleave(self.action_spec.dim)
        return Score(log_prob, entropy, steps)

    def value(self, inputs):
        return self.value_head(inputs["state"]).squeeze(-1)

    def imitation_loss(self, inputs, actions, valid):
        error = (self.mean(inputs["state"]).reshape(actions.shape) - actions).square().mean(-1)
        return (error * valid).sum(1) / valid.sum(1).clamp(min=1)

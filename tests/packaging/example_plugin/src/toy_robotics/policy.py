"""A linear Gaussian policy with a linear value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from embodied_rl.errors import SpecError
from embodied_rl.policies.base import Inputs, Policy
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ActionSpec, ObservationSpec
from embodied_rl.types import ActionSample, Observation, Score


@dataclass(frozen=True)
class LinearConfig:
    """A linear Gaussian policy."""

    chunk: int = 2
    std: float = 0.3

    def build(self, observation_spec: ObservationSpec, action_spec: ActionSpec) -> Linear:
        if observation_spec.cameras and not observation_spec.state:
            raise SpecError(f"linear needs a state, the simulator has none: {observation_spec}")
        return Linear(self, observation_spec, action_spec)


class Linear(Policy):
    """actions ~ N(W state + b, std), L = K*A terms."""

    def __init__(self, config: LinearConfig, observation_spec: ObservationSpec, action_spec: ActionSpec) -> None:
        super().__init__()
        self.observation_spec = ObservationSpec(state=observation_spec.state)
        self.action_spec = action_spec
        self.horizon = self.chunk = config.chunk
        self.std = config.std
        self.mean = nn.Linear(observation_spec.state, config.chunk * action_spec.dim)
        self.value_head = nn.Linear(observation_spec.state, 1)

    def prepare(self, observation: Observation) -> Inputs:
        return {"state": torch.tensor(observation.state, device=self.device)}

    def distribution(self, inputs: Inputs) -> Normal:
        return Normal(self.mean(inputs["state"]).unflatten(1, (self.chunk, -1)), self.std)

    @torch.no_grad()
    def act(self, inputs: Inputs, deterministic: bool = False, noise: RowNoise | None = None) -> ActionSample:
        distribution = self.distribution(inputs)
        mean, value = distribution.mean, self.value(inputs)
        if deterministic:
            return ActionSample(self.clamp(mean), {}, None, value)
        drawn = torch.randn_like(mean) if noise is None else torch.from_numpy(noise.normal(*mean.shape[1:])).to(mean)
        x = mean + self.std * drawn
        return ActionSample(self.clamp(x), {"x": x}, distribution.log_prob(x).flatten(1), value)

    def clamp(self, actions: Tensor) -> Tensor:
        return actions.clamp(actions.new_tensor(self.action_spec.low), actions.new_tensor(self.action_spec.high))

    def evaluate_actions(self, inputs: Inputs, trace: dict[str, Tensor]) -> Score:
        distribution = self.distribution(inputs)
        step = torch.arange(self.chunk).repeat_interleave(self.action_spec.dim)
        return Score(distribution.log_prob(trace["x"]).flatten(1), distribution.entropy().flatten(1), step)

    def value(self, inputs: Inputs) -> Tensor:
        return self.value_head(inputs["state"]).squeeze(-1)

    def imitation_loss(self, inputs: Inputs, actions: Tensor, valid: Tensor) -> Tensor:
        keep = valid[..., None]
        error = torch.where(keep, self.distribution(inputs).mean - torch.where(keep, actions, 0.0), 0.0)
        return error.square().sum((1, 2)) / valid.sum(1).clamp_min(1)

"""A flow-matching policy over action chunks whose velocity is an MLP conditioned on the state."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embodied_rl.errors import UserError
from embodied_rl.policies.base import Inputs
from embodied_rl.policies.flow import FlowSampler, bounded_std
from embodied_rl.policies.flow_policy import FlowConfig, FlowPolicy
from embodied_rl.policies.mlp import ActionScale, Activation, StateNormaliser, mlp, state_spec
from embodied_rl.policies.state_policy import StatePolicy
from embodied_rl.policies.value_head import ValueHead
from embodied_rl.specs import ActionSpec, ObservationSpec


@dataclass(frozen=True)
class FlowMLPConfig(FlowConfig):
    """The flow-matching MLP policy."""

    hidden: tuple[int, ...] = (256, 256, 256)
    """Widths of the velocity MLP."""
    time_features: int = 32
    """Size of the sinusoidal embedding of t; even."""
    value_hidden: tuple[int, ...] = (256, 256)
    """Widths of the value head."""
    value_activation: Activation = "tanh"

    def __post_init__(self) -> None:
        if not self.hidden or self.time_features < 2 or self.time_features % 2:
            raise UserError("flow_mlp: needs at least one hidden layer and an even, positive number of time_features")
        super().__post_init__()

    @property
    def name(self) -> str:
        return "flow_mlp"

    def build(self, observation_spec: ObservationSpec, action_spec: ActionSpec) -> FlowMLP:
        """The policy for a simulator with these specs; raises `SpecError` when it cannot serve them."""
        return FlowMLP(self, observation_spec, action_spec)


class FlowMLP(StatePolicy, FlowPolicy):
    """v = MLP(normalised state, flattened x, sinusoidal t), SiLU. Network actions are the simulator's, scaled from
    their bounds to [-1, 1]."""

    frequencies: Tensor

    def __init__(self, config: FlowMLPConfig, observation_spec: ObservationSpec, action_spec: ActionSpec) -> None:
        super().__init__()
        self.observation_spec = state_spec("flow_mlp", observation_spec, config.state)
        self.action_spec = action_spec
        self.horizon = config.horizon
        self.chunk = config.chunk
        self.width = action_spec.dim
        self.sampler = FlowSampler(config.sampler(), config.chunk, action_spec.dim)
        size, outputs = self.observation_spec.state, config.horizon * action_spec.dim
        self.normaliser = StateNormaliser(size)
        self.action_scale = ActionScale(action_spec)
        # periods from 4 (one sweep of t is a quarter turn) down to 4/100, evenly in the logarithm
        frequencies = 2 * math.pi / 4 * torch.logspace(0, 2, config.time_features // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.body = mlp(size + outputs + config.time_features, config.hidden, "silu")
        self.head = nn.Linear(config.hidden[-1], outputs)
        self.noise_std = config.noise_std
        self.noise_head = mlp(config.hidden[-1], (64,), "tanh", outputs) if config.method == "noise" else None
        self.value_head = ValueHead(size, config.value_hidden, config.value_activation)

    def encode(self, inputs: Inputs) -> Tensor:
        return self.features(inputs)

    def velocity(self, prefix: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(v [B,H,A], last hidden layer [B,W])."""
        angle = t[:, None] * self.frequencies
        hidden = self.body(torch.cat([prefix, x.flatten(1), angle.sin(), angle.cos()], 1))
        return self.head(hidden).view_as(x), hidden

    def standard_deviation(self, hidden: Tensor) -> Tensor:
        if self.noise_head is None:
            return super().standard_deviation(hidden)
        return bounded_std(self.noise_head(hidden), *self.noise_std).unflatten(1, (self.horizon, self.width))

    def value(self, inputs: Inputs) -> Tensor:
        return self.value_head(self.features(inputs))

    def to_simulator(self, x: Tensor, inputs: Inputs) -> Tensor:
        return self.action_scale.to_simulator(x)

    def to_network(self, actions: Tensor, inputs: Inputs) -> Tensor:
        return self.action_scale.to_network(actions)

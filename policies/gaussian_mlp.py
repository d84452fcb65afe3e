"""A Gaussian policy over action chunks: an MLP for the mean, a learned deviation that does not depend on the state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embodied_rl.errors import UserError
from embodied_rl.policies.base import Inputs
from embodied_rl.policies.flow import LOG_2PI
from embodied_rl.policies.mlp import (
    ActionScale,
    Activation,
    StateNormaliser,
    mlp,
    orthogonal,
    state_spec,
)
from embodied_rl.policies.state_policy import StatePolicy
from embodied_rl.policies.value_head import ValueHead
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ActionSpec, ObservationSpec
from embodied_rl.types import ActionSample, Score


@dataclass(frozen=True)
class GaussianMLPConfig:
    """The Gaussian MLP policy."""

    state: tuple[str, ...] = ()
    """Names of the simulator's state that the policy sees, in its order; "hand" means all of "hand.0", "hand.1", ...;
    () = the whole state."""
    chunk: int = 1
    """K, executed actions."""
    horizon: int | None = None
    """H, predicted actions; None = chunk."""
    hidden: tuple[int, ...] = (256, 256, 256)
    """Widths of the mean's MLP."""
    activation: Activation = "tanh"
    initial_log_std: float = -0.5
    """Of the actions in network units, where the action range is [-1, 1]."""
    value_hidden: tuple[int, ...] = (256, 256, 256)
    """Widths of the value head."""
    value_activation: Activation = "tanh"

    def __post_init__(self) -> None:
        if not 1 <= self.chunk <= (self.horizon or self.chunk):
            raise UserError(f"gaussian_mlp: needs 1 <= chunk <= horizon, got {self.chunk} and {self.horizon}")

    def build(self, observation_spec: ObservationSpec, action_spec: ActionSpec) -> GaussianMLP:
        """The policy for a simulator with these specs; raises `SpecError` when it cannot serve them."""
        return GaussianMLP(self, observation_spec, action_spec)


class GaussianMLP(StatePolicy):
    """Independent Gaussians N(mean(state), exp(log_std)) in network units, L = K*A terms. The trace keeps the sample
    before it is clipped to the action bounds, so that its density is right."""

    def __init__(self, config: GaussianMLPConfig, observation_spec: ObservationSpec, action_spec: ActionSpec) -> None:
        super().__init__()
        self.observation_spec = state_spec("gaussian_mlp", observation_spec, config.state)
        self.action_spec = action_spec
        self.chunk = config.chunk
        self.horizon = config.horizon or config.chunk
        size, outputs = self.observation_spec.state, self.horizon * action_spec.dim
        self.normaliser = StateNormaliser(size)
        self.action_scale = ActionScale(action_spec)
        self.mean = orthogonal(mlp(size, config.hidden, config.activation, outputs), last_gain=0.01)
        self.log_std = nn.Parameter(torch.full((self.horizon, action_spec.dim), config.initial_log_std))
        self.value_head = ValueHead(size, config.value_hidden, config.value_activation)

    @torch.no_grad()
    def act(self, inputs: Inputs, deterministic: bool = False, noise: RowNoise | None = None) -> ActionSample:
        mean = self._mean(self.features(inputs))[:, : self.chunk]
        if deterministic:
            return ActionSample(self.action_scale.to_simulator(mean), {})
        drawn = torch.randn_like(mean) if noise is None else torch.from_numpy(noise.normal(*mean.shape[1:])).to(mean)
        x = mean + self.log_std[: self.chunk].exp() * drawn
        return ActionSample(self.action_scale.to_simulator(x), {"x": x}, self._log_prob(x, mean))

    def evaluate_actions(self, inputs: Inputs, trace: dict[str, Tensor]) -> Score:
        mean = self._mean(self.features(inputs))[:, : self.chunk]
        term_step = torch.arange(self.chunk, device=mean.device).repeat_interleave(mean.shape[-1])
        entropy = (self.log_std[: self.chunk] + 0.5 * (1 + LOG_2PI)).flatten().expand(len(mean), -1)
        return Score(self._log_prob(trace["x"], mean), entropy, term_step)

    def trace(self, actions: Tensor) -> dict[str, Tensor]:
        """What `evaluate_actions` scores `actions` [B,K,A] of any origin by."""
        return {"x": self.action_scale.to_network(actions)}

    def value(self, inputs: Inputs) -> Tensor:
        return self.value_head(self.features(inputs))

    def imitation_loss(self, inputs: Inputs, actions: Tensor, valid: Tensor) -> Tensor:
        """[B], the mean squared error of the mean action in network units; the deviation is not trained."""
        keep = valid[..., None]
        target = self.action_scale.to_network(torch.where(keep, actions, 0.0))
        error = torch.where(keep, self._mean(self.features(inputs)) - target, 0.0)
        return error.square().sum((1, 2)) / (valid.sum(1) * actions.shape[-1]).clamp_min(1)

    def sample(self, inputs: Inputs, noise: Tensor | None = None) -> Tensor:
        """Actions [B,H,A], reparameterised: mean + std * `noise` [B,H,A] (standard normal when None)."""
        mean = self._mean(self.features(inputs))
        drawn = torch.randn_like(mean) if noise is None else noise
        return self.action_scale.to_simulator(mean + self.log_std.exp() * drawn)

    def _log_prob(self, x: Tensor, mean: Tensor) -> Tensor:
        """log N(x; mean, exp(log_std)) of each of `x` [B,K,A], [B,K*A]."""
        log_std = self.log_std[: self.chunk]
        return (-0.5 * ((x - mean) * (-log_std).exp()).square() - (log_std + 0.5 * LOG_2PI)).flatten(1)

    def _mean(self, features: Tensor) -> Tensor:
        return self.mean(features).view(len(features), self.horizon, -1)

"""A policy that chooses one of n actions: an MLP from states to their probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embodied_rl.errors import SpecError
from embodied_rl.policies.base import Inputs
from embodied_rl.policies.mlp import Activation, StateNormaliser, mlp, orthogonal, state_spec
from embodied_rl.policies.state_policy import StatePolicy
from embodied_rl.policies.value_head import ValueHead
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ActionSpec, ObservationSpec
from embodied_rl.types import ActionSample, Score


@dataclass(frozen=True)
class CategoricalMLPConfig:
    """The policy of simulators with discrete actions."""

    state: tuple[str, ...] = ()
    """Names of the simulator's state that the policy sees, in its order; "hand" means all of "hand.0", "hand.1", ...;
    () = the whole state."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the MLP."""
    activation: Activation = "tanh"
    value_hidden: tuple[int, ...] = (64, 64)
    """Widths of the value head."""
    value_activation: Activation = "tanh"

    def build(self, observation_spec: ObservationSpec, action_spec: ActionSpec) -> CategoricalMLP:
        """The policy for a simulator with these specs; raises `SpecError` when it cannot serve them."""
        return CategoricalMLP(self, observation_spec, action_spec)


class CategoricalMLP(StatePolicy):
    """p(choice) = softmax(MLP(state)), one term per decision; the trace is the choice."""

    def __init__(
        self, config: CategoricalMLPConfig, observation_spec: ObservationSpec, action_spec: ActionSpec
    ) -> None:
        super().__init__()
        if not action_spec.choices:
            raise SpecError("policy 'categorical_mlp' makes discrete choices, the simulator takes continuous actions")
        self.observation_spec = state_spec("categorical_mlp", observation_spec, config.state)
        self.action_spec = action_spec
        self.horizon = self.chunk = 1
        size = self.observation_spec.state
        self.normaliser = StateNormaliser(size)
        self.logits = orthogonal(mlp(size, config.hidden, config.activation, action_spec.choices), last_gain=0.01)
        self.value_head = ValueHead(size, config.value_hidden, config.value_activation)

    @torch.no_grad()
    def act(self, inputs: Inputs, deterministic: bool = False, noise: RowNoise | None = None) -> ActionSample:
        log_probs = self._log_probs(self.features(inputs))
        if deterministic:
            return ActionSample(_as_actions(log_probs.argmax(1)), {})
        rows = len(log_probs)
        drawn = torch.rand(rows, 1) if noise is None else torch.from_numpy(noise.uniform(1))
        below = log_probs.exp().cumsum(1) <= drawn.to(log_probs)
        choice = below.sum(1).clamp(max=self.action_spec.choices - 1)  # the sum of all may round to less than 1
        return ActionSample(_as_actions(choice), {"choice": choice}, _of(log_probs, choice))

    def evaluate_actions(self, inputs: Inputs, trace: dict[str, Tensor]) -> Score:
        log_probs = self._log_probs(self.features(inputs))
        entropy = -(log_probs.exp() * log_probs).sum(1, keepdim=True)
        return Score(_of(log_probs, trace["choice"]), entropy, torch.zeros(1, dtype=torch.int64, device=self.device))

    def value(self, inputs: Inputs) -> Tensor:
        return self.value_head(self.features(inputs))

    def imitation_loss(self, inputs: Inputs, actions: Tensor, valid: Tensor) -> Tensor:
        """[B], minus the log-probability of the choice."""
        choice = torch.where(valid, actions[:, :, 0], 0.0).round().long()[:, 0]
        log_prob = _of(self._log_probs(self.features(inputs)), choice)
        return torch.where(valid, -log_prob, 0.0)[:, 0]

    def _log_probs(self, features: Tensor) -> Tensor:
        return F.log_softmax(self.logits(features), 1)


def _as_actions(choice: Tensor) -> Tensor:
    """[B] -> float32 [B,1,1]."""
    return choice.float()[:, None, None]


def _of(log_probs: Tensor, choice: Tensor) -> Tensor:
    """[B,1], the entries of `log_probs` [B,n] at `choice` [B]."""
    return log_probs.gather(1, choice[:, None])

"""The contract of a policy: observations in, action chunks out, and everything reinforcement learning needs to know
about how they were chosen."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from embodied_rl.errors import SpecError
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ActionSpec, ObservationSpec
from embodied_rl.types import ActionSample, Observation, Score

Inputs = dict[str, Tensor]


def require_continuous(spec: ActionSpec) -> None:
    """Raise `SpecError` for a simulator of discrete choices; for policies whose actions are continuous."""
    if spec.choices:
        raise SpecError(f"the policy gives continuous actions, the simulator takes one of {spec.choices} choices")


class Policy(nn.Module, ABC):
    """Predicts a horizon of H actions and executes the first K <= H of them.

    `inputs` is a dict of tensors [B,...], so that trajectories can store, shuffle and split it.
    """

    observation_spec: ObservationSpec
    """What the policy needs; `embodied_rl.specs.connect` makes a simulator's observations fit it."""
    action_spec: ActionSpec
    horizon: int
    """H."""
    chunk: int
    """K."""

    @abstractmethod
    def prepare(self, observation: Observation) -> Inputs:
        """Deterministic, once, in the rollout worker. Images stay uint8; no augmentation. The result is the policy's
        own: it does not alias the observation, whose buffers the simulator writes again."""

    @abstractmethod
    def act(self, inputs: Inputs, deterministic: bool = False, noise: RowNoise | None = None) -> ActionSample:
        """Choose actions [B,K,A]. `noise` makes the choice a function of each row alone; without it torch's global
        generator is used. A deterministic sample has no log-prob unless the noise is part of it."""

    @abstractmethod
    def evaluate_actions(self, inputs: Inputs, trace: dict[str, Tensor]) -> Score:
        """Score recorded actions, differentiably: the same log-prob terms as `act` gave, in any batch split, in train
        and eval mode."""

    def value(self, inputs: Inputs) -> Tensor:
        """V [B], a function of the observation alone. Raises TypeError for a policy without a value head."""
        raise TypeError(f"{type(self).__name__} has no value head")

    @abstractmethod
    def imitation_loss(self, inputs: Inputs, actions: Tensor, valid: Tensor) -> Tensor:
        """Per-row loss [B] of predicting `actions` [B,H,A] (simulator units); steps where `valid` [B,H] is False do
        not count. A row without a valid step has loss 0."""

    def sample(self, inputs: Inputs) -> Tensor:
        """Actions [B,H,A] in simulator units, differentiable in the parameters, for off-policy actors."""
        raise TypeError(f"{type(self).__name__} cannot be sampled differentiably")

    def features(self, inputs: Inputs) -> Tensor:
        """[B,F] description of the observation for an algorithm's critics; not differentiated into the policy."""
        raise TypeError(f"{type(self).__name__} gives no features for a critic")

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by named group ("policy", "value", ...) for freezing and learning rates."""
        groups: dict[str, list[nn.Parameter]] = {"policy": [], "value": []}
        for name, parameter in self.named_parameters():
            groups["value" if name.startswith("value_head.") else "policy"].append(parameter)
        return groups

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.parameters()).device

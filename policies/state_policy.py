"""What the policies that see nothing but the state have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from embodied_rl.policies.base import Inputs, Policy
from embodied_rl.policies.mlp import StateNormaliser
from embodied_rl.types import Array, Observation


class StatePolicy(Policy):
    """Mixed into a policy, which sets `normaliser`."""

    normaliser: StateNormaliser

    def set_statistics(self, mean: Array, std: Array) -> None:
        """Normalise states with these statistics [S] from now on."""
        self.normaliser.fit(mean, std)

    def prepare(self, observation: Observation) -> Inputs:
        """{"state": float32 [B,S]}, a copy: the simulator overwrites its buffers."""
        return {"state": torch.asarray(observation.state, dtype=torch.float32, device=self.device, copy=True)}

    def features(self, inputs: Inputs) -> Tensor:
        """The normalised state [B,S]."""
        return self.normaliser(inputs["state"])

"""A flow policy whose initial noise a small actor chooses (DSRL, arXiv 2506.15799)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embodied_rl.policies.base import Inputs
from embodied_rl.policies.flow_policy import FlowPolicy
from embodied_rl.policies.squashed import SquashedGaussian, SquashedPolicy
from embodied_rl.randomness import RowNoise
from embodied_rl.types import ActionSample, Observation


class SteeredFlow(SquashedPolicy):
    """u times `bound` is where the flow's ODE starts: all H x D numbers, or with `shared` the D of every step alike. To
    the critics u is one choice for the chunk. The flow has parameter group "flow", which no off-policy algorithm
    trains."""

    def __init__(
        self, flow: FlowPolicy, features: int, hidden: Sequence[int], shared: bool, bound: float, seed: int
    ) -> None:
        """`features`: F of `flow.features`; `seed` initialises the actor."""
        super().__init__()
        self.flow = flow
        self.bound = bound
        self.observation_spec, self.action_spec = flow.observation_spec, flow.action_spec
        self.horizon, self.chunk = flow.horizon, flow.chunk
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.actor = SquashedGaussian(features, hidden, 1, flow.width * (1 if shared else flow.horizon))
        self.actor.to(flow.device)

    def prepare(self, observation: Observation) -> Inputs:
        return self.flow.prepare(observation)

    def features(self, inputs: Inputs) -> Tensor:
        """The flow's, without a gradient."""
        with torch.no_grad():
            return self.flow.features(inputs).float()

    @torch.no_grad()
    def decode(self, inputs: Inputs, latent: Tensor) -> Tensor:
        start = (self.bound * latent).view(len(latent), -1, self.flow.width).expand(-1, self.horizon, -1)
        return self.flow.follow(inputs, start.to(self.flow.dtype))

    def recorded(self, sample: ActionSample) -> Tensor:
        """u [B,1,Z]."""
        return sample.trace["x"].tanh()

    def to_latent(self, recorded: Tensor) -> Tensor:
        return recorded

    @torch.no_grad()
    def explore(self, inputs: Inputs, noise: RowNoise) -> ActionSample:
        """The flow's own noise, as far as `bound` lets it."""
        latent = self._drawn(noise.normal(*self.latent_shape)) / self.bound
        return self._sample(inputs, latent.clamp(-0.999, 0.999).atanh())

    def imitation_loss(self, inputs: Inputs, actions: Tensor, valid: Tensor) -> Tensor:
        """That of the flow."""
        return self.flow.imitation_loss(inputs, actions, valid)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"policy": list(self.actor.parameters()), "flow": list(self.flow.parameters())}

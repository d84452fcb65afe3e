"""Policies that soft actor-critic trains: a tanh-squashed Gaussian over a latent choice u in [-1, 1], which the policy
turns into a chunk. The critics see u and the features."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl.policies.base import Inputs, Policy
from embodied_rl.policies.flow import LOG_2PI, gaussian_entropy, gaussian_log_prob
from embodied_rl.policies.mlp import mlp
from embodied_rl.randomness import RowNoise
from embodied_rl.types import ActionSample, Score

LOG_STD = (-5.0, 2.0)
"""Range of the logarithm of the deviation before squashing."""
INSIDE = 1 - 1e-6
"""The largest u whose x is finite, as float32."""


class SquashedGaussian(nn.Module):
    """u = tanh(x), x ~ N(mean, std) independently, both from features [B,F]; L x Z numbers."""

    def __init__(self, inputs: int, hidden: Sequence[int], steps: int, width: int) -> None:
        super().__init__()
        self.shape = (steps, width)
        self.body = mlp(inputs, hidden, "relu")
        self.mean = nn.Linear(hidden[-1], steps * width)
        self.log_std = nn.Linear(hidden[-1], steps * width)

    def normalise(self, norm: Callable[[int], nn.Module]) -> None:
        """Put `norm(width)` before every linear layer."""
        layers: list[nn.Module] = []
        for layer in self.body:
            layers += [norm(layer.in_features), layer] if isinstance(layer, nn.Linear) else [layer]
        self.body = nn.Sequential(*layers, norm(self.mean.in_features)).to(self.mean.weight.device)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std) of x, each [B,L,Z]."""
        hidden = self.body(features)
        low, high = LOG_STD
        log_std = low + 0.5 * (high - low) * (self.log_std(hidden).tanh() + 1)
        return self.mean(hidden).unflatten(1, self.shape), log_std.exp().unflatten(1, self.shape)


def squashed_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Elementwise log-density of u = tanh(x) when x ~ N(mean, std) (arXiv 1801.01290, appendix C); the derivative
    1 - tanh(x)^2 is 4 / (e^x + e^-x)^2, which does not round to 0."""
    return gaussian_log_prob(x, mean, std) - log_slope(x)


def log_slope(x: Tensor) -> Tensor:
    """Elementwise log of the derivative of tanh."""
    return 2 * (math.log(2) - x - F.softplus(-2 * x))


class SquashedPolicy(Policy):
    """A subclass sets `actor` and gives `features` and `decode`. Parameters in group "policy" are the actor's, those in
    "encoder", where there is one, learn with the critics."""

    actor: SquashedGaussian

    @abstractmethod
    def decode(self, inputs: Inputs, latent: Tensor) -> Tensor:
        """Executable actions [B,K,A] for a latent choice [B,L,Z] in [-1, 1]."""

    @abstractmethod
    def to_latent(self, recorded: Tensor) -> Tensor:
        """The latent choice [B,L,Z] behind what `recorded` gave."""

    def recorded(self, sample: ActionSample) -> Tensor:
        """What a replay buffer keeps of a sample."""
        return sample.actions

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(L, Z)."""
        return self.actor.shape

    def propose(self, features: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(u [B,L,Z], its log-density [B]), differentiable in the actor's parameters; `noise` [B,L,Z] is standard
        normal, drawn when None."""
        mean, std = self.actor(features)
        noise = torch.randn_like(mean) if noise is None else noise
        x = mean + std * noise
        gaussian = (
            -0.5 * (noise.square() + LOG_2PI) - std.log()
        )  # of x; that (x - mean) / std is noise spares operations
        return x.tanh(), (gaussian - log_slope(x)).sum((1, 2))

    @torch.no_grad()
    def act(self, inputs: Inputs, deterministic: bool = False, noise: RowNoise | None = None) -> ActionSample:
        mean, std = self.actor(self.features(inputs))
        if deterministic:
            return ActionSample(self.decode(inputs, mean.tanh()), {})
        drawn = torch.randn_like(mean) if noise is None else self._drawn(noise.normal(*self.latent_shape))
        x = mean + std * drawn
        return self._sample(inputs, x, squashed_log_prob(x, mean, std).flatten(1))

    @torch.no_grad()
    def explore(self, inputs: Inputs, noise: RowNoise) -> ActionSample:
        """A sample that knows nothing: u uniform over its range."""
        latent = 2 * self._drawn(noise.uniform(*self.latent_shape)) - 1
        return self._sample(inputs, latent.clamp(-INSIDE, INSIDE).atanh())

    def evaluate_actions(self, inputs: Inputs, trace: dict[str, Tensor]) -> Score:
        """The entropy is that of x, before it is squashed."""
        mean, std = self.actor(self.features(inputs))
        steps, width = self.latent_shape
        step = torch.arange(steps) if steps == self.chunk else torch.full((steps,), -1)  # -1: the whole chunk
        log_prob = squashed_log_prob(trace["x"], mean, std)
        term_step = step.repeat_interleave(width).to(mean.device)
        return Score(log_prob.flatten(1), gaussian_entropy(std).flatten(1), term_step)

    def _sample(self, inputs: Inputs, x: Tensor, log_prob: Tensor | None = None) -> ActionSample:
        return ActionSample(self.decode(inputs, x.tanh()), {"x": x}, log_prob)

    def _drawn(self, noise: np.ndarray) -> Tensor:
        return torch.from_numpy(noise).to(self.device)

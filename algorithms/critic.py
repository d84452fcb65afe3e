"""Q-functions of off-policy algorithms: E independent networks evaluated as one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl.algorithms.batch_renorm import BatchRenorm
from embodied_rl.specs import ActionSpec
from embodied_rl.types import Observation

Norm = Literal["none", "layer", "batch_renorm"]


class EnsembleLinear(nn.Module):
    """E linear maps; weights [E,in,out], initialised like `nn.Linear`."""

    def __init__(self, ensemble: int, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(ensemble, inputs, outputs).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(ensemble, 1, outputs).uniform_(-bound, bound, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """[E,B,in] -> [E,B,out]."""
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleLayerNorm(nn.Module):
    """Layer normalisation with scale and shift per member."""

    def __init__(self, ensemble: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.scale = nn.Parameter(torch.ones(ensemble, 1, size))
        self.shift = nn.Parameter(torch.zeros(ensemble, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        """[E,B,size] -> [E,B,size]."""
        return torch.addcmul(self.shift, F.layer_norm(x, (self.size,), eps=1e-6), self.scale)


class CriticEnsemble(nn.Module):
    """Q(features, executed actions) by E networks.

    `norm` "layer": blocks of Linear, LayerNorm, ReLU (RLPD, arXiv 2302.02948); "batch_renorm": batch renormalisation of
    the input and after every Linear, ReLU (CrossQ, arXiv 1902.05605); "none": Linear, ReLU (SAC, arXiv 1812.05905).
    """

    def __init__(self, inputs: int, hidden: Sequence[int], ensemble: int, seed: int, norm: Norm = "layer") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [inputs, *hidden]
        layers: list[nn.Module] = [BatchRenorm(inputs, ensemble)] if norm == "batch_renorm" else []
        for size, width in itertools.pairwise(sizes):
            layers.append(EnsembleLinear(ensemble, size, width, generator))
            match norm:
                case "layer":
                    layers += [EnsembleLayerNorm(ensemble, width), nn.ReLU(inplace=True)]
                case "batch_renorm":
                    layers += [nn.ReLU(inplace=True), BatchRenorm(width, ensemble)]
                case "none":
                    layers.append(nn.ReLU(inplace=True))
        self.layers = nn.Sequential(*layers, EnsembleLinear(ensemble, sizes[-1], 1, generator))
        self.ensemble = ensemble

    @functools.cached_property
    def flat(self) -> list[Tensor]:
        """All parameters; to find them takes as long as to average them."""
        return list(self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """[B,inputs] -> [E,B]."""
        return self.layers(x.expand(self.ensemble, *x.shape)).squeeze(-1)


class ExecutedChunk:
    """Chunks as critics see them: limited to the action space, scaled to [-1, 1] where it is bounded, 0 where an action
    was never executed."""

    def __init__(self, spec: ActionSpec, device: torch.device) -> None:
        self.low, self.high = (torch.tensor(bound, device=device) for bound in (spec.low, spec.high))
        bounded = self.low.isfinite() & self.high.isfinite() & (self.low < self.high)
        self.center = torch.where(bounded, (self.low + self.high) / 2, 0.0)
        self.scale = torch.where(bounded, 2 / (self.high - self.low), 1.0)

    def __call__(self, actions: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B,K,A] in the simulator's units, executed where `valid` bool [B,K] (None = everywhere) -> [B,K*A]."""
        executed = (actions.clamp(self.low, self.high) - self.center) * self.scale
        if valid is not None:
            executed = torch.where(valid.unsqueeze(-1), executed, 0.0)
        return executed.flatten(1)


@torch.no_grad()
def polyak(target: CriticEnsemble, source: CriticEnsemble, tau: float) -> None:
    """target <- (1 - tau) * target + tau * source."""
    torch._foreach_lerp_(target.flat, source.flat, tau)  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def feature_size(policy: Any) -> int:
    """F, read off the features of an all-zero observation."""
    spec = policy.observation_spec
    zero = Observation(
        images={name: np.zeros((1, c.height, c.width, 3), np.uint8) for name, c in spec.cameras.items()},
        image_mask={name: np.ones(1, bool) for name in spec.cameras},
        state=np.zeros((1, spec.state), np.float32),
        instruction_id=np.zeros(1, np.int64),
        task=np.zeros(1, np.int64),
        instructions=("",),
        privileged=np.zeros((1, spec.privileged), np.float32) if spec.privileged else None,
    )
    return policy.features(policy.prepare(zero)).shape[1]

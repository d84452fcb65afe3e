"""What the small policies are made of: multi-layer perceptrons, and the two maps between the simulator's units and
the network's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies.base import require_continuous
from embodied_rl.policies.normalization import CONSTANT
from embodied_rl.specs import ActionSpec, ObservationSpec, pick_state
from embodied_rl.types import Array


def _tanh(x: Tensor) -> Tensor:
    """2 sigmoid(2x) - 1 in place of x, to 2e-7."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = _tanh(x)
        ctx.mark_dirty(y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.ops.aten.tanh_backward(*gradients, *ctx.saved_tensors)


class Tanh(nn.Module):
    """tanh of an input that nobody needs again. On the CPU by torch's sigmoid, which takes a sixth of the time of its
    tanh there."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return x.tanh()
        return _Tanh.apply(x) if x.requires_grad else _tanh(x)  # pyright: ignore[reportReturnType]


Activation = Literal["relu", "tanh", "silu", "gelu"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": functools.partial(nn.ReLU, inplace=True),  # linear layers do not need their output again
    "tanh": Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}

CLIP = 10.0
"""Bound of the normalised state: a dimension that hardly moves in the demonstrations may move far from them in RL."""


def mlp(inputs: int, hidden: Sequence[int], activation: Activation, outputs: int | None = None) -> nn.Sequential:
    """Linear layers with an activation after each of `hidden`, and a linear layer to `outputs` unless None."""
    widths = [inputs, *hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
    if outputs is not None:
        layers.append(nn.Linear(widths[-1], outputs))
    return nn.Sequential(*layers)


def orthogonal(network: nn.Sequential, last_gain: float) -> nn.Sequential:
    """Orthogonal weights (gain sqrt 2, `last_gain` in the last layer) and zero biases, the custom of PPO."""
    linears = [layer for layer in network if isinstance(layer, nn.Linear)]
    for layer in linears:
        nn.init.orthogonal_(layer.weight, last_gain if layer is linears[-1] else math.sqrt(2))
        nn.init.zeros_(layer.bias)
    return network


class StateNormaliser(nn.Module):
    """Standardises state [B,S] with statistics fitted once; the identity until then. They travel in the state dict."""

    state_mean: Tensor
    state_std: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("state_mean", torch.zeros(size))
        self.register_buffer("state_std", torch.ones(size))

    def fit(self, mean: Array, std: Array) -> None:
        """Set the statistics [S]; raises `UserError` when their size is wrong or they are not finite."""
        mean, std = torch.as_tensor(mean).to(self.state_mean), torch.as_tensor(std).to(self.state_std)
        if mean.shape != self.state_mean.shape or std.shape != self.state_std.shape:
            raise UserError(
                f"state statistics: shape {tuple(mean.shape)}, the policy's is {tuple(self.state_mean.shape)}"
            )
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise UserError("state statistics: mean or std is not finite; look for NaN in the demonstrations")
        self.state_mean.copy_(mean)
        self.state_std.copy_(torch.where(std > CONSTANT, std, 1.0))

    def forward(self, state: Tensor) -> Tensor:
        """[B,S] -> [B,S], in [-10, 10]."""
        return ((state - self.state_mean) / self.state_std).clamp(-CLIP, CLIP)


class ActionScale(nn.Module):
    """The affine map between the network's actions, nominally [-1, 1], and the simulator's [low, high]."""

    low: Tensor
    high: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, spec: ActionSpec) -> None:
        super().__init__()
        require_continuous(spec)
        low, high = torch.tensor(spec.low), torch.tensor(spec.high)
        if not (torch.isfinite(low).all() and torch.isfinite(high).all() and (low < high).all()):
            raise SpecError(f"the policy needs finite action bounds with low < high, got {spec.low} and {spec.high}")
        for name, value in {"low": low, "high": high, "scale": (high - low) / 2, "offset": (high + low) / 2}.items():
            self.register_buffer(name, value, persistent=False)  # known from the action spec

    def to_simulator(self, x: Tensor) -> Tensor:
        """[...,A] in network units -> simulator units, clipped to the bounds (no gradient beyond them)."""
        return torch.clamp(x * self.scale + self.offset, self.low, self.high)

    def to_network(self, actions: Tensor) -> Tensor:
        """[...,A] in simulator units -> network units."""
        return (actions - self.offset) / self.scale


def state_spec(policy: str, spec: ObservationSpec, names: Sequence[str]) -> ObservationSpec:
    """What a policy that reads only `names` of the state (see `pick_state`) needs of a simulator's `spec`; raises
    `SpecError` without a state."""
    if spec.state < 1:
        raise SpecError(
            f"policy '{policy}' reads the state, but the simulator emits none; pick another observation mode"
        )
    return pick_state(spec, names)

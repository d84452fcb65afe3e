"""What the small policies are made of: multi-layer perceptrons, and the two maps between the simulator's units and
the network's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import batched, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies.base import require_continuous
from embodied_rl.policies.normalization import CONSTANT
from embodied_rl.specs import ActionSpec, ObservationSpec, pick_state
from embodied_rl.types import Array


def _tanh(x: Tensor) -> Tensor:
    """2 sigmoid(2x) - 1 in place of x, to 2e-7, in a sixth of the time that torch's tanh takes on the CPU."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


Activation = Literal["relu", "tanh", "silu", "gelu"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": functools.partial(nn.ReLU, inplace=True),  # linear layers do not need their output again
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}

CLIP = 10.0
"""Bound of the normalised state: a dimension that hardly moves in the demonstrations may move far from them in RL."""


class MLP(nn.Sequential):
    """Linear layers with an activation after each but the last. For tanh of rows on the CPU there is a faster way."""

    def forward(self, x: Tensor) -> Tensor:
        known = isinstance(self[1], nn.Tanh) and x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 2
        if not known or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        weights = [parameter for layer in list(self)[::2] for parameter in (layer.weight, layer.bias)]
        return _TanhNetwork.apply(x, *weights)  # pyright: ignore[reportReturnType]


class _TanhNetwork(torch.autograd.Function):
    """Linear layers with tanh between them, their gradients worked out in one call and in place: autograd's own calls
    take a twentieth of the time that such a network learns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        inputs = [x]
        for weight, bias in batched(weights[:-2], 2):
            inputs.append(_tanh(torch.addmm(bias, inputs[-1], weight.t())))
        ctx.save_for_backward(*inputs, *weights[::2])
        return torch.addmm(weights[-1], inputs[-1], weights[-2].t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        layers = len(ctx.saved_tensors) // 2
        inputs, weights = ctx.saved_tensors[:layers], ctx.saved_tensors[layers:]
        gradient, found = gradients[0], list[Tensor | None]()
        for layer in reversed(range(layers)):
            found += [gradient.sum(0), gradient.t().mm(inputs[layer])]
            if layer:
                gradient = gradient.mm(weights[layer])
                torch.ops.aten.tanh_backward.grad_input(gradient, inputs[layer], grad_input=gradient)
        wanted = gradient.mm(weights[0]) if ctx.needs_input_grad[0] else None
        return wanted, *reversed(found)


def mlp(inputs: int, hidden: Sequence[int], activation: Activation, outputs: int | None = None) -> nn.Sequential:
    """Linear layers with an activation after each of `hidden`, and a linear layer to `outputs` unless None."""
    widths = [inputs, *hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
    if outputs is None or not hidden:
        return nn.Sequential(*layers, *([] if outputs is None else [nn.Linear(widths[-1], outputs)]))
    return MLP(*layers, nn.Linear(widths[-1], outputs))


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

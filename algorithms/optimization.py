"""What every algorithm does around a loss: seeding, stepping optimizers, refusing numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl.errors import UserError

Optimizers = Mapping[str, torch.optim.Optimizer]


def seed_policy_draws(generator: torch.Generator, device: torch.device) -> None:
    """Seed torch's global generator, which policies draw from, so that an update is a function of its `generator`."""
    seed = int(torch.randint(2**62, (), generator=generator))
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def actor_parameters(policy: Any) -> list[nn.Parameter]:
    """All parameters of `policy` but its value head's, by whatever names it groups them."""
    return [parameter for name, group in policy.parameter_groups().items() if name != "value" for parameter in group]


def adam(
    parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float = 0.0, beta2: float = 0.999
) -> torch.optim.AdamW:
    """AdamW (plain Adam without decay) of the parameters that are not frozen, fused into one kernel per step. Raises
    `UserError` when all are frozen."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise UserError("nothing to train: the policy has no unfrozen parameter of the kind this algorithm improves")
    fused = not trained[0].is_meta  # where there are no numbers there is no kernel
    return torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, beta2), weight_decay=weight_decay, fused=fused)


def backward(loss: Tensor, optimizers: Optimizers, add: bool = False) -> dict[str, Tensor]:
    """Gradients of `loss` for the parameters of `optimizers` and of nothing else, in place of what was there before, or
    added to it. Returns the gradient norm [] of each optimizer's own parameters."""
    Differentiation().add(loss, optimizers, first=not add)
    return gradient_norms(optimizers)


def gradient_norms(optimizers: Optimizers) -> dict[str, Tensor]:
    """[], of each optimizer's own parameters as one vector; 0 where there are no gradients."""
    return {name: _norm(gradients(optimizer)) for name, optimizer in optimizers.items()}


class Differentiation:
    """How the gradients of a minibatch come about: here, in one process that differentiates all of its rows.

    The rows may be split over `ranks` processes instead, each of which differentiates its own, with every mean taken
    over the rows of all: a subclass adds up what the ranks found.
    """

    rank = 0
    """Which of them this is."""
    ranks = 1

    def __init__(self, precision: torch.dtype = torch.float32) -> None:
        self._precision = precision

    def computing(self, device: torch.device) -> AbstractContextManager[Any]:
        """Around what is computed with the weights: matrix products in this precision."""
        if self._precision == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, self._precision)

    def add(self, loss: Tensor, optimizers: Optimizers, first: bool) -> None:
        """Gradients of `loss` for the parameters of `optimizers` and of nothing else, in place of what was there before
        the `first` of a minibatch, or added to it."""
        parameters = [parameter for optimizer in optimizers.values() for parameter in parameters_of(optimizer)]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if not first and parameter.grad is not None:
                gradient = parameter.grad if gradient is None else parameter.grad + gradient
            parameter.grad = gradient

    def total(
        self, optimizers: Optimizers, metrics: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Make the gradients those of the whole minibatch; returns (norm [] of each optimizer's, metrics [] of it)."""
        return gradient_norms(optimizers), dict(metrics)

    def sum(self, tensor: Tensor) -> Tensor:
        """Of all ranks."""
        return tensor


def apply(optimizers: Optimizers, norms: Mapping[str, Tensor], max_grad_norm: float) -> None:
    """Clip each optimizer's gradients by its own norm, step, and leave no gradient behind."""
    for name, optimizer in optimizers.items():
        if max_grad_norm < math.inf and (found := gradients(optimizer)):
            scale = (max_grad_norm / (norms[name] + 1e-6)).clamp(max=1)
            torch._foreach_mul_(found, scale)  # pyright: ignore[reportPrivateImportUsage]
        optimizer.step()
        for parameter in parameters_of(optimizer):
            parameter.grad = None


def step(loss: Tensor, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
    """`backward` and `apply` for one optimizer; returns the gradient norm [] before clipping."""
    norms = backward(loss, {"": optimizer})
    apply({"": optimizer}, norms, max_grad_norm)
    return norms[""]


def read_finite(tensors: Mapping[str, Tensor], update: int) -> dict[str, float]:
    """The values of scalar tensors, in one host synchronisation. Raises `UserError` naming the first not finite."""
    values = dict(
        zip(tensors, torch.stack([tensor.detach().float() for tensor in tensors.values()]).tolist(), strict=True)
    )
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} is {value} in update {update}: lower the learning rate, or check rewards and observations"
            )
    return values


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All that it moves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Of the parameters that it moves, where there are any."""
    return [parameter.grad for parameter in parameters_of(optimizer) if parameter.grad is not None]


def _norm(tensors: list[Tensor]) -> Tensor:
    """[], of all of them as one vector; 0 of none."""
    if not tensors:
        return torch.zeros(())
    each = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.stack(each))

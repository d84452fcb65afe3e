"""What every algorithm does around a loss: seeding, stepping an optimizer, refusing numbers that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from embodied_rl.errors import UserError


def seed_policy_draws(generator: torch.Generator, device: torch.device) -> None:
    """Seed torch's global generator, which policies draw from, so that an update is a function of its `generator`."""
    seed = int(torch.randint(2**62, (), generator=generator))
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in parameters if parameter.requires_grad]


def adam(parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW (plain Adam without decay), fused: one kernel per step instead of ten per parameter."""
    return torch.optim.AdamW(trainable(parameters), lr=learning_rate, weight_decay=weight_decay, fused=True)


def step(optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float, retain_graph: bool = False) -> Tensor:
    """One step on `loss`, differentiated with respect to this optimizer's parameters and nothing else, so that no
    gradient is left behind for another optimizer. Returns the gradient norm [] before clipping."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(tensors: Mapping[str, Tensor | float], update: int) -> None:
    """Raise `UserError` naming the first tensor that is not finite; one host synchronisation for all of them."""
    names = list(tensors)
    finite = torch.stack([torch.as_tensor(tensors[name]).detach().float().isfinite().all() for name in names])
    for name, good in zip(names, finite.tolist(), strict=True):
        if not good:
            raise UserError(
                f"{name} is not finite in update {update}: lower the learning rate, or check rewards and observations"
            )

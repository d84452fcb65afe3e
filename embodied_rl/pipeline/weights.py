"""The weights of a policy on their way to its replicas: what is frozen crosses once, what changes as one flat array."""

from __future__ import annotations

import copy
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rl.pipeline.transfer import Packed


def frozen(policy: nn.Module) -> list[Tensor]:
    """What learning leaves alone."""
    return [each for each in policy.parameters() if not each.requires_grad]


def changing(policy: nn.Module) -> list[Tensor]:
    """Trained parameters, and buffers, which statistics are kept in."""
    return [*(each for each in policy.parameters() if each.requires_grad), *policy.buffers()]


def bucket(policy: nn.Module) -> np.ndarray:
    """The bytes of all that changes, one after the other."""
    parts = [Packed.of(tensor).bytes for tensor in changing(policy)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


@torch.no_grad()
def take_over(policy: nn.Module, weights: np.ndarray) -> None:
    """Write a `bucket` of a policy with the same structure."""
    tensors = changing(policy)
    bounds = list(accumulate([tensor.nbytes for tensor in tensors], initial=0))
    if bounds[-1] != len(weights):
        raise RuntimeError(f"{len(weights)} bytes of weights for a policy with {bounds[-1]}")
    for tensor, (start, stop) in zip(tensors, pairwise(bounds), strict=True):
        part = weights[start:stop].copy()  # aligned, and small beside the policy
        tensor.copy_(Packed(part, tensor.dtype, tuple(tensor.shape)).tensor())


class Structure:
    """A policy without its weights, to be completed elsewhere."""

    def __init__(self, policy: Any) -> None:
        empty: dict[int, Any] = {}
        for parameter in policy.parameters():
            nothing = torch.empty(0, dtype=parameter.dtype)
            empty[id(parameter)] = nn.Parameter(nothing, requires_grad=parameter.requires_grad)
        for buffer in policy.buffers():
            empty[id(buffer)] = torch.empty(0, dtype=buffer.dtype)
        self._policy = copy.deepcopy(policy, empty)
        self._shapes = [tuple(tensor.shape) for tensor in changing(policy)]

    def complete(self, weights: list[Packed], device: torch.device) -> Any:
        """The policy on `device`, with `weights` for what is frozen and none yet for what changes. On the CPU it shares
        the memory of `weights`."""
        for tensor, packed in zip(frozen(self._policy), weights, strict=True):
            tensor.data = packed.tensor().to(device)
        for tensor, shape in zip(changing(self._policy), self._shapes, strict=True):
            tensor.data = torch.empty(shape, dtype=tensor.dtype, device=device)
        return self._policy

"""Tensors as arrays of bytes, which cross process borders without a copy, and batches made of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from embodied_rl.pipeline.segment import Memory
from embodied_rl.types import Trajectory


class Packed(NamedTuple):
    """A tensor of any type and device."""

    bytes: np.ndarray
    dtype: torch.dtype
    shape: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> Packed:
        """Shares the memory of a contiguous tensor of the CPU."""
        flat = tensor.detach().cpu().contiguous().flatten()
        return Packed(flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape))

    def tensor(self) -> Tensor:
        """Shares the memory of `bytes`: not to be written where that cannot be."""
        if not self.bytes.size:  # which torch does not view as anything
            return torch.empty(self.shape, dtype=self.dtype)
        with warnings.catch_warnings():  # what comes out of Ray's shared memory cannot be written
            warnings.simplefilter("ignore")
            return torch.from_numpy(self.bytes).view(self.dtype).view(self.shape)


def pack(batch: Any) -> Any:
    """A `Trajectory` or `EpisodeBatch` whose tensors are `Packed`."""
    return _map(batch, lambda value: Packed.of(value) if isinstance(value, Tensor) else value)


def unpack(batch: Any) -> Any:
    """The inverse of `pack`."""
    return _map(batch, lambda value: value.tensor() if isinstance(value, Packed) else value)


def side_by_side(parts: Sequence[Trajectory], memory: Memory, device: torch.device) -> Trajectory:
    """One segment whose rows are those of the `parts`, in order; a single part is not copied."""

    def joined(name: str, tensors: list[Tensor]) -> Tensor:
        axis = 0 if name == "last_value" else 1
        if len(tensors) == 1:
            return tensors[0].to(device)
        sizes = [tensor.shape[axis] for tensor in tensors]
        shape = list(tensors[0].shape)
        shape[axis] = sum(sizes)
        whole = memory.empty(tuple(shape), tensors[0])
        for view, tensor in zip(whole.split(sizes, axis), tensors, strict=True):
            view.copy_(tensor)
        return whole.to(device)

    changes: dict[str, Any] = {}
    for field in fields(Trajectory):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], dict):
            changes[field.name] = {key: joined(key, [value[key] for value in values]) for key in values[0]}
        elif isinstance(values[0], Tensor):
            changes[field.name] = joined(field.name, values)
    episodes = sorted((each for part in parts for each in part.episodes), key=lambda episode: episode.ticket)
    return replace(parts[0], episodes=episodes, **changes)


def _map(batch: Any, function: Callable[[Any], Any]) -> Any:
    def each(value: Any) -> Any:
        return {key: function(item) for key, item in value.items()} if isinstance(value, dict) else function(value)

    return replace(batch, **{field.name: each(getattr(batch, field.name)) for field in fields(batch)})

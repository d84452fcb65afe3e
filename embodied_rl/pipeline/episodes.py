"""Batches of whole episodes, put together from decisions in whatever order they came; every image is held once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from embodied_rl.types import EpisodeBatch


class Episodes:
    """Decisions of whole episodes, in parts that are put together as they come: an array larger than glibc's mmap
    threshold (32 MB) goes back to the system when it is freed, and many small ones stay with the process."""

    _LARGE = 64 * 2**20
    """Bytes of the largest tensor of a part."""

    def __init__(self) -> None:
        self.parts: list[EpisodeBatch] = []
        self._large = 0
        """How many of the parts are."""
        self._small = 0
        """Bytes of what the others would be together."""

    def add(self, part: EpisodeBatch) -> None:
        self.parts.append(part)
        self._small += max(tensor.nbytes for tensor in part.inputs.values())
        if self._small >= self._LARGE:
            self.parts[self._large :] = [combine(self.parts[self._large :], torch.cat)]
            self._large, self._small = self._large + 1, 0

    def drop(self, tickets: np.ndarray) -> None:
        """Nothing of lost episodes is learned from."""
        lost = torch.from_numpy(tickets)
        self.parts = [selected(part, ~torch.isin(part.tickets, lost)) for part in self.parts]


def combine(parts: Sequence[EpisodeBatch], function: Callable[[list[torch.Tensor]], torch.Tensor]) -> EpisodeBatch:
    """One batch of the episodes of all `parts`; each of its tensors is a function of theirs of the same name. Leaves
    the parts without inputs, so that there is one tensor at most in two copies."""

    def each(name: str) -> Any:
        columns = [getattr(part, name) for part in parts]
        if isinstance(columns[0], dict):
            return {key: function([column.pop(key) for column in columns]) for key in list(columns[0])}
        return function(columns)

    names = ("inputs", "trace", "log_prob", "reward", "valid", "tickets")
    episodes = [episode for part in parts for episode in part.episodes]
    return EpisodeBatch(**{name: each(name) for name in names}, version=parts[0].version, episodes=episodes)


def selected(batch: EpisodeBatch, rows: torch.Tensor) -> EpisodeBatch:
    """The decisions `rows` (bool [R] or their numbers), and all episodes; see `combine`."""
    return combine([batch], lambda tensors: tensors[0][rows.to(tensors[0].device)])


def in_order(parts: Sequence[EpisodeBatch]) -> EpisodeBatch:
    """One batch of whole episodes in the order of their tickets; those of an episode stay in theirs. See `combine`."""
    tickets = [part.tickets for part in parts]
    order = torch.cat(tickets).argsort(stable=True)
    places = order.argsort().split([len(part) for part in tickets])

    def placed(tensors: list[torch.Tensor]) -> torch.Tensor:
        whole = tensors[0].new_empty((len(order), *tensors[0].shape[1:]))
        for place in places:
            whole[place.to(whole.device)] = tensors.pop(0)  # and its memory is given back
        return whole

    batch = combine(parts, placed)
    batch.episodes.sort(key=lambda episode: episode.ticket)
    return batch

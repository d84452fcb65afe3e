"""Named arrays laid out one after the other in a file descriptor that two processes map."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping

import numpy as np

Fields = Mapping[str, tuple[str, tuple[int, ...]]]
"""{name: (dtype, shape)}; the order is the layout."""

_LINE = 64
"""Every array starts on a cache line."""


def size(fields: Fields) -> int:
    """Bytes that `fields` need."""
    return _offsets(fields)[1]


def map_arrays(descriptor: int, start: int, fields: Fields) -> dict[str, np.ndarray]:
    """The arrays at byte `start` (a multiple of the page size) of the file. The mapping lives as long as any of them,
    also after `descriptor` is closed."""
    offsets, length = _offsets(fields)
    memory = mmap.mmap(descriptor, length, offset=start)
    return {
        name: np.ndarray(shape, dtype, buffer=memory, offset=offset)
        for (name, (dtype, shape)), offset in zip(fields.items(), offsets, strict=True)
    }


class SharedMemory:
    """An anonymous file that only grows: a block once handed out keeps its place, so arrays mapped over an earlier
    block stay valid when a larger one follows. Leaves nothing in the file system."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("embodied_rl")
        self._end = 0

    def allocate(self, fields: Fields) -> tuple[int, dict[str, np.ndarray]]:
        """A new block of zeros: (its first byte, its arrays)."""
        start = self._end
        self._end += -(-size(fields) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        os.ftruncate(self.descriptor, self._end)
        return start, map_arrays(self.descriptor, start, fields)

    def close(self) -> None:
        """Close the file; arrays already mapped stay valid. May be called twice."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _offsets(fields: Fields) -> tuple[list[int], int]:
    offsets, end = [], 0
    for dtype, shape in fields.values():
        offsets.append(end)
        end += -(-math.prod(shape) * np.dtype(dtype).itemsize // _LINE) * _LINE
    return offsets, max(end, _LINE)

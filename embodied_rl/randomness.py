"""Random numbers that belong to a row, not to a batch.

Policy noise is a pure function of (run seed, ticket, decision): the same episode sees the same noise whatever the
batch it is computed in, the number of workers or the executor.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

Draw = Callable[[np.random.Generator, np.ndarray], object]
"""Fills an array [X] from a stream."""


class _Generators(threading.local):
    """Of this thread, for all streams: setting the state of a generator takes a tenth of the time of making another."""

    def __init__(self) -> None:
        philox = np.random.Philox(0)
        self.mine = philox, np.random.Generator(philox)


_generators = _Generators()


class RowNoise:
    """Noise for B rows, drawn from one counter-based stream per row.

    Successive calls go on in each row's stream, so a policy may draw as often as it needs. Philox is keyed by
    (seed, ticket) and its counter starts at the decision, which leaves 2^64 draws to every decision.
    """

    def __init__(self, seed: int, tickets: np.ndarray, decisions: np.ndarray, copies: int = 1) -> None:
        """With `copies` > 1 there are B * copies rows, the copies of a row next to each other, all different; the first
        is what it is without copies."""
        self._key = seed, tickets, decisions
        self._first: Callable[[np.random.Generator], object] | None = None
        """The first draw of a row, repeated when there is a second: reading a state takes as long as drawing, and many
        policies draw once."""
        self._again = False
        """There was a second."""
        self._states = [
            _fresh(seed, ticket, decision, copy)
            for ticket, decision in zip(tickets.tolist(), decisions.tolist(), strict=True)
            for copy in range(copies)
        ]

    def copies(self, count: int) -> RowNoise:
        """Fresh noise for `count` copies of every row."""
        return RowNoise(*self._key, copies=count)

    def __len__(self) -> int:
        return len(self._states)

    def normal(self, *shape: int) -> np.ndarray:
        """Standard normal float32 [B,*shape]."""
        return self._drawn(np.float32, shape, lambda stream, row: stream.standard_normal(dtype=np.float32, out=row))

    def uniform(self, *shape: int) -> np.ndarray:
        """Uniform float32 [B,*shape] in [0, 1)."""
        return self._drawn(np.float32, shape, lambda stream, row: stream.random(dtype=np.float32, out=row))

    def integers(self, high: int, *shape: int) -> np.ndarray:
        """Uniform int64 [B,*shape] in [0, high)."""

        def draw(stream: np.random.Generator, row: np.ndarray) -> None:
            row[...] = stream.integers(high, size=row.shape, dtype=np.int64)

        return self._drawn(np.int64, shape, draw)

    def _drawn(self, kind: type, shape: tuple[int, ...], draw: Draw) -> np.ndarray:
        """[B,*shape] that `draw` fills, row by row."""
        philox, stream = _generators.mine
        drawn = np.empty((len(self), math.prod(shape)), kind)
        if self._first is None:
            forgotten = np.empty(drawn.shape[1], kind)
            self._first = lambda stream: draw(stream, forgotten)
            for row, state in zip(drawn, self._states, strict=True):
                philox.state = state
                draw(stream, row)
            return drawn.reshape(len(self), *shape)
        for index, state in enumerate(self._states):
            philox.state = state
            if not self._again:
                self._first(stream)
            draw(stream, drawn[index])
            self._states[index] = philox.state
        self._again = True
        return drawn.reshape(len(self), *shape)


def _fresh(seed: int, ticket: int, decision: int, copy: int) -> Any:
    """The state of Philox at the start of a row's stream."""
    return {
        "bit_generator": "Philox",
        "state": {"counter": [0, int(decision), copy, 0], "key": [seed % 2**64, ticket % 2**64]},
        "buffer": [0] * 4,
        "buffer_pos": 4,  # used up
        "has_uint32": 0,
        "uinteger": 0,
    }

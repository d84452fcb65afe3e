"""Random numbers that belong to a row, not to a batch.

Policy noise is a pure function of (run seed, ticket, decision): the same episode sees the same noise whatever the
batch it is computed in, the number of workers or the executor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np


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
        self._philox, self._generator = _generators.mine
        self._draws: list[Callable[[], Any]] = []
        """So far; the first one is repeated when there is a second, because reading a state takes as long as drawing,
        and many policies draw once."""
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
        return self._drawn(np.float32, shape, lambda: self._generator.standard_normal(shape, dtype=np.float32))

    def uniform(self, *shape: int) -> np.ndarray:
        """Uniform float32 [B,*shape] in [0, 1)."""
        return self._drawn(np.float32, shape, lambda: self._generator.random(shape, dtype=np.float32))

    def integers(self, high: int, *shape: int) -> np.ndarray:
        """Uniform int64 [B,*shape] in [0, high)."""
        return self._drawn(np.int64, shape, lambda: self._generator.integers(high, size=shape, dtype=np.int64))

    def _drawn(self, kind: type, shape: tuple[int, ...], draw: Callable[[], Any]) -> np.ndarray:
        drawn = np.empty((len(self), *shape), kind)
        self._draws.append(draw)
        for row, state in enumerate(self._states):
            self._philox.state = state
            if len(self._draws) == 2:
                self._draws[0]()
            drawn[row] = draw()
            if len(self._draws) > 1:
                self._states[row] = self._philox.state
        return drawn


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

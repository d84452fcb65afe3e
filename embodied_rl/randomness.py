"""Random numbers that belong to a row, not to a batch.

Policy noise is a pure function of (run seed, ticket, decision): the same episode sees the same noise whatever the
batch it is computed in, the number of workers or the executor.
"""

from __future__ import annotations

import numpy as np


class RowNoise:
    """Noise for B rows, drawn from one counter-based stream per row.

    Successive calls go on in each row's stream, so a policy may draw as often as it needs. Philox is keyed by
    (seed, ticket) and its counter starts at the decision, which leaves 2^64 draws to every decision.
    """

    def __init__(self, seed: int, tickets: np.ndarray, decisions: np.ndarray, copies: int = 1) -> None:
        """With `copies` > 1 there are B * copies rows, the copies of a row next to each other, all different; the first
        is what it is without copies."""
        self._key = seed, tickets, decisions
        self._rows = [
            np.random.Generator(
                np.random.Philox(
                    key=np.array([seed, ticket], dtype=np.int64).view(np.uint64),
                    counter=np.array([0, decision, copy, 0], dtype=np.uint64),
                )
            )
            for ticket, decision in zip(tickets, decisions, strict=True)
            for copy in range(copies)
        ]

    def copies(self, count: int) -> RowNoise:
        """Fresh noise for `count` copies of every row."""
        return RowNoise(*self._key, copies=count)

    def __len__(self) -> int:
        return len(self._rows)

    def normal(self, *shape: int) -> np.ndarray:
        """Standard normal float32 [B,*shape]."""
        return np.stack([row.standard_normal(shape, dtype=np.float32) for row in self._rows])

    def uniform(self, *shape: int) -> np.ndarray:
        """Uniform float32 [B,*shape] in [0, 1)."""
        return np.stack([row.random(shape, dtype=np.float32) for row in self._rows])

    def integers(self, high: int, *shape: int) -> np.ndarray:
        """Uniform int64 [B,*shape] in [0, high)."""
        return np.stack([row.integers(high, size=shape, dtype=np.int64) for row in self._rows])

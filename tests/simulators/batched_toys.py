"""Toy environments that a worker steps together."""

from __future__ import annotations

from typing import Any

from simulator_toys import Counter, Together


class CountersTogether(Together):
    """`Counter`s, constructed the way a worker does it."""

    def __init__(self, num_envs: int, **kwargs: Any) -> None:
        super().__init__([Counter(**kwargs) for _ in range(num_envs)])

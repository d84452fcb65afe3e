"""Sides by turns, and the CPU time they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Side:
    """Something that does `amount` units of work when it is called."""

    run: Callable[[], None]
    amount: float

    def rate(self) -> float:
        """Units per CPU second of one call."""
        start = time.process_time()
        self.run()
        return self.amount / (time.process_time() - start)


def repeat(function: Callable[[], Any], times: int) -> Callable[[], None]:
    """A function that calls `function` so many times."""

    def run() -> None:
        for _ in range(times):
            function()

    return run


def compare(section: str, unit: str, sides: Mapping[str, Side], floors: Mapping[str, Side], rounds: int) -> Any:
    """Rates of all sides, "ours" first, and ratios ours / other; every round in another order.

    `floors` are parts of the work that nobody can do without: their rates, and as {section}_floor that of doing them
    one after the other; {section}_of_floor is the share of it that ours reaches.
    """
    everything = {**sides, **floors}
    for side in everything.values():
        side.run()  # warm up
    rates: dict[str, list[float]] = {name: [] for name in everything}
    for turn in range(rounds):
        names = list(everything)
        for name in names if turn % 2 == 0 else reversed(names):
            rates[name].append(everything[name].rate())
    floor = [1 / sum(1 / rates[name][turn] for name in floors) for turn in range(rounds)]
    found: dict[str, Any] = {f"{section}_{unit}_per_cpu_second": {}}
    for name in everything:
        rate = statistics.median(rates[name])
        found[f"{section}_{unit}_per_cpu_second"][name] = round(rate, 1)
        print(f"{section:4} {name:22} {rate:10.1f} {unit} per CPU second", flush=True)
    for name in sides:
        if name != "ours":
            found |= _ratio(f"{section}_vs_{name}", rates["ours"], rates[name])
    found[f"{section}_floor"] = round(statistics.median(floor), 1)
    return found | _ratio(f"{section}_of_floor", rates["ours"], floor)


def _ratio(key: str, ours: list[float], other: list[float]) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(ours, other, strict=True))
    print(f"{key:22} {statistics.median(ratios):.3f}  ({ratios[0]:.3f} to {ratios[-1]:.3f})", flush=True)
    return {key: round(statistics.median(ratios), 3), f"{key}_range": [round(ratios[0], 3), round(ratios[-1], 3)]}

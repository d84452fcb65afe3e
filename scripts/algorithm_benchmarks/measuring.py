"""Sides by turns, and the time they take."""

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

    def rate(self, clock: Callable[[], float]) -> float:
        """Units per second of one call."""
        start = clock()
        self.run()
        return self.amount / (clock() - start)


def repeat(function: Callable[[], Any], times: int) -> Callable[[], None]:
    """A function that calls `function` so many times."""

    def run() -> None:
        for _ in range(times):
            function()

    return run


def compare(section: str, unit: str, sides: Mapping[str, Side], floors: Mapping[str, Side], rounds: int) -> Any:
    """Rates of all sides per CPU second, "ours" first, and ratios ours / other; every round in another order.

    `floors` are parts of the work that nobody can do without: their rates, and as {section}_floor that of doing them
    one after the other; {section}_of_floor is the share of it that ours reaches.
    """
    rates = _rates({**sides, **floors}, rounds, time.process_time)
    floor = [1 / sum(1 / rates[name][turn] for name in floors) for turn in range(rounds)]
    found = _medians(section, f"{unit}_per_cpu_second", rates)
    for name in sides:
        if name != "ours":
            found |= _ratio(f"{section}_vs_{name}", rates["ours"], rates[name])
    found[f"{section}_floor"] = round(statistics.median(floor), 1)
    return found | _ratio(f"{section}_of_floor", rates["ours"], floor)


def race(section: str, unit: str, ours: Side, others: Mapping[str, Side], rounds: int) -> Any:
    """Rates by the clock on the wall, and the ratio of ours to the fastest of `others` in each round."""
    rates = _rates({"ours": ours, **others}, rounds, time.perf_counter)
    fastest = [max(rates[name][turn] for name in others) for turn in range(rounds)]
    return _medians(section, f"{unit}_per_second", rates) | _ratio(f"{section}_ratio", rates["ours"], fastest)


def _rates(sides: Mapping[str, Side], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    for side in sides.values():
        side.run()  # warm up
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            rates[name].append(sides[name].rate(clock))
    return rates


def _medians(section: str, what: str, rates: Mapping[str, list[float]]) -> dict[str, Any]:
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{section:4} {name:22} {rate:10.1f} {what.replace('_', ' ')}", flush=True)
    return {f"{section}_{what}": medians}


def _ratio(key: str, ours: list[float], other: list[float]) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(ours, other, strict=True))
    print(f"{key:22} {statistics.median(ratios):.3f}  ({ratios[0]:.3f} to {ratios[-1]:.3f})", flush=True)
    return {key: round(statistics.median(ratios), 3), f"{key}_range": [round(ratios[0], 3), round(ratios[-1], 3)]}

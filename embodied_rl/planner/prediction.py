"""Whether iterations take as long as a plan said."""

from __future__ import annotations

import sys
from collections import deque
from statistics import median

from embodied_rl.planner.search import Plan

WINDOW = 5
"""Iterations whose median is compared."""
TOLERANCE = 0.15


class Prediction:
    """`seconds` that an iteration should take."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._latest: deque[float] = deque(maxlen=WINDOW)
        self._warned = False

    def compare(self, measured: float, calls: dict[str, float]) -> dict[str, float]:
        """Metrics of an iteration that took `measured` seconds, a call of each stage those in `calls`. Warns once when
        the latest iterations are off by more than the tolerance."""
        self._latest.append(measured)
        typical = median(self._latest)
        off = typical / self.seconds - 1
        if abs(off) > TOLERANCE and len(self._latest) == WINDOW and not self._warned:
            self._warned = True
            print(
                f"warning: iterations take {typical:.2f} s, {self.seconds:.2f} s were expected ({off:+.0%}): "
                f"measure again with `embodied-rl plan` when nothing else runs",
                file=sys.stderr,
            )
        return {"time/iteration": measured, "time/iteration_expected": self.seconds, "time/expectation_error": off}

    def better(self, iterations: float, switch: float) -> Plan | None:
        """The plan to go over to, where that takes `switch` seconds and so many `iterations` are left; None where it
        is best to go on."""
        return None

    def follow(self, plan: Plan) -> None:
        """The run goes by `plan` now."""
        self.seconds = plan.seconds
        self._latest.clear()

"""Whether another plan would be better by now: what was measured before a run began, corrected by what it measures.

What a stage costs changes while a policy learns: episodes get longer, scenes fuller, other work comes and goes. Every
few iterations the seconds that calls took are compared with those that the plan gave them, the costs are corrected by
the ratios, and all placements are worked out again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from statistics import median
from typing import Any

from embodied_rl.config import RunConfig
from embodied_rl.planner.costs import Cost
from embodied_rl.planner.placement import Placement
from embodied_rl.planner.prediction import WINDOW, Prediction
from embodied_rl.planner.profile import Profile
from embodied_rl.planner.search import Plan

GAIN = 0.05
"""Share of an iteration that another plan must save: less is noise."""
PAYS = 2.0
"""How many times the seconds of going over to it another plan must save in what is left of the run."""


class Replanning(Prediction):
    """Of a run that goes by `plan`, at first the best one that `profile` has."""

    def __init__(self, profile: Profile, staleness: int) -> None:
        """`staleness`: the largest that is allowed."""
        self._profile, self._staleness = profile, staleness
        self.plan = self._profile.plans(self._staleness)[0]
        super().__init__(self.plan.seconds)
        self._calls: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._error: dict[Placement, float] = {}
        """Measured seconds / expected ones of the placements that were tried."""

    def compare(self, measured: float, calls: dict[str, float]) -> dict[str, float]:
        self._calls.append(calls)
        return super().compare(measured, calls)

    def better(self, iterations: float, switch: float) -> Plan | None:
        """Looks again after every window of iterations."""
        if len(self._calls) < WINDOW:
            return None
        seconds = median(self._latest)
        self._correct()
        self._calls.clear()
        self.plan = self._profile.plan(self.plan.placement)
        usual = self._error[self.plan.placement] = seconds / self.plan.seconds
        plans = [
            replace(plan, seconds=plan.seconds * self._error.get(plan.placement, usual))
            for plan in self._profile.plans(self._staleness)
        ]
        best = min(plans, key=lambda plan: plan.seconds)
        saved = seconds - best.seconds
        return best if saved >= GAIN * seconds and saved * iterations >= PAYS * switch else None

    def follow(self, plan: Plan) -> None:
        super().follow(plan)
        self.plan = plan
        self._calls.clear()

    def _correct(self) -> None:
        """Make every call as long as it was in the latest iterations."""
        costs = self._profile.work.costs
        for stage, expected in self.plan.calls.items():
            found = [calls[stage] for calls in self._calls if stage in calls]
            if found and expected:
                costs = replace(costs, **{stage: _times(getattr(costs, stage), median(found) / expected)})
        self._profile = replace(self._profile, work=replace(self._profile.work, costs=costs))


def placed(config: RunConfig, placement: Placement) -> RunConfig:
    """`config` in `placement`, on this machine."""
    algorithm: Any = config.algorithm
    if placement.staleness != getattr(algorithm, "staleness", 0):
        algorithm = replace(algorithm, staleness=placement.staleness)
    return replace(config, algorithm=algorithm, pipeline=replace(config.pipeline, env_groups=placement.groups))


def describe(plan: Plan) -> str:
    """Its settings and its speed."""
    placement = plan.placement
    settings = f"env_groups {placement.groups}, staleness {placement.staleness}"
    return f"placement {settings}: {plan.seconds:.2f} s per iteration"


def _times(cost: Cost, ratio: float) -> Cost:
    return replace(cost, fixed=ratio * cost.fixed, per_row=ratio * cost.per_row)

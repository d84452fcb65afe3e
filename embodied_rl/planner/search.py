"""Every placement of some work on a machine, best first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from embodied_rl.errors import UserError
from embodied_rl.planner import events, formulas
from embodied_rl.planner.costs import Work
from embodied_rl.planner.placement import Placement, Seconds, seconds

FOLLOWED = 12
"""Placements that are best by the formulas and whose events are followed."""
TIE = 0.02
"""Of two plans that differ less, the simpler one comes first: fewer groups, less staleness."""


@dataclass(frozen=True)
class Machine:
    """What there is to place work on."""

    devices: int = 1
    memory: float = math.inf
    """Bytes of each device."""
    cores: float | None = None
    """That all processes share; none where there are enough."""


@dataclass(frozen=True)
class Plan:
    """A placement and what it is expected to bring."""

    placement: Placement
    seconds: float
    """Of an iteration."""
    busy: dict[str, float]
    """Share of the time in which a stage (simulate, infer, record, train, sync, switch) works."""
    calls: dict[str, float]
    """Seconds that one call of a stage takes."""
    reason: str
    """What its speed is limited by."""


def search(
    work: Work, machine: Machine, groups: int, staleness: int, variation: events.Variation | None = None
) -> list[Plan]:
    """Plans of all modes, splits of the devices, up to `groups` groups and `staleness`, fastest first.

    All are compared by the formulas and the best of them by their events. Raises `UserError` with the reason of the
    last one when none is possible.
    """
    bounds: list[tuple[float, int, int, Placement]] = []
    refused = UserError("there is nothing to place the work on")
    for placement in placements(work, machine.devices, groups, staleness):
        try:
            each = _seconds(work, machine, placement)
        except UserError as error:
            refused = error
            continue
        bound = formulas.iteration(work.decisions, placement, each, machine.cores)
        bounds.append((bound, placement.groups, placement.staleness, placement))
    if not bounds:
        raise refused
    best = sorted(bounds, key=lambda bound: bound[:3])[:FOLLOWED]
    plans = [follow(work, machine, placement, variation) for *_, placement in best]
    plans.sort(key=lambda plan: plan.seconds)
    near = [plan for plan in plans if plan.seconds <= plans[0].seconds * (1 + TIE)]
    near.sort(key=lambda plan: (plan.placement.staleness, plan.placement.groups))
    return near + plans[len(near) :]


def follow(work: Work, machine: Machine, placement: Placement, variation: events.Variation | None = None) -> Plan:
    """One placement, by its events. Raises `UserError` when it is not possible."""
    each = _seconds(work, machine, placement)
    found = events.simulate(work.decisions, placement, each, machine.cores, variation)
    return Plan(placement, *found, reason(placement, each, found.busy))


def _seconds(work: Work, machine: Machine, placement: Placement) -> Seconds:
    return seconds(work, placement, placement.switches(work.costs.memory, work.rows, machine.memory))


def placements(work: Work, devices: int, groups: int, staleness: int) -> Iterator[Placement]:
    """All of them, feasible or not."""
    every = range(devices)
    splits: list[tuple[range, range, range]] = []
    if work.processes:  # simulators need no device
        splits.append((range(0), every, every))
        splits += [(range(0), range(own), range(own, devices)) for own in every[1:]]
    else:
        splits.append((every, every, every))
        splits += [(range(own), range(own, devices), every) for own in every[1:]]
        splits += [(range(own), range(own), range(own, devices)) for own in every[1:]]
        divisors = [count for count in every[1:] if work.rows % count == 0]  # others cannot be dealt out
        splits += [
            (range(one), range(one, one + two), range(one + two, devices))
            for one in divisors
            for two in divisors
            if one + two < devices
        ]
    for count in range(1, groups + 1):
        if work.rows % count == 0:
            for lag in range(staleness + 1):
                yield from (Placement(*split, groups=count, staleness=lag) for split in splits)


def reason(placement: Placement, each: Seconds, busy: dict[str, float]) -> str:
    """What limits the speed of a placement, from what its stages do."""
    policy = busy.get("infer", 0.0) + busy.get("record", 0.0)
    shares = {"simulating": busy.get("simulate", 0.0), "deciding": policy, "learning": busy.get("train", 0.0)}
    stage = max(shares, key=lambda name: shares[name])
    text = f"{stage} takes {shares[stage]:.0%} of the time"
    if placement.staleness and max(shares.values()) < 0.9:
        return text + ", the stages slow each other down"
    if not placement.staleness and shares["learning"] > 0.1:
        text += f", collecting waits {shares['learning']:.0%} for the learner"
    if each.switch:
        text += f", moving in and out of memory {busy.get('switch', 0.0):.0%}"
    return text

"""How long an iteration takes, in closed form.

Exact when every call takes what `Seconds` says and no two stages want the same device or core at once; a lower bound
when they do. `events` follows every single call instead.
"""

from __future__ import annotations

from embodied_rl.planner.placement import Placement, Seconds


def rollout(decisions: int, groups: int, each: Seconds) -> float:
    """H max(S (Ti + Tr), Ti + Ts, k Ts) + min((S - 1) (Ti + Tr), max(Ts - Tr, 0)): S groups take turns at the policy,
    which decides in Ti and records in Tr while the simulators work for Ts; k groups share a simulating device."""
    busy = each.infer + each.record
    period = max(groups * busy, each.infer + each.simulate, each.sharing * each.simulate)
    return decisions * period + min((groups - 1) * busy, max(each.simulate - each.record, 0.0))


def iteration(decisions: int, placement: Placement, each: Seconds, cores: float | None = None) -> float:
    """Collecting, then learning, or both at once with staleness; never less than the work that one device, or all
    `cores` together, have to do in it."""
    collect, loads = rollout(decisions, placement.groups, each), _loads(decisions, placement, each, cores)
    most = max(loads, default=0.0)
    if placement.staleness:
        return max(collect, each.train, most) + each.sync
    return max(collect + each.train, most) + each.sync + each.switch


def _loads(decisions: int, placement: Placement, each: Seconds, cores: float | None) -> list[float]:
    """Seconds of work that wait for each device, and for the cores."""
    chunks = decisions * placement.groups
    policy, simulate = chunks * (each.infer + each.record), decisions * each.sharing * each.simulate
    loads = [
        infers * policy + simulates * simulate + trains * each.train for simulates, infers, trains in placement.kinds
    ]
    if cores is not None:
        once = {"simulate": each.simulate, "infer": each.infer, "record": each.record}
        busy = chunks * sum(each.cores[stage] * lasts for stage, lasts in once.items())
        loads.append((busy + each.cores["train"] * each.train) / cores)
    return loads

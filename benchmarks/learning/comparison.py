"""What is compared, and what follows from the runs: scores, and a bound on how much worse ours can be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Literal


@dataclass(frozen=True)
class Case:
    recipe: str
    peer: str
    """Distribution that runs the other side (`peers.py` has the settings); "" for ours with `overrides`."""
    measure: Literal["return", "success"]
    """Mean return or share of successes of 20 episodes acted deterministically. A final success is that of the last
    step, the points of a curve count it at any step."""
    threshold: float | None
    """What each of our seeds has to reach; None where the case is only reported."""
    scored_from: int | None = None
    """The score of a run is the mean of its evaluations from this many environment steps on; None = of the last one."""
    overrides: tuple[str, ...] = ()
    """Settings of the other side of a case that compares us with ourselves."""


CASES: dict[str, Case] = {
    "cartpole_ppo": Case("cartpole_ppo", "stable-baselines3", "return", 475.0, scored_from=59_000),
    "pendulum_sac": Case("pendulum_sac", "stable-baselines3", "return", -300.0),
    "fetch_reach_sac": Case("fetch_reach_sac", "stable-baselines3", "success", 0.9),
    "pendulum_crossq": Case("pendulum_crossq", "sbx-rl", "return", -300.0),
    "half_cheetah_ppo": Case("half_cheetah_ppo", "stable-baselines3", "return", None),
    "fetch_reach_rlpd": Case(
        "fetch_reach_rlpd",
        "",
        "success",
        0.9,
        overrides=(
            *("--demonstrations", "none", "--algorithm.symmetric", "false"),
            *("--training.env-steps", "10000"),  # over three times ours
        ),
    ),
}
"""In the order of what they say per minute."""

TOLERATED = 0.1
"""Share of the other side's range by which ours may be worse."""
T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)
"""95 % quantiles of Student's t distribution with 1, 2, ... degrees of freedom."""

Runs = dict[str, dict[str, dict[str, Any]]]
"""{seed: {"ours" or "peer": what `run.py` records}}."""


def lower_bound(differences: Sequence[float]) -> float | None:
    """One-sided 95 % lower confidence bound of the mean of independent, normal `differences`; None for fewer than 2."""
    n = len(differences)
    if n < 2:
        return None
    return mean(differences) - T_95[min(n - 1, len(T_95)) - 1] * stdev(differences) / math.sqrt(n)


def score(case: Case, run: Mapping[str, Any]) -> float:
    """Of a run: by its last evaluation, or by all from `case.scored_from` on."""
    if case.scored_from is None:
        return run["final"]["mean_return" if case.measure == "return" else "success_at_end"]
    return mean(point[case.measure] for point in run["curve"] if point["env_steps"] >= case.scored_from)


def value_range(case: Case, runs: Sequence[Mapping[str, Any]]) -> float:
    """Between the worst and the best evaluation of any of `runs`, the untrained policy's included."""
    points = [point[case.measure] for run in runs for point in run["curve"]]
    return max(points) - min(points)


def summary(case: Case, runs: Runs) -> dict[str, Any]:
    """Scores of all seeds, which of ours reach the threshold, and the bound over the seeds that both sides have run."""
    found: dict[str, Any] = {
        side: {seed: round(score(case, sides[side]), 4) for seed, sides in runs.items() if side in sides}
        for side in ("ours", "peer")
    }
    ours, peer = found["ours"], found["peer"]
    result = found | {"peer_is": case.peer or f"ours {' '.join(case.overrides)}", "threshold": case.threshold}
    if case.threshold is not None:
        result["reached"] = f"{sum(each >= case.threshold for each in ours.values())} of {len(ours)}"
    both = [seed for seed in ours if seed in peer]
    if both:
        bound = lower_bound([ours[seed] - peer[seed] for seed in both])
        allowed = -TOLERATED * value_range(case, [runs[seed]["peer"] for seed in both])
        result |= {
            "mean_difference": round(mean(ours[seed] - peer[seed] for seed in both), 4),
            "lower_bound": None if bound is None else round(bound, 4),
            "at_least": round(allowed, 4),
            "as_good": None if bound is None else bound >= allowed,
        }
    cpu = {side: [sides[side]["cpu_seconds"] for sides in runs.values() if side in sides] for side in ("ours", "peer")}
    return result | {"mean_cpu_seconds": {side: round(mean(each), 1) for side, each in cpu.items() if each}}


def merge(known: Mapping[str, Runs], case: str, seed: int, side: str, run: Mapping[str, Any]) -> dict[str, Runs]:
    """`known` runs of all cases with one run added, or replaced; seeds in order."""
    runs = {name: {key: dict(sides) for key, sides in seeds.items()} for name, seeds in known.items()}
    runs.setdefault(case, {}).setdefault(str(seed), {})[side] = dict(run)
    return runs | {case: dict(sorted(runs[case].items(), key=lambda item: int(item[0])))}

"""Seconds of an iteration when nothing but simulating, deciding and learning takes time.

A decision of n rows takes Ts(n) to simulate and Ti(n) to infer; S groups of n = N / S rows have processes of their own;
a segment has H decisions, learning from it takes T.
"""

from __future__ import annotations


def rollout(decisions: int, groups: int, simulate: float, infer: float) -> float:
    """H max(S Ti(n), Ts(n) + Ti(n)) + min(Ts(n), Ti(n)) for S > 1 groups, which take turns; H (Ts + Ti) for one."""
    if groups == 1:
        return decisions * (simulate + infer)
    return decisions * max(groups * infer, simulate + infer) + min(simulate, infer)


def iteration(decisions: int, groups: int, staleness: int, simulate: float, infer: float, learn: float) -> float:
    """Learning from a segment after collecting it, or while later ones are collected."""
    collect = rollout(decisions, groups, simulate, infer)
    return max(collect, learn) if staleness else collect + learn

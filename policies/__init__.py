"""Policies: what turns observations into action chunks."""

from embodied_rl.policies.check import check

__all__ = ["check"]

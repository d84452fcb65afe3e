"""Errors a user can cause. The command line prints them on one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What was wrong, where, and what to do, on one line. Raised for anything the user can fix."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class SpecError(UserError):
    """A simulator and a policy whose specifications do not fit."""


class ContractError(UserError):
    """A simulator or policy that breaks its contract, found by `simulators.check` or `policies.check`."""


class SimulatorDied(RuntimeError):
    """A simulator worker ended or stopped answering more often than the run allows; carries its stderr."""


class LearnerDied(RuntimeError):
    """A learner rank ended, stopped answering or raised; carries its traceback or what it printed."""


class LearnerRaised(LearnerDied):
    """A learner rank raised, as it would again; carries its traceback."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among `known`, with the nearest valid names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"valid: {', '.join(known) or 'none'}"
    return UserError(f"unknown {kind} '{name}': {hint}")

"""Learning beside collecting: a call in a thread of its own, and a second policy to act by meanwhile.

Torch releases the interpreter while it computes, so a thread is enough, and the segment stays where it is.
"""

from __future__ import annotations

import copy
import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

LONGEST = 6 * 3600.0
"""Seconds after which an update is taken for stuck."""
_GRACE = 20.0
"""Seconds that a thread gets to stop."""


class _Stopped(SystemExit):
    """Raised in a thread whose result nobody waits for; a thread that ends by it says nothing."""


class Beside(threading.Thread):
    """`call` in a thread that starts at once. Leaving the block that it manages stops it when an exception does."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(name="learner")
        self._call = call
        self._result: Any = None
        self._error: BaseException | None = None
        # `join` would do if Python 3.12 did not take a thread for ended once Ctrl-C interrupts it.
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # raised again where the result is asked for
            self._error = error
        finally:
            self._done.set()

    def check(self) -> None:
        """Raise what the call raised, with its traceback, if it has."""
        if self._error is not None:
            raise self._error

    def result(self) -> Any:
        """What the call returns; waits for it."""
        if not self._done.wait(LONGEST):
            raise TimeoutError(f"an update did not end within {LONGEST / 3600:.0f} hours")
        self.check()
        return self._result

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # Not to be waited for: an update may take minutes, and whoever pressed Ctrl-C wants to leave.
        deadline = time.monotonic() + _GRACE
        while kind is not None and not self._done.is_set() and time.monotonic() < deadline:
            # Again and again: what is raised in the middle of a callback is lost.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident or 0), ctypes.py_object(_Stopped))
            self._done.wait(0.2)


class Replica:
    """A copy of `policy` that keeps its weights until it is told to `follow`; what is frozen exists once."""

    def __init__(self, policy: Any) -> None:
        frozen = {id(each): each for each in policy.parameters() if not each.requires_grad}
        self.policy = copy.deepcopy(policy, frozen)
        both = zip(_state(self.policy), _state(policy), strict=True)
        self._pairs = [(mine, theirs) for mine, theirs in both if mine is not theirs]

    @torch.no_grad()
    def follow(self) -> None:
        """Take over the weights that the policy has now."""
        for mine, theirs in self._pairs:
            mine.copy_(theirs)


def _state(policy: Any) -> list[torch.Tensor]:
    return [*policy.parameters(), *policy.buffers()]

"""Replacing functions of a package that cannot be subclassed, and putting them back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

_ABSENT = object()


@dataclass(frozen=True)
class Patch:
    """`owner.name` becomes `new`. With a module as owner, so does every copy that `from ... import` made of it."""

    owner: Any
    name: str
    new: Any
    check: Callable[[], bool] | None = None
    """Whether `new` gives the original's results on this machine, bit for bit."""

    def sites(self) -> Iterator[tuple[Any, str, Any]]:
        """(owner, name, original) of every place to patch."""
        original = vars(self.owner).get(self.name, _ABSENT)
        if not isinstance(self.owner, ModuleType):
            yield self.owner, self.name, original
            return
        package = self.owner.__name__.split(".")[0]
        for module_name, module in list(sys.modules.items()):
            if module_name.split(".")[0] == package:
                for name, value in list(vars(module).items()):
                    if value is original:
                        yield module, name, original


class Patches:
    """A set of patches that is on or off as a whole."""

    def __init__(self, patches: list[Patch]) -> None:
        self.rejected = [f"{p.owner.__name__}.{p.name}" for p in patches if p.check is not None and not p.check()]
        accepted = [p for p in patches if f"{p.owner.__name__}.{p.name}" not in self.rejected]
        self._sites = [(*site, p.new) for p in accepted for site in p.sites()]

    def on(self) -> None:
        """Put the new functions in place."""
        for owner, name, _, new in self._sites:
            setattr(owner, name, new)

    def off(self) -> None:
        """Put the original functions back."""
        for owner, name, original, _ in self._sites:
            if original is not _ABSENT:
                setattr(owner, name, original)
            elif name in vars(owner):
                delattr(owner, name)


def same(a: Any, b: Any) -> bool:
    """Equal in shape, type and every bit."""
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()

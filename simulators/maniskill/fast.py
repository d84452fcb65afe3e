"""ManiSkill's generic hot functions, rewritten for one environment on the CPU: the same float32 numbers, much sooner.

A control step of ManiSkill spends about 80 % of its time in Python and torch, on tensors of three to seven numbers,
where an operation costs what its dispatch costs. Replacing torch by numpy inside the generic layers (poses,
quaternions, controllers, contacts) removes most of that, for every task alike; what a task computes itself stays
untouched.

Why the numbers are the same: addition, subtraction, multiplication and division of float32 are correctly rounded in
both libraries, and every function here does them in the original's order. Reductions (sums, norms, dot products),
square roots and transcendental functions are left to torch, whose order and rounding are its own. Each rewritten
function is compared with its original on random inputs before it is used, and one that differs anywhere on this machine
stays as it was.

The patches act on ManiSkill's classes and modules, hence on a whole process: `install` once, `disabled()` for a while.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from embodied_rl.simulators.maniskill import fast_angles, fast_controllers, fast_math, fast_rows, fast_scene
from embodied_rl.simulators.maniskill.patch import Patches

_patches: Patches | None = None


def install() -> list[str]:
    """Patch this process; returns the functions left alone because they differ here (normally none).

    Also moves everything imported so far out of the garbage collector's sight: ManiSkill collects at every rebuild of a
    scene, and a collection costs 0.2 s when it walks through all imported modules.
    """
    global _patches
    if _patches is None:
        import mani_skill.envs  # noqa: F401 - so that every module that holds a patched name is loaded

        parts = (fast_math, fast_angles, fast_scene, fast_controllers, fast_rows)
        _patches = Patches([patch for part in parts for patch in part.patches()])
        _patches.on()
        gc.collect()
        gc.freeze()
    return _patches.rejected


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """ManiSkill as it was, for environments built and used inside; those built outside must not be used."""
    if _patches is not None:
        _patches.off()
    try:
        yield
    finally:
        if _patches is not None:
            _patches.on()

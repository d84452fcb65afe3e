"""Which OpenGL MuJoCo renders with, decided once per process before anything imports mujoco, and the process's context.

One context per process is enough, and no environment can draw into another's.
"""

from __future__ import annotations

import atexit
import ctypes.util
import functools
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embodied_rl.errors import UserError

_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
_SIZE = 640, 480
"""Of the context's own buffer, which nobody draws into."""
_users: list[Callable[[], None]] = []


def configure() -> str:
    """Set MUJOCO_GL and PYOPENGL_PLATFORM: what the user chose in MUJOCO_GL, else EGL on a machine with an NVIDIA
    GPU, else OSMesa, else EGL in software. Returns the choice.

    Raises `UserError` when there is no such library, or when mujoco was already imported for another one.
    """
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    if wanted not in ("", "egl", "osmesa"):
        raise UserError(f"MUJOCO_GL is '{wanted}'; simulators render off-screen: choose egl or osmesa, or unset it")
    order = [wanted] if wanted else ["egl", "osmesa"] if Path("/dev/nvidiactl").exists() else ["osmesa", "egl"]
    found = next((name for name in order if ctypes.util.find_library(_LIBRARIES[name])), None)
    if found is None:
        raise UserError("MuJoCo images need OpenGL and no library was found: sudo apt-get install libosmesa6")
    if "mujoco" in sys.modules and os.environ.get("PYOPENGL_PLATFORM", found) != found:
        raise UserError(f"mujoco already renders with {os.environ['PYOPENGL_PLATFORM']} in this process, not {found}")
    os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = found
    return found


def make_current() -> None:
    """Draw with the process's context, made at the first call; to be called before everything that touches OpenGL."""
    _context().make_current()


def before_end(release: Callable[[], None]) -> None:
    """Call `release`, which frees what it keeps in OpenGL, while the interpreter can still do so."""
    _users.append(release)


@functools.cache
def _context() -> Any:
    backend = configure()
    module = importlib.import_module(f"mujoco.{backend}")  # `mujoco.GLContext` was chosen when mujoco was imported
    if backend == "egl":
        _choose_device(module)
    context = module.GLContext(*_SIZE)
    atexit.register(_end)
    return context


def _choose_device(egl: Any) -> None:
    """The first GPU that CUDA may use, unless MUJOCO_EGL_DEVICE_ID says which. EGL counts all GPUs of a machine, also
    those that CUDA_VISIBLE_DEVICES hides; where it sees fewer, in a container, it is left to choose."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    if visible.isdigit() and int(visible) < len(egl.EGL.eglQueryDevicesEXT()):
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", visible)


def _end() -> None:
    for release in _users:
        release()
    _context().free()
    _context.cache_clear()  # else it is deleted when its module is already gone

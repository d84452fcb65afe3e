"""Which OpenGL MuJoCo renders with; decided once per process, before anything imports mujoco."""

from __future__ import annotations

import ctypes.util
import os
import sys
from pathlib import Path

from embodied_rl.errors import UserError

_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}


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

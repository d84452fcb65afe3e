"""Vulkan for simulators that render with it: where the software driver is and whether rendering works on this machine.

Without a GPU, `scripts/setup_software_vulkan.sh` puts Mesa's lavapipe into the user's cache folder; it is found here.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

SETUP = "scripts/setup_software_vulkan.sh"
GPU = Path("/dev/nvidiactl")
"""Exists where the NVIDIA driver is loaded."""

_RENDER_ONE_PIXEL = """
import sapien
scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem()])
camera = scene.add_camera("probe", width=1, height=1, fovy=1, near=0.1, far=1)
scene.update_render()
camera.take_picture()
assert camera.get_picture("Color").shape == (1, 1, 4)
"""


def software_icd() -> Path | None:
    """The driver description (ICD) of the software Vulkan that `SETUP` made, None when it was not run."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    icd = cache / "embodied_rl" / "vulkan" / "lvp_icd.json"
    return icd if icd.is_file() else None


def environment() -> dict[str, str]:
    """The variables to set in a worker before it loads Vulkan, so that it renders in software.

    Empty when the user has chosen a driver, when there is an NVIDIA GPU, or when there is no software Vulkan.
    """
    icd = software_icd()
    chosen = os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES")
    if icd is None or chosen or GPU.exists():
        return {}
    # Two names, as older loaders know only the second. One thread per worker: the workers already fill the cores.
    return {"VK_DRIVER_FILES": str(icd), "VK_ICD_FILENAMES": str(icd), "LP_NUM_THREADS": "1"}


@functools.cache
def problem(deadline: float = 120.0) -> str | None:
    """Why SAPIEN cannot render here and what to do, on one line; None when it can.

    Renders one pixel in a child process (a bad driver may crash it), which gets `deadline` seconds.
    """
    command = [sys.executable, "-c", _RENDER_ONE_PIXEL]
    try:
        child = subprocess.run(
            command, env=os.environ | environment(), capture_output=True, text=True, timeout=deadline, check=False
        )
    except subprocess.TimeoutExpired:
        return f"rendering one pixel with SAPIEN took longer than {deadline:.0f} s; check the Vulkan driver"
    if child.returncode == 0:
        return None
    if child.returncode < 0:
        reason = f"crashed with {signal.Signals(-child.returncode).name}"
    else:
        reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
    remedy = "check the Vulkan driver" if software_icd() else f"run {SETUP} (no root needed) or install a GPU driver"
    return f"SAPIEN cannot render ({reason}): {remedy}"

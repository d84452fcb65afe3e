"""Importing LIBERO and robosuite as a library should be imported: no question, no download, nothing of the user's."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import io
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from embodied_rl.simulators import mujoco_gl
from embodied_rl.simulators.libero import assets
from embodied_rl.simulators.libero.suites import package


def mujoco() -> Any:
    """The module, untyped; imported only after it was decided which OpenGL it uses."""
    mujoco_gl.configure()
    return importlib.import_module("mujoco")


@functools.cache
def problems() -> dict[str, Any]:
    """LIBERO's environment classes by the names of the problems in its BDDL files. Imports it, which takes seconds.

    Raises `UserError` without LIBERO, its assets or OpenGL (robosuite loads it even when nothing is rendered).
    """
    mujoco_gl.configure()
    folder = assets.folder()
    _configuration()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), _hidden("MUJOCO_EGL_DEVICE_ID"):
        # It prints, its strings have invalid escapes, and it refuses device ids that CUDA_VISIBLE_DEVICES lacks.
        warnings.simplefilter("ignore")
        import libero.libero

        libero.libero._assets_path_cache = str(folder)
        from libero.libero.envs import TASK_MAPPING
    return TASK_MAPPING


def _configuration() -> None:
    """LIBERO reads a configuration when it is imported and asks on standard input when there is none: it gets one of
    its own, in a folder that goes with this process."""
    folder = Path(tempfile.mkdtemp(prefix="embodied-rl-libero-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    root = package()
    places = {"bddl_files": "bddl_files", "init_states": "init_files", "datasets": "../datasets", "assets": "assets"}
    lines = [f'"{name}": "{root / place}"\n' for name, place in {"benchmark_root": "", **places}.items()]
    (folder / "config.yaml").write_text("".join(lines))
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)


@contextlib.contextmanager
def _hidden(variable: str) -> Any:
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value

"""Importing LIBERO and robosuite as a library should be imported: no question, no download, nothing of the user's."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

from embodied_rl.errors import UserError
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
    its own, in a folder of the user's own among the temporary ones."""
    root = package()
    places = {"bddl_files": "bddl_files", "init_states": "init_files", "datasets": "../datasets", "assets": "assets"}
    text = "".join(f'"{name}": "{root / place}"\n' for name, place in {"benchmark_root": "", **places}.items())
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"embodied-rl-libero-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: remove it, or set TMPDIR to a folder of your own")
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        file.write(text)
    os.replace(file.name, folder / "config.yaml")  # at once: other processes may be reading
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)


@contextlib.contextmanager
def _hidden(variable: str) -> Any:
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value

"""Python environments of simulators that cannot share this one.

Each is a folder with `pyproject.toml` and `uv.lock`: those of this package lie in `environments/`, a user's anywhere.
`embodied-rl install` makes them; simulator workers are started with their interpreter.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import embodied_rl
from embodied_rl.errors import UserError, unknown

PROJECTS = Path(embodied_rl.__file__).parent / "environments"
"""The package's own environments, one folder each."""
_STAMP = "embodied_rl.lock.sha256"
"""Written last: which lock an environment was made from."""


def names() -> list[str]:
    """The environments that this package knows."""
    return sorted(path.parent.name for path in PROJECTS.glob("*/uv.lock"))


def interpreter(project: str) -> str:
    """The Python of the environment `project`: a name in `names()`, or the path of a folder with `uv.lock`.

    Raises `UserError` when it is unknown, not installed, or was made from another lock.
    """
    folder = _folder(project)
    python = location(project) / "bin" / "python"
    if not python.is_file() or not (location(project) / _STAMP).is_file():
        raise UserError(f"the Python environment '{project}' is not installed: run `embodied-rl install {project}`")
    if (location(project) / _STAMP).read_text() != _digest(folder):
        raise UserError(f"the Python environment '{project}' is out of date: run `embodied-rl install {project}`")
    return str(python)


def location(project: str) -> Path:
    """Where the environment lives: below EMBODIED_RL_ENVIRONMENTS or the user's cache, a user's own beside its lock."""
    folder = _folder(project)
    if folder.parent != PROJECTS:
        return folder / ".venv"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("EMBODIED_RL_ENVIRONMENTS") or cache / "embodied_rl" / "environments") / project


def install(project: str, timeout: float = 3600.0) -> Path:
    """Make the environment of `project`, or bring it up to date; returns where it lives. `timeout` in seconds."""
    folder, target = _folder(project), location(project)
    uv = shutil.which("uv")
    if uv is None:
        raise UserError("uv is not on PATH: run `python3 -m pip install uv`")
    (target / _STAMP).unlink(missing_ok=True)
    command = [uv, "sync", "--locked", "--no-dev", "--project", str(folder)]
    if folder.parent == PROJECTS:  # they support the same Python as this package
        command += ["--python", sys.executable]
    # Not this process's own environment, which `uv run` names in VIRTUAL_ENV.
    environ = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    try:
        done = subprocess.run(command, env=environ | {"UV_PROJECT_ENVIRONMENT": str(target)}, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise UserError(f"installing '{project}' took longer than {timeout:.0f} seconds; try again") from None
    if done.returncode:
        raise UserError(f"installing '{project}' failed, see above: {' '.join(command)}")
    (target / _STAMP).write_text(_digest(folder))
    return target


def _folder(project: str) -> Path:
    if project in names():
        return PROJECTS / project
    folder = Path(project).absolute()
    if not (folder / "uv.lock").is_file():
        raise unknown("Python environment (nor a folder with uv.lock)", project, names())
    return folder


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "uv.lock").read_bytes()).hexdigest()

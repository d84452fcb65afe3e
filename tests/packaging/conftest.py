"""Wheels of this repository and of the example plug-in, built and unpacked without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Protocol

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def build(project: Path, folder: Path) -> Path:
    """The wheel of `project`, made by the hatchling that is installed here (`uv build` would download one)."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=project, check=True, capture_output=True, timeout=100)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel of pure Python into `folder`, metadata included: that is what unpacking it does."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


class Python(Protocol):
    def __call__(self, code: str, *path: Path, cwd: Path) -> str: ...


@pytest.fixture(scope="session")
def python() -> Python:
    """Runs code in a new interpreter with `path` in front of its module search path; returns what it prints."""

    def run(code: str, *path: Path, cwd: Path) -> str:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", code]
        child = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100, check=False
        )
        assert child.returncode == 0, child.stderr
        return child.stdout

    return run


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this repository."""
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site folder with embodied_rl installed from its wheel."""
    return install(wheel, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site folder with the example plug-in installed."""
    wheel = build(HERE / "example_plugin", tmp_path_factory.mktemp("plugin_wheel"))
    return install(wheel, tmp_path_factory.mktemp("plugin"))

"""Python environments of their own: made from a lock, found again, and refused when they are not what the lock says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from embodied_rl.cli import main
from embodied_rl.errors import UserError
from embodied_rl.simulators import interpreters
from embodied_rl.simulators.reset_schedule import RandomSchedule
from embodied_rl.simulators.workers import WorkerSimulator

PROJECT = """
[project]
name = "someones-simulator"
version = "{version}"
requires-python = ">=3.8"
[tool.uv]
package = false
"""


def write(folder: Path, version: int) -> None:
    (folder / "pyproject.toml").write_text(PROJECT.format(version=version))
    uv = shutil.which("uv")
    assert uv
    subprocess.run([uv, "lock", "--offline", "--project", folder], check=True, timeout=60, capture_output=True)


def test_a_folder_with_a_lock_becomes_an_environment_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, version=1)
    with pytest.raises(UserError, match=f"is not installed: run `embodied-rl install {tmp_path}`"):
        interpreters.interpreter(str(tmp_path))
    assert main(["install", str(tmp_path)]) == 0
    python = interpreters.interpreter(str(tmp_path))
    assert Path(python).is_relative_to(tmp_path)
    with pytest.raises(UserError, match=f"{python} cannot run a simulator worker: No module named 'numpy'"):
        WorkerSimulator("simulator_toys:Counter", {}, 1, 1, RandomSchedule(0), python=python)
    write(tmp_path, version=2)
    with pytest.raises(UserError, match="is out of date: run"):
        interpreters.interpreter(str(tmp_path))
    interpreters.install(str(tmp_path))
    assert interpreters.interpreter(str(tmp_path)) == python


def test_a_failed_installation_is_no_installation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, version=1)
    interpreters.install(str(tmp_path))
    (tmp_path / "pyproject.toml").write_text(PROJECT.format(version=2))  # no longer what is locked
    assert main(["install", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match="is not installed"):
        interpreters.interpreter(str(tmp_path))


def test_the_environments_of_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert interpreters.names() == ["isaaclab", "mjlab"]
    monkeypatch.setenv("EMBODIED_RL_ENVIRONMENTS", str(tmp_path))
    assert interpreters.location("mjlab") == tmp_path / "mjlab"
    with pytest.raises(UserError, match="'mjlab' is not installed: run `embodied-rl install mjlab`"):
        interpreters.interpreter("mjlab")
    with pytest.raises(UserError, match="'isaaclabs': did you mean isaaclab"):
        interpreters.interpreter("isaaclabs")

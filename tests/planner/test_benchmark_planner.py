"""The benchmark of the planner runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_benchmark_of_the_planner_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "benchmark_planner.py"
    command = [sys.executable, str(script), "sleeping", "--smoke", "--out", str(tmp_path / "out.json")]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert list(found["sleeping_errors"]) == ["16_1_0"]
    assert abs(found["sleeping_worst_error"]) < 1

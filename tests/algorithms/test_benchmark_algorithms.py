"""The benchmark of the algorithms runs; its sides are in the dependency group "peers"."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_algorithms.py"


@pytest.mark.slow
def test_every_section_runs(tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    subprocess.run([sys.executable, SCRIPT, "--smoke", "--out", tmp_path / "found.json"], check=True, timeout=600)
    found = json.loads((tmp_path / "found.json").read_text())
    for section in ("ppo", "sac"):
        assert all(found[f"{section}_{key}"] > 0 for key in ("vs_sb3", "vs_cleanrl", "floor", "of_floor"))
    assert found["ppo_two_cores_ratio"] > 0

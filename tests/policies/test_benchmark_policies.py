"""The benchmark of the policies runs, and its sides agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_policies.py"


@pytest.mark.slow
def test_every_section_runs_at_toy_size(tmp_path):
    subprocess.run([sys.executable, SCRIPT, "--smoke", "--out", tmp_path / "found.json"], check=True, timeout=600)
    found = json.loads((tmp_path / "found.json").read_text())
    ratios = {key for key, value in found.items() if not isinstance(value, dict)}
    assert ratios == {
        "openvla_act_vs_generate",
        "openvla_update_vs_full",
        "oft_update_vs_full",
        "oft_memory_vs_full",
        "pi0_act_vs_lerobot",
        "pi0_update_vs_recomputed",
    }
    assert all(found[key] > 0 for key in ratios)

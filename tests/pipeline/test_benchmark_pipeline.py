"""What the benchmark of the pipeline calls ideal is what happens when nothing else takes time, and it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.append(str(SCRIPTS))
from pipeline_benchmarks.ideal import iteration, rollout  # type: ignore[import-not-found]  # noqa: E402

seconds = st.floats(0.1, 10)


def taking_turns(decisions: int, groups: int, simulate: float, infer: float) -> float:
    """When the last chunk is done, by following every event of a rollout."""
    now, done = 0.0, [0.0] * groups
    for _ in range(decisions):
        for group in range(groups):
            now = max(now, done[group]) + infer
            done[group] = now + simulate
    return max(done)


@given(st.integers(1, 30), st.sampled_from([1, 2]), seconds, seconds)
def test_the_ideal_rollout_is_what_its_events_take(decisions: int, groups: int, simulate: float, infer: float) -> None:
    expected = taking_turns(decisions, groups, simulate, infer)
    assert rollout(decisions, groups, simulate, infer) == pytest.approx(expected)


@given(st.integers(1, 30), st.sampled_from([1, 2]), seconds, seconds, seconds)
def test_the_ideal_iteration_overlaps_learning_only_with_staleness(
    decisions: int, groups: int, simulate: float, infer: float, learn: float
) -> None:
    collect = taking_turns(decisions, groups, simulate, infer)
    costs = (simulate, infer, learn)
    assert iteration(decisions, groups, 0, *costs) == pytest.approx(collect + learn)
    assert iteration(decisions, groups, 1, *costs) == pytest.approx(max(collect, learn))


@pytest.mark.slow
def test_the_benchmark_of_the_pipeline_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "benchmark_pipeline.py"), "--smoke", "--out", str(tmp_path / "out.json")]
    child = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "out.json").read_text())
    ways = ("sync", "double_buffered", "async")
    modes = [f"{where}_{way}" for where in ("local", "ray", "queue") for way in ways]
    assert list(found) == [*modes, "vs_ray_queue", "vs_ray_queue_double_buffered"]
    assert all(0 < found[mode] <= 1.02 for mode in modes)

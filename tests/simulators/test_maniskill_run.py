"""The quickstart's own parts on the real simulator: a run repeats, survives SIGKILL, and survives a dead worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied_rl.recipes.quickstart import quickstart
from embodied_rl.training.metrics import read_metrics

# Five runs of the real simulator, each with its start-up.
pytestmark = pytest.mark.timeout(400)

SMALL = [
    "--simulator.num-envs=4",
    "--demonstrations.episodes=3",
    "--imitation.steps=30",
    "--imitation.batch-size=32",
    "--evaluation.episodes=4",
    "--training.development-episodes=2",
    "--training.env-steps=700",
    "--training.decisions-per-iteration=8",
    "--training.evaluate-every=4",
    "--training.checkpoint-every=2",
    "--training.converged-clone-steps=40",
    "--algorithm.learning-starts=128",
    "--algorithm.critic-warmup-updates=4",
    "--algorithm.batch-size=32",
    "--algorithm.anchor-minimum=10000",
]


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "embodied_rl.cli", "train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def wait_for_rows(process: subprocess.Popen[str], out: Path, count: int) -> None:
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended or hangs before it was disturbed"
        time.sleep(0.01)


def worker_pids(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                ppid = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command = (folder / "cmdline").read_bytes()
            except OSError:  # it ended meanwhile
                continue
            if ppid == parent and b"embodied_rl" in command:
                found.append(int(folder.name))
    return found


def comparable(out: Path) -> list[dict[str, Any]]:
    rows = read_metrics(out / "metrics.jsonl")
    return [{name: row[name] for name in row if not name.startswith(("time/", "wall_"))} for row in rows]


def test_a_run_killed_in_the_middle_ends_with_the_numbers_of_one_that_was_not(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start("quickstart", "--out", str(whole), *SMALL))
    process = start("quickstart", "--out", str(killed), *SMALL)
    wait_for_rows(process, killed, 3)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    finish(start("--resume", str(killed)))
    assert len(comparable(whole)) >= 5
    assert comparable(killed) == comparable(whole)
    results = [json.loads((out / "result.json").read_text()) for out in (whole, killed)]
    for name in ("initial_success", "final_success", "converged_clone_success", "evaluations", "env_steps"):
        assert results[0][name] == results[1][name]
    for name in ("report.html", "rollout.json", "demonstrations.h5"):
        assert (whole / name).stat().st_size > 0


def test_a_run_outlives_its_worker(tmp_path: Path) -> None:
    process = start("quickstart", "--out", str(tmp_path / "run"), *SMALL)
    wait_for_rows(process, tmp_path / "run", 2)
    os.kill(worker_pids(process.pid)[0], signal.SIGKILL)
    finish(process)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["deaths"] == 1
    assert result["lost_episodes"] <= 2, "none when the worker died in a reset"


@pytest.mark.slow
def test_a_run_stops_when_workers_keep_dying(tmp_path: Path) -> None:
    process = start("quickstart", "--out", str(tmp_path / "doomed"), *SMALL)
    wait_for_rows(process, tmp_path / "doomed", 1)
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        for pid in worker_pids(process.pid):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1, output
    assert "worker" in output and "Traceback" not in output


def test_shaped_rewards_of_the_recipe_are_the_tasks_own() -> None:
    """The quickstart changes nothing about the task: its resets, its horizon, its success."""
    config = quickstart()
    assert config.simulator.task == "PickCube-v1"
    assert config.simulator.max_steps is None
    assert np.isclose(config.algorithm.shaping, 1.0)

"""Whole runs on a toy task: what they write, that they repeat, and what they survive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import training_toys
from training_toys import ReachConfig, metrics_of, off_policy, on_policy, worker_pids

from embodied_rl.config import RunConfig, to_dict
from embodied_rl.errors import SimulatorDied, UserError
from embodied_rl.training import checkpoint
from embodied_rl.training.metrics import read_metrics
from embodied_rl.training.run import train

RECIPES = pytest.mark.parametrize("recipe", [off_policy, on_policy])


def rows(out: Path) -> list[dict[str, Any]]:
    return metrics_of(read_metrics(out / "metrics.jsonl"))


@RECIPES
def test_a_run_writes_its_result_and_repeats_exactly(recipe: Any, tmp_path: Path) -> None:
    results = [train(recipe(), tmp_path / name) for name in ("a", "b")]
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert len(rows(tmp_path / "a")) >= 5
    assert json.loads((tmp_path / "a" / "result.json").read_text()) == results[0]
    for name in ("initial_success", "final_success", "env_steps", "evaluations"):
        assert results[0][name] == results[1][name]
    assert results[0]["env_steps"] >= recipe().training.env_steps
    assert (tmp_path / "a" / "report.html").is_file()


def test_the_number_of_workers_does_not_change_the_numbers(tmp_path: Path) -> None:
    for workers in (1, 4):
        config = replace(on_policy(), simulator=ReachConfig(workers=workers))
        train(config, tmp_path / str(workers))
    assert rows(tmp_path / "1") == rows(tmp_path / "4")


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    train(on_policy(), tmp_path / "a")
    train(replace(on_policy(), seed=1), tmp_path / "b")
    assert rows(tmp_path / "a") != rows(tmp_path / "b")


@RECIPES
def test_a_run_killed_in_the_middle_goes_on_exactly(recipe: Any, tmp_path: Path) -> None:
    train(recipe(), tmp_path / "whole")
    process = start(recipe, tmp_path / "killed")
    deadline = time.monotonic() + 150  # importing torch alone takes a minute on a crowded machine
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:  # past the checkpoint of iteration 2
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    assert not (tmp_path / "killed" / "result.json").exists()
    resumed = train(recipe(), tmp_path / "killed", resume=True)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    for name in ("initial_success", "final_success", "env_steps", "evaluations", "iterations"):
        assert resumed[name] == whole[name]


def test_the_final_policy_is_saved_and_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    config = on_policy(env_steps=220, checkpoint_every=3, evaluate_every=2)
    result = train(config, tmp_path / "run")
    assert result["iterations"] % 3, "the budget must end between two checkpoints for this test to mean anything"
    assert checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))["iteration"] == result["iterations"]
    again = train(config, tmp_path / "run", resume=True)
    assert (again["iterations"], again["env_steps"]) == (result["iterations"], result["env_steps"])
    assert again["evaluations"] == result["evaluations"]

    early = on_policy(stop_at_success=0.0)
    stopped = train(early, tmp_path / "early")
    assert stopped["iterations"] == 2, "the first development evaluation"
    assert train(early, tmp_path / "early", resume=True)["iterations"] == 2


def start(recipe: Any, out: Path) -> subprocess.Popen[bytes]:
    code = "import sys, training_toys; from pathlib import Path; from embodied_rl.training.run import train; "
    code += "train(getattr(training_toys, sys.argv[1])(), Path(sys.argv[2]))"
    environment = os.environ | {"PYTHONPATH": str(Path(training_toys.__file__).parent)}
    return subprocess.Popen([sys.executable, "-c", code, recipe.__name__, str(out)], env=environment)


def test_a_killed_simulator_worker_is_replaced_and_its_episodes_are_not_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embodied_rl.pipeline.rollout import RolloutWorker

    begin, begun = RolloutWorker.begin, []

    def killing_begin(self: RolloutWorker, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        begun.append(1)
        if len(begun) == 40:
            os.kill(worker_pids()[0], signal.SIGKILL)

    monkeypatch.setattr(RolloutWorker, "begin", killing_begin)
    result = train(off_policy(), tmp_path / "run")
    assert result["deaths"] == 1
    assert result["lost_episodes"] == 2
    assert rows(tmp_path / "run")[-1]["simulator/deaths"] == 1


def test_repeated_deaths_stop_the_run_with_the_workers_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embodied_rl.pipeline.rollout import RolloutWorker

    begin = RolloutWorker.begin

    def killing_begin(self: RolloutWorker, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        os.kill(worker_pids()[0], signal.SIGKILL)

    monkeypatch.setattr(RolloutWorker, "begin", killing_begin)
    with pytest.raises(SimulatorDied):
        train(replace(on_policy(), simulator=ReachConfig(max_deaths=1)), tmp_path / "run")


def test_a_nan_in_an_observation_stops_the_run_naming_tensor_and_step(tmp_path: Path) -> None:
    config = replace(on_policy(), simulator=ReachConfig(nan_at_seed_below=2**30))
    with pytest.raises(UserError, match=r"observation\.state\[\d,1\] is nan after env step \d+"):
        train(config, tmp_path / "run")


def test_a_nan_in_a_loss_stops_the_run_naming_loss_and_update(tmp_path: Path) -> None:
    config = off_policy()
    broken = replace(config, algorithm=replace(config.algorithm, reward_scale=float("nan")))
    with pytest.raises(UserError, match=r"loss/critic_loss became nan at update \d+"):
        train(broken, tmp_path / "run")


def test_a_policy_that_does_not_fit_the_demonstrations_is_refused(tmp_path: Path) -> None:
    import numpy as np

    from embodied_rl.config import DemonstrationsConfig
    from embodied_rl.data.demonstrations import DemonstrationEpisode, write

    episode = DemonstrationEpisode(
        states=np.zeros((3, 7), np.float32),
        actions=np.zeros((2, 2), np.float32),
        rewards=np.zeros(2, np.float32),
        success=np.array([False, True]),
        terminated=np.array([False, True]),
        truncated=np.zeros(2, bool),
        seed=1,
    )
    write(tmp_path / "other.h5", [episode], "reach", "velocity")
    config = replace(off_policy(), demonstrations=DemonstrationsConfig(1, path=str(tmp_path / "other.h5")))
    with pytest.raises(UserError, match="7 numbers"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    saves = []
    save = checkpoint.save_file

    def filling(tensors: Any, path: Path) -> None:
        saves.append(path)
        if len(saves) == 3:
            path.write_bytes(b"half")
            full()
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", filling)
    with pytest.raises(UserError, match=r"No space left.*last good one is .*000002"):
        train(on_policy(), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["000000", "000002"]
    assert checkpoint.load(folder / "000002")["iteration"] == 2


def test_the_configuration_of_a_run_is_kept(tmp_path: Path) -> None:
    config: RunConfig = on_policy(env_steps=40)
    train(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == json.loads(json.dumps(to_dict(config)))

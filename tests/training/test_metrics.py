import json
import resource
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from embodied_rl.config import RunConfig
from embodied_rl.errors import UserError
from embodied_rl.registry import algorithms, policies, simulators
from embodied_rl.training.metrics import MetricLogger, read_metrics

CONFIG = RunConfig("toy", *(registry.load(registry.names()[0])() for registry in (simulators, policies, algorithms)))


def row(iteration: int, **more: float) -> dict[str, float]:
    return {"iteration": iteration, "env_steps": 100 * iteration, "wall_seconds": 0.5 * iteration, **more}


def test_one_row_per_iteration_is_on_disk_at_once(tmp_path: Path) -> None:
    with MetricLogger(tmp_path, CONFIG, tensorboard=False) as logger:
        logger.log(row(1, **{"train/success": 0.25}))
        logger.log(row(2, **{"loss/critic": float("nan"), "train/return": float("inf")}))
        text = (tmp_path / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert rows[0] == {"iteration": 1, "env_steps": 100, "wall_seconds": 0.5, "train/success": 0.25}
    assert rows[1]["loss/critic"] is None and rows[1]["train/return"] is None


def test_resuming_drops_what_will_be_made_again(tmp_path: Path) -> None:
    with MetricLogger(tmp_path, CONFIG, tensorboard=False) as logger:
        for iteration in range(1, 6):
            logger.log(row(iteration))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 6, "env_st')  # killed while writing
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    with MetricLogger(tmp_path, CONFIG, iteration=3, tensorboard=False) as logger:
        logger.log(row(4, again=1))
    assert [r["iteration"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["again"] == 1


def test_tensorboard_over_env_steps_survives_a_resume(tmp_path: Path) -> None:
    with MetricLogger(tmp_path, CONFIG) as logger:
        for iteration in range(1, 4):
            logger.log(row(iteration, **{"train/success": iteration / 10}))
    with MetricLogger(tmp_path, CONFIG, iteration=2) as logger:
        logger.log(row(3, **{"train/success": 0.9}))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/success")
    assert [(e.step, round(e.value, 3)) for e in events] == [(100, 0.1), (200, 0.2), (300, 0.9)]


def test_wandb_offline_keeps_one_run_over_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for iteration in (0, 1):
        with MetricLogger(tmp_path, CONFIG, iteration=iteration, tensorboard=False, wandb=True) as logger:
            logger.log(row(iteration + 1))
    identity = (tmp_path / "wandb_id").read_text()
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert files and {path.name for path in files} == {f"run-{identity}.wandb"}
    assert all(path.stat().st_size > 0 for path in files)


def test_missing_wandb_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="uv sync --extra wandb"):
        MetricLogger(tmp_path, CONFIG, tensorboard=False, wandb=True)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path, CONFIG, tensorboard=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl"):
            for iteration in range(1, 9):
                logger.log(row(iteration))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        logger.close()

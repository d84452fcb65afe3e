"""A run that is interrupted and resumed, beside one that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_toys import metrics_of

from embodied_rl.config import RunConfig
from embodied_rl.training.metrics import read_metrics
from embodied_rl.training.run import Run, train


def interrupted_and_whole(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(Result, rows) of a run that never stops, in `folder`/whole, after those of another that is interrupted past its
    checkpoint of iteration 2 were found to be the same."""
    whole = train(config, folder / "whole")
    log = Run._log

    def stopping_log(self: Run, metrics: Any) -> None:
        log(self, metrics)
        if self.iteration == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_log", stopping_log)
        with pytest.raises(KeyboardInterrupt):
            train(config, folder / "resumed")
    resumed = train(config, folder / "resumed", resume=True)
    rows, other = (metrics_of(read_metrics(folder / name / "metrics.jsonl")) for name in ("whole", "resumed"))
    assert rows == other
    assert resumed["evaluations"] == whole["evaluations"]
    return whole, rows

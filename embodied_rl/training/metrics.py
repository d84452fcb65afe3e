"""Where the metrics of a run go: `metrics.jsonl` always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embodied_rl.algorithms.off_policy import OfflineConfig
from embodied_rl.config import RunConfig, to_dict
from embodied_rl.errors import UserError
from embodied_rl.files import write_atomic

FILE = "metrics.jsonl"


def budget(config: RunConfig) -> tuple[str, int]:
    """What a run spends, which its metrics are drawn over, and how much of it: "updates" of an offline algorithm,
    "env_steps" of any other."""
    if isinstance(config.algorithm, OfflineConfig):
        return "updates", config.algorithm.steps
    return "env_steps", config.training.env_steps


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class MetricLogger:
    """One row per iteration to every sink. A context manager."""

    def __init__(
        self, out: Path, config: RunConfig, iteration: int = 0, tensorboard: bool = True, wandb: bool = False
    ) -> None:
        """`iteration`: the one a run goes on from; rows of later iterations, written before it was killed, are dropped
        since they are made again."""
        kept = [row for row in read_metrics(out / FILE) if row["iteration"] <= iteration]
        write_atomic(out / FILE, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = (out / FILE).open("a")
        self._axis, _ = budget(config)
        self._tensorboard: Any = None
        self._wandb: Any = None
        if tensorboard:
            self._tensorboard = _tensorboard(out, kept[-1][self._axis] + 1 if kept else None)
        if wandb:
            self._wandb = _wandb(out, config)

    def log(self, row: Mapping[str, float | None]) -> None:
        """`row` has "iteration" and what the run spent (`budget`); numbers that are not finite are recorded as null."""
        clean = {name: _number(value) for name, value in row.items()}
        try:
            self._file.write(json.dumps(clean, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self._file.name}: {error.strerror}; free disk space and resume") from error
        known = {name: value for name, value in clean.items() if value is not None}
        if self._tensorboard is not None:
            for name, value in known.items():
                self._tensorboard.add_scalar(name, value, known[self._axis])
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(known, step=int(known["iteration"]))

    def close(self) -> None:
        """May be called twice."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _number(value: float | None) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    return value if type(value) is int else float(value)


def _tensorboard(out: Path, purge_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=purge_step)


def _wandb(out: Path, config: RunConfig) -> Any:
    try:
        import wandb
        from wandb.errors import Error
    except ImportError as error:
        raise UserError(
            "logging.wandb needs the package wandb: run `uv sync --extra wandb` (or `pip install wandb`), or leave out "
            "--wandb"
        ) from error
    identity = out / "wandb_id"
    if not identity.exists():
        write_atomic(identity, secrets.token_hex(4))
    try:
        run = wandb.init(
            project="embodied_rl",
            name=out.resolve().name,
            id=identity.read_text(),
            resume="allow",
            dir=str(out),
            config=to_dict(config),
            tags=[config.recipe],
        )
    except Error as error:
        raise UserError(f"Weights & Biases: {error}; run `wandb login`, or set WANDB_MODE=offline") from error
    axis, _ = budget(config)
    run.define_metric(axis)
    run.define_metric("*", step_metric=axis)
    return run

"""Which loop the family of an algorithm asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from embodied_rl.algorithms.base import EpisodicAlgorithm, OfflineAlgorithm, OffPolicyAlgorithm, OnPolicyAlgorithm
from embodied_rl.config import RunConfig
from embodied_rl.data.replay_buffer import ReplayBuffer
from embodied_rl.errors import UserError
from embodied_rl.pipeline.rollout import RolloutWorker
from embodied_rl.training.on_policy import EpisodeWorkflow, SegmentWorkflow
from embodied_rl.training.workflows import OfflineWorkflow, OffPolicyWorkflow, Workflow


def workflow(
    config: RunConfig,
    algorithm: Any,
    worker: Any,
    generator: torch.Generator,
    chunks: dict[str, Any] | None,
    decisions: Callable[[], ReplayBuffer],
    folder: Path,
) -> Workflow:
    """Raises `UserError` where the pipeline does not serve the family. Demonstrations: their `chunks` for imitation,
    and as `decisions` with rewards. `folder`: of the run."""
    count, name = config.training.decisions_per_iteration, type(algorithm).__name__
    collects = isinstance(algorithm, OnPolicyAlgorithm | EpisodicAlgorithm)
    if config.pipeline.executor != "local" and not collects:
        raise UserError(f"pipeline.executor ray does not serve {name}: leave it at local")
    if config.pipeline.env_groups > 1 and not collects:
        raise UserError(f"pipeline.env_groups does nothing for {name}: leave it at 1")
    if isinstance(algorithm, OnPolicyAlgorithm):
        return SegmentWorkflow(worker, algorithm, count, generator)
    if isinstance(algorithm, EpisodicAlgorithm):
        return EpisodeWorkflow(worker, algorithm, generator)
    if isinstance(algorithm, OffPolicyAlgorithm):
        assert isinstance(worker, RolloutWorker)
        known = decisions() if algorithm.demonstrations == "decisions" else chunks
        return OffPolicyWorkflow(worker, algorithm, count, generator, config.seed, known, folder)
    if isinstance(algorithm, OfflineAlgorithm):
        return OfflineWorkflow(algorithm, decisions(), generator, config.seed)
    raise UserError(f"algorithm '{name}' cannot learn from rollouts: choose another")

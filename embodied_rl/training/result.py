"""What a run came to: the content of its result.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embodied_rl.config import RunConfig
from embodied_rl.training.evaluation import EvaluationResult
from embodied_rl.training.report import versions


def summary(config: RunConfig, evaluations: Sequence[EvaluationResult], counts: dict[str, Any]) -> dict[str, Any]:
    """`counts`: steps, seconds, deaths and the like."""
    success = {result.name: result.success for result in evaluations}
    return {
        "recipe": config.recipe,
        "seed": config.seed,
        "initial_success": success["initial"],
        "final_success": success["final"],
        "converged_clone_success": success.get("converged_clone"),
        "evaluation_episodes": config.evaluation.episodes,
        "evaluations": [result.to_dict() for result in evaluations],
        **counts,
        "versions": versions(),
    }

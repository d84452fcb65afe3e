"""A ready-made run with this package's own parts."""

from __future__ import annotations

from embodied_rl.config import EvaluationConfig, RunConfig, TrainingConfig
from toy_robotics.algorithm import ReinforceConfig
from toy_robotics.policy import LinearConfig
from toy_robotics.simulator import LineConfig


def line() -> RunConfig:
    """A cart learns to stop at a mark."""
    return RunConfig(
        recipe="line",
        simulator=LineConfig(),
        policy=LinearConfig(),
        algorithm=ReinforceConfig(),
        training=TrainingConfig(env_steps=20_000, decisions_per_iteration=16),
        evaluation=EvaluationConfig(episodes=20),
    )

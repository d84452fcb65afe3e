"""A point that must reach a target: a task small enough to train, break and resume within seconds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from reach import SPEED

from embodied_rl.algorithms.flow_actor_critic import FlowActorCriticConfig
from embodied_rl.algorithms.imitation import ImitationConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import DemonstrationsConfig, EvaluationConfig, LoggingConfig, RunConfig, TrainingConfig
from embodied_rl.policies.flow_mlp import FlowMLPConfig
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.registry import simulators
from embodied_rl.simulators.base import ResetSchedule, Simulator
from embodied_rl.simulators.workers import WorkerSimulator


class ReachDemonstrator:
    """Straight to the target."""

    def reset(self, rows: np.ndarray, tasks: np.ndarray) -> None:
        """Remembers nothing."""

    def actions(self, state: np.ndarray) -> np.ndarray:
        return np.clip((state[:, 2:] - state[:, :2]) / SPEED, -1, 1).astype(np.float32)


@dataclass(frozen=True)
class ReachConfig:
    num_envs: int = 4
    workers: int = 2
    nan_at_seed_below: int = 0
    max_deaths: int = 3

    @property
    def num_tasks(self) -> int:
        return 1

    @property
    def num_states(self) -> int:
        return 0

    def demonstrator(self) -> ReachDemonstrator:
        return ReachDemonstrator()

    def build(self, schedule: ResetSchedule, *, log_dir: Path | None = None) -> Simulator:
        return WorkerSimulator(
            "reach:Reach",
            {"nan_at_seed_below": self.nan_at_seed_below},
            self.num_envs,
            self.workers,
            schedule,
            log_dir=log_dir,
            python_path=[str(Path(__file__).parent)],
            max_deaths=self.max_deaths,
        )


simulators.register("reach", "training_toys:ReachConfig")

SMALL = {"hidden": (32, 32), "value_hidden": (32,)}


def off_policy(**training: Any) -> RunConfig:
    """A clone of few, noisy demonstrations, then the flow actor-critic."""
    return RunConfig(
        recipe="toy_off_policy",
        simulator=ReachConfig(),
        policy=FlowMLPConfig(horizon=2, chunk=2, **SMALL),
        demonstrations=DemonstrationsConfig(episodes=4, noise=0.3),
        imitation=ImitationConfig(steps=50, batch_size=32),
        algorithm=FlowActorCriticConfig(
            critic_hidden=(32, 32),
            batch_size=32,
            anchor_batch_size=16,
            anchor_minimum=20,
            learning_starts=60,
            critic_warmup_updates=10,
            shaping=1.0,
            replay_capacity=800,
        ),
        training=_training(training),
        evaluation=EvaluationConfig(episodes=6),
        logging=LoggingConfig(tensorboard=False),
    )


def on_policy(**training: Any) -> RunConfig:
    """PPO from scratch."""
    return RunConfig(
        recipe="toy_on_policy",
        simulator=ReachConfig(),
        policy=GaussianMLPConfig(chunk=2, **SMALL),
        algorithm=PPOConfig(epochs=2, minibatches=2, critic_warmup=1),
        training=_training(training),
        evaluation=EvaluationConfig(episodes=6),
        logging=LoggingConfig(tensorboard=False),
    )


def _training(changes: dict[str, Any]) -> TrainingConfig:
    values: dict[str, Any] = {
        "env_steps": 320,
        "decisions_per_iteration": 8,
        "evaluate_every": 2,
        "development_episodes": 4,
        "checkpoint_every": 2,
    }
    return TrainingConfig(**(values | changes))


def worker_pids() -> list[int]:
    """This process's simulator workers."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command = (folder / "cmdline").read_bytes()
            except OSError:  # it ended meanwhile
                continue
            if parent == os.getpid() and b"simulators.worker" in command:
                found.append(int(folder.name))
    return sorted(found)


def metrics_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what the clock decides."""
    return [{name: value for name, value in row.items() if not name.startswith(("time/", "wall_"))} for row in rows]

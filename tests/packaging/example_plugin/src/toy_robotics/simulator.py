"""A cart on a line that should reach a mark; one environment, hosted in worker processes by embodied_rl."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embodied_rl.simulators.base import Demonstrator, Environment, InitialState, ResetSchedule, Simulator
from embodied_rl.specs import ActionSpec, ObservationSpec, TaskSpec

REACHED = 0.1
"""Distance to the mark that counts as success."""


class Line(Environment):
    """State: position and mark, both in [-1, 1]; action: velocity."""

    observation_spec = ObservationSpec(state=2)
    action_spec = ActionSpec(low=(-1.0,), high=(1.0,), hold=(0.0,), control="velocity")

    def __init__(self, max_steps: int) -> None:
        self.tasks = (TaskSpec("reach", "stop the cart at the mark", max_steps, True, "dense"),)
        self.max_steps = max_steps

    def reset(self, state: InitialState) -> None:
        self.position, self.mark = np.random.default_rng(state.seed).uniform(-1, 1, 2)
        self.steps = 0

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool | None]:
        self.position = np.clip(self.position + 0.2 * float(action[0]), -1, 1)
        self.steps += 1
        distance = abs(self.position - self.mark)
        success = bool(distance < REACHED)
        return -distance, success, self.steps >= self.max_steps, success

    def observe(self) -> dict[str, np.ndarray]:
        return {"state": np.array([self.position, self.mark], np.float32)}


class Straight:
    """Drives straight to the mark."""

    def reset(self, rows: np.ndarray, tasks: np.ndarray) -> None:
        """Nothing to forget."""

    def actions(self, state: np.ndarray) -> np.ndarray:
        return np.clip((state[:, 1:] - state[:, :1]) / 0.2, -1, 1)


@dataclass(frozen=True)
class LineConfig:
    """A cart on a line."""

    num_envs: int = 16
    workers: int = 1
    max_steps: int = 20
    num_tasks: int = 1
    num_states: int = 0

    def demonstrator(self) -> Demonstrator:
        return Straight()

    def build(self, schedule: ResetSchedule, *, log_dir: Path | None = None) -> Simulator:
        from embodied_rl.simulators.workers import WorkerSimulator

        kwargs = {"max_steps": self.max_steps}
        target = "toy_robotics.simulator:Line"
        return WorkerSimulator(target, kwargs, self.num_envs, self.workers, schedule, log_dir=log_dir)

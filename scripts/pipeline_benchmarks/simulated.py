"""A simulator that costs what it is told to, by sleeping, and really moves the images of two cameras."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embodied_rl.simulators.base import BatchedEnvironment, InitialState, ResetSchedule
from embodied_rl.simulators.workers import WorkerSimulator
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec, TaskSpec

SIZE = 224
CAMERAS = ("front", "wrist")
STATE = 16
LONGEST = 100


class Simulated(BatchedEnvironment):
    """Episodes of LONGEST steps. Every image of a row is full of the number of steps its episode has made, which the
    state begins with, so that whoever receives them can tell whether they arrived."""

    action_spec = ActionSpec(low=(-1.0,) * 7, high=(1.0,) * 7, hold=(0.0,) * 7)
    tasks = (TaskSpec("simulated", "do as you like", LONGEST, False, "dense"),)

    def __init__(self, num_envs: int, seconds: float) -> None:
        """`seconds`: of a step of one environment."""
        self.num_envs = num_envs
        self.observation_spec = ObservationSpec(state=STATE, cameras=dict.fromkeys(CAMERAS, CameraSpec(SIZE, SIZE)))
        self._cost = seconds * num_envs
        self._at = np.zeros(num_envs, np.int64)
        self._images = np.zeros((num_envs, SIZE, SIZE, 3), np.uint8)

    def reset(self, rows: np.ndarray, states: list[InitialState]) -> None:
        self._at[rows] = [state.seed % LONGEST for state in states]  # so that not all end together
        self._draw(rows)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, None]:
        until = time.perf_counter() + self._cost
        self._at += 1
        self._draw(np.arange(self.num_envs))
        reward, never = actions.mean(1), np.zeros(self.num_envs, bool)
        time.sleep(max(0.0, until - time.perf_counter()))
        return reward, never, self._at >= LONGEST, None

    def observe(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        state = np.repeat(self._at[rows, None], STATE, 1).astype(np.float32)
        images = self._images if len(rows) == self.num_envs else self._images[rows]
        return {"state": state} | {f"image.{name}": images for name in CAMERAS}

    def _draw(self, rows: np.ndarray) -> None:
        self._images[rows] = self._at[rows, None, None, None]


@dataclass(frozen=True)
class SimulatedConfig:
    num_envs: int
    workers: int
    seconds: float
    """Of a step of one environment."""

    def build(self, schedule: ResetSchedule, *, log_dir: Path | None = None) -> WorkerSimulator:
        target, kwargs = "pipeline_benchmarks.simulated:Simulated", {"seconds": self.seconds}
        return WorkerSimulator(target, kwargs, self.num_envs, self.workers, schedule, log_dir=log_dir)

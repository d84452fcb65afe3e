"""What it costs to bring images out of a simulator's process: 16 environments, two cameras of 224 x 224, against one
copy of these bytes within a process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from embodied_rl.simulators.base import BatchedEnvironment, InitialState
from embodied_rl.simulators.reset_schedule import RandomSchedule
from embodied_rl.simulators.workers import WorkerSimulator
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec, TaskSpec

NUM_ENVS, SIZE = 16, 224
CALLS = 200
"""Per round and side."""
_MEGABYTES = NUM_ENVS * 2 * SIZE * SIZE * 3 / 1e6


class StillLife(BatchedEnvironment):
    """Costs nothing: what remains is the host."""

    action_spec = ActionSpec(low=(-1.0,) * 7, high=(1.0,) * 7, hold=(0.0,) * 7)
    tasks = (TaskSpec("still life", "look", 10**9, False, "none"),)

    def __init__(self, num_envs: int, cameras: list[str]) -> None:
        self.num_envs = num_envs
        self.observation_spec = ObservationSpec(state=8, cameras={name: CameraSpec(SIZE, SIZE) for name in cameras})
        random = np.random.default_rng(0)
        shape = (num_envs, SIZE, SIZE, 3)
        self._frame: dict[str, np.ndarray] = {"state": np.zeros((num_envs, 8), np.float32)}
        for name in cameras:
            self._frame[f"image.{name}"] = random.integers(0, 256, shape, np.uint8)
        self._reward, self._never = np.zeros(num_envs, np.float32), np.zeros(num_envs, bool)

    def reset(self, rows: np.ndarray, states: list[InitialState]) -> None:
        """Nothing moves."""

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        return self._reward, self._never, self._never, None

    def observe(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        if len(rows) == self.num_envs:
            return self._frame
        return {name: array[rows] for name, array in self._frame.items()}


def microseconds(*sides: Callable[[], Any]) -> list[float]:
    """Medians of `CALLS` calls of each side, which take turns."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(CALLS):
        for side, call in zip(times, sides, strict=True):
            start = time.perf_counter()
            call()
            side.append(time.perf_counter() - start)
    return [1e6 * statistics.median(side) for side in times]


def host(cameras: list[str]) -> WorkerSimulator:
    """`NUM_ENVS` still lifes in one process."""
    target, here = "simulator_benchmarks.transport:StillLife", str(Path(__file__).parents[1])
    simulator = WorkerSimulator(target, {"cameras": cameras}, NUM_ENVS, 1, RandomSchedule(0), python_path=[here])
    simulator.reset(tickets=np.arange(NUM_ENVS))
    return simulator


def measure(smoke: bool) -> dict[str, Any]:
    """{"host_transport_vs_memcpy": time of a chunk of one action with images, over that of a copy of them;
    "host_images_vs_memcpy": what the images add to that time instead; "host_call_us": the time without images}.

    Calls take turns, because a core that has just been idle copies at half the speed or less for a while: all sides
    then begin on one. The same copy over and over, on a core that never sleeps, is printed too. Every round has
    processes and memory of its own: where these happen to lie makes a difference of a third.
    """
    rounds = [_round() for _ in range(5 if smoke else 15)]
    bare, whole, memcpy, hot = (statistics.median(side) for side in zip(*rounds, strict=True))
    print(f"a call for {NUM_ENVS} environments: {bare:.0f} us, with {_MEGABYTES:.1f} MB of images {whole:.0f} us")
    print(f"memcpy of the images: {memcpy:.0f} us, {hot:.0f} us without a pause")
    ratios = sorted(b / c for _, b, c, _ in rounds)
    print(f"call with images / memcpy: {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")
    return {
        "host_transport_vs_memcpy": round(statistics.median(ratios), 3),
        "host_images_vs_memcpy": round(statistics.median((b - a) / c for a, b, c, _ in rounds), 3),
        "host_call_us": round(bare, 1),
    }


def _round() -> tuple[float, float, float, float]:
    """Microseconds of a call without images, with them, of a copy of them in turn, and over and over."""
    with host([]) as blind, host(["agentview", "robot0_eye_in_hand"]) as seeing:
        actions = np.zeros((NUM_ENVS, 1, 7), np.float32)
        images = list(seeing.step(actions).observation.copy().images.values())
        copies = [np.empty_like(image) for image in images]

        def copy() -> None:
            for image, target in zip(images, copies, strict=True):
                np.copyto(target, image)

        bare, whole, memcpy = microseconds(lambda: blind.step(actions), lambda: seeing.step(actions), copy)
        (hot,) = microseconds(copy)
        return bare, whole, memcpy, hot

"""The simulators of the matrix, with cameras and small, and a record of what they show and are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied_rl.errors import UserError
from embodied_rl.simulators import interpreters, vulkan
from embodied_rl.simulators.base import Simulator
from embodied_rl.simulators.isaaclab.config import IsaacLabConfig
from embodied_rl.simulators.libero.config import LiberoConfig
from embodied_rl.simulators.libero.config import tasks as libero_tasks
from embodied_rl.simulators.maniskill.config import ManiSkillConfig
from embodied_rl.simulators.reset_schedule import GroupSchedule
from embodied_rl.types import ChunkResult, Observation

ROWS, GROUP, STEPS = 4, 2, 4
"""Environments, episodes from one initial state, and steps until an episode ends."""
SIZE = 48
"""Of the images: no network here takes this size, so all have to resize."""


@dataclass(frozen=True)
class Place:
    """A simulator, and what a policy has to be told about it because no checkpoint knows it."""

    name: str
    config: Any
    cameras: tuple[str, ...]
    """The scene's, then the hand's where there is one."""
    state: tuple[str, ...]
    """The numbers that published checkpoints are given, by the simulator's names; () = all there are."""
    finger: int
    """Where in the simulator's state a finger's position is, which grows when the gripper opens."""
    absent: Callable[[], str | None]
    """Why it cannot run here."""
    marks: tuple[Any, ...] = ()

    def start(self, logs: Path) -> Simulator:
        """Episodes come in groups that share an initial state."""
        schedule = GroupSchedule(0, GROUP, self.config.num_tasks, num_states=getattr(self.config, "num_states", 0))
        return self.config.build(schedule, log_dir=logs)


def _no_assets() -> str | None:
    listed = [task for task in libero_tasks() if task.name.startswith("libero_spatial/")]
    return next((listed[index].missing for index in (0, 2) if listed[index].missing), None)


def _no_isaac_lab() -> str | None:
    try:
        interpreters.interpreter("isaaclab")
    except UserError as error:
        return str(error)
    return None


PLACES = (
    Place(
        "libero",
        LiberoConfig(tasks=(0, 2), image_size=SIZE, max_steps=STEPS, reflections=False, num_envs=ROWS, workers=1),
        cameras=("agentview", "robot0_eye_in_hand"),
        state=(),
        finger=6,
        absent=_no_assets,
    ),
    Place(
        "maniskill",
        ManiSkillConfig(
            "PickCube-v1",
            control_mode="pd_ee_delta_pose",
            observation="rgb",
            reward="normalized_dense",
            image_size=SIZE,
            max_steps=STEPS,
            num_envs=ROWS,
            workers=1,
        ),
        cameras=("base_camera",),
        state=(),
        finger=7,
        absent=vulkan.problem,
        marks=(pytest.mark.slow,),
    ),
    Place(
        "isaaclab",
        IsaacLabConfig(
            "IsaacContrib-Stack-Cube-Franka-IK-Rel-Visuomotor",
            "rgb",
            reward="staged",
            image_size=SIZE,
            max_steps=STEPS,
            num_envs=ROWS,
        ),
        cameras=("table_cam", "wrist_cam"),
        state=("policy.eef_pos", "policy.eef_quat:axis_angle", "policy.gripper_pos"),
        finger=32,
        absent=_no_isaac_lab,
        marks=(pytest.mark.slow, pytest.mark.timeout(1800)),
    ),
)


class Recorder:
    """A simulator that remembers what it showed (`seen`) and which actions it was told to execute (`told`)."""

    def __init__(self, place: Place, simulator: Simulator) -> None:
        self.place = place
        self._simulator = simulator
        self.seen: list[Observation] = []
        self.told: list[np.ndarray] = []
        self._returns: Callable[[int], float] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._simulator, name)

    def reset(self, env_ids: np.ndarray | None = None, tickets: np.ndarray | None = None) -> Observation:
        observation = self._simulator.reset(env_ids, tickets)
        self.seen.append(observation.copy())
        return observation

    def send(self, actions: np.ndarray, *rest: Any, **named: Any) -> None:
        self.told.append(np.array(actions))
        self._simulator.send(actions, *rest, **named)

    def receive(self) -> ChunkResult:
        result = self._simulator.receive()
        self.seen.append(result.observation.copy())
        for episode in result.episodes:
            if self._returns is not None:
                episode.episode_return = self._returns(episode.ticket)
        return result

    @contextmanager
    def returns(self, of: Callable[[int], float]) -> Iterator[None]:
        """Meanwhile an episode's return is made up from its ticket."""
        self._returns = of
        yield
        self._returns = None

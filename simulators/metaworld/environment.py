"""MetaWorld's tasks, one episode at a time, with MetaWorld's own numbers; see `lean.py` for how they get faster."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from embodied_rl.errors import UserError
from embodied_rl.simulators import mujoco_gl
from embodied_rl.simulators.base import Environment, InitialState
from embodied_rl.simulators.metaworld.instructions import INSTRUCTIONS
from embodied_rl.simulators.metaworld.lean import Scene
from embodied_rl.simulators.metaworld.rendering import CAMERA, forget_uploads, image
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec, TaskSpec

STATE_SIZE = 39
PROPRIOCEPTION = 4
"""The first numbers of the state: the hand's position and how far the gripper is open."""
RECORDED_SEED = 42
"""Of the recorded placements, as in lerobot."""
RECORDED = 50
"""Placements per task."""


class MetaWorldEnvironment(Environment):
    """One environment that can run any of `tasks`; observations, rewards and success equal MetaWorld's bit for bit.

    An episode is a function of its initial state alone: it begins with the task's constructor. Raises `UserError` for
    images without OpenGL.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        observation: str = "state",
        reward: str = "dense",
        end_on_success: bool = True,
        max_steps: int = 500,
        image_size: int = 224,
        rendering: str = "full",
    ) -> None:
        self._images = observation != "state"
        if self._images:
            mujoco_gl.configure()
        self._full = observation != "rgb"
        self._sparse = reward == "sparse"
        self._end_on_success = end_on_success
        self._max_steps = max_steps
        self._size, self._plain = image_size, rendering == "plain"
        self._scene: Scene | None = None
        self._env: Any = None
        self._steps = 0
        self._state = np.zeros(STATE_SIZE)
        self.observation_spec = ObservationSpec(
            state=STATE_SIZE if self._full else PROPRIOCEPTION,
            state_names=_state_names()[: None if self._full else PROPRIOCEPTION],
            cameras={CAMERA: CameraSpec(image_size, image_size)} if self._images else {},
        )
        self.action_spec = ActionSpec(
            low=(-1.0,) * 4,
            high=(1.0,) * 4,
            hold=(0.0,) * 4,
            control="mocap_delta_pos",
            gripper=3,
            gripper_open=-1,
        )
        self.tasks = tuple(TaskSpec(name, INSTRUCTIONS[name], max_steps, True, reward) for name in tasks)

    def reset(self, state: InitialState) -> None:
        """`state.index` is one of the 50 recorded placements; without one, `state.seed` draws the placement."""
        name = self.tasks[state.task].name
        if self._scene is None or self._scene.name != name:
            self._release()
            self._scene = _take(name)
        self._env = self._scene.fresh()
        if state.index is None:
            self._env._freeze_rand_vec, self._env.seeded_rand_vec = False, True
            self._env.seed(state.seed)
        elif 0 <= state.index < RECORDED:
            self._env._last_rand_vec = recorded_placements(name)[state.index].copy()
        else:
            raise UserError(f"MetaWorld has {RECORDED} recorded placements of {name}, 0 to 49, and no {state.index}")
        self._state, _ = self._env.reset()
        self._steps = 0

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool | None]:
        self._state, reward, success = self._env.advance(action)
        self._steps += 1
        ended = success and self._end_on_success
        return float(success) if self._sparse else reward, ended, self._steps >= self._max_steps, success

    def observe(self) -> dict[str, np.ndarray]:
        size = STATE_SIZE if self._full else PROPRIOCEPTION
        frame = {"state": self._state[:size].astype(np.float32)}
        if self._images and self._scene:
            scene = self._scene
            scene.mujoco.mj_forward(scene.model, scene.data)  # places what a step leaves aside: cameras and lights
            picture = image(scene.name, scene.model, scene.data, self._size, self._plain)
            frame[f"image.{CAMERA}"] = picture
        return frame

    def close(self) -> None:
        self._release()
        forget_uploads()

    def _release(self) -> None:
        if self._scene:
            _give_back(self._scene)
            self._scene = None


_idle: dict[str, list[Scene]] = {}
"""Compiled models (some 20 MB each) that no environment of this process uses now."""


def _take(name: str) -> Scene:
    return _idle[name].pop() if _idle.get(name) else Scene(name)


def _give_back(scene: Scene) -> None:
    _idle.setdefault(scene.name, []).append(scene)


@functools.cache
def recorded_placements(name: str) -> np.ndarray:
    """The random vectors float64 [50,D] of `metaworld.MT1(name, seed=42).train_tasks`, in their order."""
    scene = _take(name)
    env = scene.fresh()
    env.settles = env._freeze_rand_vec = False
    before = np.random.get_state()  # noqa: NPY002 - the generator MetaWorld draws from
    np.random.seed(RECORDED_SEED)  # noqa: NPY002
    drawn = []
    for _ in range(RECORDED):
        env.reset()
        drawn.append(env._last_rand_vec)
    np.random.set_state(before)  # noqa: NPY002
    _give_back(scene)
    return np.array(drawn)


def _state_names() -> tuple[str, ...]:
    parts = {"hand": 3, "gripper": 1, "object": 3, "object_quaternion": 4, "object2": 3, "object2_quaternion": 4}
    now = [f"{name}.{i}" for name, size in parts.items() for i in range(size)]
    return (*now, *(f"previous.{name}" for name in now), *(f"goal.{i}" for i in range(3)))

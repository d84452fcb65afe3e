"""LIBERO with its own numbers, without most of its cost: physics and controller without robosuite's layers
(`control.py`), images only when asked for (`rendering.py`), tasks built once per process (`scene.py`)."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from embodied_rl.simulators.base import Environment, InitialState
from embodied_rl.simulators.libero import suites
from embodied_rl.simulators.libero.config import LiberoConfig
from embodied_rl.simulators.libero.scene import Scene, World
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec, TaskSpec

PROPRIOCEPTION = (
    *(f"eef_pos.{axis}" for axis in "xyz"),
    *(f"eef_axis_angle.{axis}" for axis in "xyz"),
    "gripper_qpos.0",
    "gripper_qpos.1",
)

_built: OrderedDict[tuple[suites.Task, int | None, bool], Scene] = OrderedDict()
"""The tasks of this process, the one used last at the end; all environments of a process share them."""

_open: weakref.WeakSet[LiberoEnvironment] = weakref.WeakSet()


def built(task: suites.Task, image_size: int | None, reflections: bool, keep: int) -> Scene:
    """The scene of `task`, built when it is not; at most `keep` stay."""
    key = task, image_size, reflections
    if key not in _built:
        while len(_built) >= keep:
            _built.popitem(last=False)
        gc.collect()  # robosuite's objects refer to each other in circles
        _built[key] = Scene(*key)
        _return_memory()
    _built.move_to_end(key)
    return _built[key]


def _return_memory() -> None:
    # Reading a scene takes a hundred megabytes more than keeping it; glibc keeps them to itself unless told.
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


class LiberoEnvironment(Environment):
    """One environment that runs any task of its configuration. States, images, rewards and terminations equal those of
    LIBERO's `OffScreenRenderEnv` bit for bit, whatever episode ran before.

    An episode ends in success (reward 1, else 0) or at its time limit. Where fixtures stand and, without a recorded
    state, where objects stand comes from LIBERO's own random placement: seeded by the task and the recorded state
    alone, so that all episodes from one recorded state share it, and by `InitialState.seed` when there is none.
    """

    def __init__(self, **options: Any) -> None:
        """`options` as in `LiberoConfig`. Raises `UserError` as its `build` does."""
        config = LiberoConfig(**options)
        _open.add(self)
        self._config = config
        self._chosen = config.chosen
        self._limits = config.limits
        self._size = None if config.observation == "state" else config.image_size
        self.tasks = tuple(
            TaskSpec(f"{task.suite}/{task.name}", task.instruction, limit, has_success=True, reward="sparse")
            for task, limit in zip(self._chosen, self._limits, strict=True)
        )
        self.action_spec = ActionSpec(
            low=(-1.0,) * 7,
            high=(1.0,) * 7,
            # No motion, and fingers that go on pressing as they do: robosuite moves them by the sign of the action.
            hold=(0.0,) * 7,
            control="osc_pose",
            gripper=6,
            gripper_open=-1,
        )
        self._task = 0
        self._scene: Scene | None = self._build(0)
        self._world: World | None = self._scene.world()
        self.observation_spec = self._spec(self._scene)
        self._steps = 0

    def reset(self, state: InitialState) -> None:
        task = self._chosen[state.task]
        scene = self._build(state.task)
        if scene is not self._scene or self._world is None:
            self._world = scene.world()
        self._scene, self._task = scene, state.task
        seed = state.seed if state.index is None else placement_seed(task, state.index)
        scene.reset(self._world, state.index, seed, self._config.settle_steps)
        self._steps = 0

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool | None]:
        scene, world = self._running()
        success = scene.step(world, action)
        self._steps += 1
        return float(success), success, self._steps >= self._limits[self._task], success

    def observe(self) -> dict[str, np.ndarray]:
        scene, world = self._running()
        state = scene.proprioception(world)
        if self._config.observation != "rgb":
            state = np.concatenate([state, scene.objects(world)])
        observation = {"state": state.astype(np.float32)}
        if self._size:
            observation |= {f"image.{name}": image for name, image in scene.images(world).items()}
        return observation

    def close(self) -> None:
        """The last environment of a process also frees the tasks that were built."""
        self._scene = self._world = None
        _open.discard(self)
        if not _open:
            _built.clear()
            gc.collect()

    def _build(self, index: int) -> Scene:
        return built(self._chosen[index], self._size, self._config.reflections, self._config.built_tasks)

    def _running(self) -> tuple[Scene, World]:
        if self._scene is None or self._world is None:
            raise RuntimeError("the environment is closed")
        return self._scene, self._world

    def _spec(self, scene: Scene) -> ObservationSpec:
        views = {name: CameraSpec(self._size, self._size) for name in suites.CAMERAS} if self._size else {}
        if self._config.observation == "rgb":
            return ObservationSpec(len(PROPRIOCEPTION), PROPRIOCEPTION, views)
        bodies, joints = scene.object_names
        names = [*PROPRIOCEPTION, *object_state_names(bodies, joints)]
        starts = tuple(len(PROPRIOCEPTION) + 7 * i + 3 for i in range(len(bodies)))
        same = len({suites.contents(task) for task in self._chosen}) == 1
        return ObservationSpec(len(names), tuple(names) if same else (), views, quaternion="xyzw", quaternion_at=starts)


def object_state_names(bodies: Sequence[str], joints: Sequence[str]) -> list[str]:
    """A name for each number of `Scene.objects`."""
    parts = ("pos.x", "pos.y", "pos.z", "quat.x", "quat.y", "quat.z", "quat.w")
    return [f"{body}.{part}" for body in bodies for part in parts] + list(joints)


def placement_seed(task: suites.Task, index: int) -> int:
    """The seed of LIBERO's placement for the recorded state `index`, in [0, 2**31); the same on every machine."""
    digest = hashlib.blake2b(f"{task.suite}/{task.name}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 2**31

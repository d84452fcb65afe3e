"""One LIBERO task as it is built: robosuite's environment with MuJoCo's model, shared by the rows of a process.

What belongs to a row is its `World`. A scene is lent to one world at a time: before anything is done with a world, the
scene takes over its data, its fixtures and its visible lights.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from embodied_rl.errors import UserError
from embodied_rl.simulators.libero import assets, init_states, installed
from embodied_rl.simulators.libero.control import Controller, Looked, Memory, looks
from embodied_rl.simulators.libero.rendering import Renderer
from embodied_rl.simulators.libero.suites import CAMERAS, Task

NO_OP = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
"""What settles a scene: no motion, gripper open."""


@dataclass
class Dressing:
    """The parts of the model that a reset or a step changes: where bodies are fixed (LIBERO moves its fixtures), and
    the colours of sites (a stove that is on glows)."""

    body_pos: np.ndarray
    body_quat: np.ndarray
    site_rgba: np.ndarray

    @classmethod
    def of(cls, model: Any) -> Dressing:
        return cls(model.body_pos.copy(), model.body_quat.copy(), model.site_rgba.copy())

    def put_on(self, model: Any) -> None:
        model.body_pos[:], model.body_quat[:], model.site_rgba[:] = self.body_pos, self.body_quat, self.site_rgba


@dataclass
class World:
    """One row's own part of a scene."""

    data: Any
    """`mujoco.MjData`."""
    dressing: Dressing
    memory: Memory
    looked: Looked
    """What the sensors last saw."""
    seen_rgba: np.ndarray
    """The colours of sites at that moment."""
    forced: int = 0
    """How often the sensors were sampled by the reset."""
    steps: int = 0
    """Control steps since the reset, settling included."""


@dataclass(frozen=True)
class Start:
    """A settled world without its `MjData`, whose numbers are in `state`."""

    state: np.ndarray
    world: World


class Scene:
    """A built task."""

    def __init__(self, task: Task, image_size: int | None, reflections: bool = True) -> None:
        """Cameras of `image_size` pixels, none for None. Raises `UserError` for missing assets."""
        problems = installed.problems()
        mujoco = installed.mujoco()
        assets.check(task)
        self.task = task
        self._mujoco = mujoco
        self._bare: Any = None
        self.env = self._build(problems)
        self._owner: World | None = None
        self._initializers = list(self.env.object_property_initializers)
        self._place(self.world(), 0)
        self.controller = Controller(self.model, self.env.robots[0])
        self.recorded = init_states.read(task.init_states)
        self._starts: dict[tuple[int, int, int], Start] = {}
        self._view = mujoco.MjData(self.model)
        self._renderer = Renderer(self.model, CAMERAS, image_size, reflections) if image_size else None
        self._sensors()

    @property
    def model(self) -> Any:
        """The `mujoco.MjModel`."""
        return self.env.sim.model._model

    def world(self) -> World:
        """An empty world, to be reset."""
        nothing = Memory(np.zeros(3), np.zeros((3, 3)), np.zeros(2), None)
        looked = Looked(np.zeros(0), np.zeros(0))
        return World(self._mujoco.MjData(self.model), self._bare, nothing, looked, self._bare.site_rgba)

    def reset(self, world: World, index: int | None, seed: int, settle: int) -> None:
        """Begin an episode from the recorded state `index`, or with None from a placement that LIBERO draws, and let
        it settle for `settle` control steps.

        `seed` is for everything LIBERO draws: the recorded states do not say where cabinets and stoves stand. What came
        before leaves no trace, so the settled start of a recorded state is kept and used again.
        """
        if index is None:
            self._place(world, seed)
        else:
            start = self._starts.get((index, seed, settle))
            if start:
                self._restore(world, start)
                return
            self._place(world, seed)
            self._put(world, self.recorded[index])
        for _ in range(settle):
            self._advance(world, NO_OP)
        if index is not None:
            self._starts[index, seed, settle] = self._keep(world)

    def step(self, world: World, action: np.ndarray) -> bool:
        """One control step of `action` float [7]; whether the task is solved."""
        self._lend(world)
        self._advance(world, action)
        return bool(self.env._check_success())

    def proprioception(self, world: World) -> np.ndarray:
        """float64 [8]: position of the gripper site (m, world frame), its orientation as an axis times an angle (rad),
        positions of the two fingers (m)."""
        self._look(world)
        quaternion = np.roll(self._view.xquat[self._hand], -1)
        return np.concatenate(
            [self._view.site_xpos[self._grip], axis_angle(quaternion), world.looked.qpos[self._fingers]]
        )

    def objects(self, world: World) -> np.ndarray:
        """float64: position and quaternion (xyzw) of every object and fixture, positions of the fixtures' joints."""
        self._look(world)
        poses = np.hstack([self._view.xpos[self._bodies], np.roll(self._view.xquat[self._bodies], -1, 1)])
        return np.concatenate([poses.ravel(), world.looked.qpos[self._joints]])

    @property
    def object_names(self) -> tuple[list[str], list[str]]:
        """Of `objects`: the names of the bodies and of the joints."""
        return list(self.env.obj_body_id), [self.model.joint(i).name for i in self._joint_ids]

    def images(self, world: World) -> dict[str, np.ndarray]:
        """{camera: uint8 [size,size,3]}."""
        if self._renderer is None:
            raise RuntimeError("a scene without cameras")
        self._look(world)
        self._mujoco.mj_comPos(self.model, self._view)
        self._mujoco.mj_camlight(self.model, self._view)
        self.model.site_rgba[:] = world.seen_rgba
        images = self._renderer.render(self._view)
        self.model.site_rgba[:] = world.dressing.site_rgba
        return images

    def _build(self, problems: dict[str, Any]) -> Any:
        """robosuite's environment, loaded but not reset: no cameras, no sensors, none of LIBERO's wrappers."""
        import libero.libero.envs.bddl_utils as bddl
        from robosuite.controllers import load_controller_config

        path = str(self.task.bddl)
        kind = problems[bddl.get_problem_info(path)["problem_name"]]
        env = kind.__new__(kind)

        def initialize(xml_string: str | None = None) -> None:
            kind._initialize_sim(env, xml_string)
            self._bare = Dressing.of(env.sim.model._model)

        shadowed = {"_initialize_sim": initialize, "_reset_internal": lambda: None, "_setup_observables": dict}
        vars(env).update(shadowed)
        try:
            env.__init__(
                path,
                robots=["Panda"],
                controller_configs=load_controller_config(default_controller="OSC_POSE"),
                initialization_noise=None,
                use_camera_obs=False,
                has_offscreen_renderer=False,
                camera_names=list(CAMERAS),
            )
        except (FileNotFoundError, ValueError) as error:
            raise UserError(
                f"LIBERO task '{self.task.name}' cannot be built from the assets in {assets.folder()}: {error}"
            ) from error
        for name in shadowed:
            del vars(env)[name]
        return env

    def _sensors(self) -> None:
        robot, model = self.env.robots[0], self.model
        free = self._mujoco.mjtJoint.mjJNT_FREE
        mine = {*robot._ref_joint_indexes, *(model.joint(name).id for name in robot.gripper_joints)}
        self._joint_ids = [i for i in range(model.njnt) if i not in mine and model.jnt_type[i] != free]
        self._joints = model.jnt_qposadr[self._joint_ids]
        self._bodies = list(self.env.obj_body_id.values())
        self._fingers = list(robot._ref_gripper_joint_pos_indexes)
        self._grip = robot.eef_site_id
        self._hand = model.body(robot.robot_model.eef_name).id

    def _lend(self, world: World) -> None:
        if self._owner is not world:
            world.dressing.put_on(self.model)
            self.env.sim.data._data = world.data
            self._owner = world

    def _place(self, world: World, seed: int) -> None:
        """LIBERO's reset into `world`: robot at home, objects and fixtures where it draws them."""
        from robosuite.utils.errors import RandomizationError

        env = self.env
        world.dressing = self._bare
        self._owner = None
        np.random.seed(seed)  # noqa: NPY002 - the generator that robosuite and LIBERO draw from
        random.seed(seed)
        for attempt in range(1000):
            self._owner = None
            self._lend(world)
            self._mujoco.mj_resetData(self.model, world.data)
            # Every time LIBERO loads its model it lists these once more, and draws as often: once when its environment
            # is made, once for every attempt to reset it.
            env.object_property_initializers = self._initializers * (2 + attempt)
            try:
                env._reset_internal()
                break
            except RandomizationError:
                continue
        else:
            raise RuntimeError(f"LIBERO finds no placement for '{self.task.name}' from seed {seed}")
        env.sim.forward()
        env.visualize(dict.fromkeys(env._visualizations, False))
        world.dressing = Dressing.of(self.model)
        world.memory = Controller.memory(env.robots[0])
        world.steps, world.forced = 0, 1
        self._see(world)

    def _put(self, world: World, recorded: np.ndarray) -> None:
        """The recorded (time, qpos, qvel) into a world just placed; the controller is not told, as in LIBERO."""
        data = world.data
        data.time = recorded[0]
        data.qpos[:], data.qvel[:] = np.split(recorded[1:], [self.model.nq])
        self.env.sim.forward()
        self.env._check_success()
        self.env._post_process()
        world.dressing.site_rgba = self.model.site_rgba.copy()
        world.forced = 2
        self._see(world)

    def _see(self, world: World) -> None:
        data = world.data
        world.looked = Looked(data.qpos.copy(), data.qpos.copy())
        world.seen_rgba = world.dressing.site_rgba

    def _advance(self, world: World, action: np.ndarray) -> None:
        look = _looks(world.forced, world.steps // 1000)[world.steps % 1000]
        looked = self.controller.step(world.memory, world.data, action, look)
        if looked:
            world.looked, world.seen_rgba = looked, world.dressing.site_rgba
        world.steps += 1
        if self.env.tracking_object_states_change:
            self.env._post_process()
            world.dressing.site_rgba = self.model.site_rgba.copy()

    def _look(self, world: World) -> None:
        """Bodies in space as the sensors last saw them, into `_view`."""
        self._lend(world)
        self._view.qpos[:] = world.looked.before
        self._mujoco.mj_kinematics(self.model, self._view)

    def _keep(self, world: World) -> Start:
        mujoco = self._mujoco
        state = np.zeros(mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(self.model, world.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        return Start(state, _copy(world, None))

    def _restore(self, world: World, start: Start) -> None:
        mujoco = self._mujoco
        mujoco.mj_resetData(self.model, world.data)
        mujoco.mj_setState(self.model, world.data, start.state, mujoco.mjtState.mjSTATE_INTEGRATION)
        vars(world).update(vars(_copy(start.world, world.data)))
        self._owner = None


def _copy(world: World, data: Any) -> World:
    dressing = Dressing(**vars(world.dressing))
    return World(data, dressing, world.memory.copy(), world.looked, world.seen_rgba, world.forced, world.steps)


@functools.cache
def _looks(forced: int, thousand: int) -> list[int | None]:
    return looks(1000 * (thousand + 1), forced)[1000 * thousand :]


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """float64 [3], axis times angle in [0, 2 pi), of a quaternion xyzw [4], with robosuite's formula."""
    w = min(1.0, max(-1.0, float(quaternion[3])))
    sine = math.sqrt(1.0 - w * w)
    if sine == 0.0:
        return np.zeros(3)
    return (quaternion[:3] * 2.0 * math.acos(w)) / sine

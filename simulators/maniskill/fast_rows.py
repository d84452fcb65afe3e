"""N CPU scenes in one ManiSkill environment.

ManiSkill's tasks are written for batches, but it batches only on the GPU: on the CPU it runs one scene. Here an
environment with `num_envs=N` gets N separate PhysX CPU scenes, and whatever reads or writes them goes over N objects
where ManiSkill's CPU code knows only the first. Poses, rewards, success and controllers are then computed once for all
N rows, which divides the cost of Python and torch by N; the physics of a row is called exactly as if it were alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from embodied_rl.simulators.maniskill.fast_scene import active, moving
from embodied_rl.simulators.maniskill.patch import Patch


class Systems:
    """N PhysX systems in the place of one; `step` advances the rows in `active`."""

    def __init__(self, systems: list[Any]) -> None:
        self.systems = systems
        self.active = list(range(len(systems)))

    def step(self) -> None:
        for row in self.active:
            self.systems[row].step()

    @property
    def timestep(self) -> float:
        return self.systems[0].timestep

    @timestep.setter
    def timestep(self, seconds: float) -> None:
        for system in self.systems:
            system.timestep = seconds


@contextlib.contextmanager
def allowed(num_envs: int) -> Iterator[None]:
    """Inside, an environment with several rows may be made on the CPU, all of them built from the one seed that a
    single environment is built from."""
    from mani_skill.envs import sapien_env

    base, backends = sapien_env.BaseEnv, sapien_env.CPU_SIM_BACKENDS
    reset = base.reset

    def reset_alike(self: Any, seed: Any = None, options: Any = None) -> Any:
        return reset(self, seed=[seed[0]] * num_envs, options=options)

    sapien_env.CPU_SIM_BACKENDS, base.reset = set(), reset_alike
    try:
        yield
    finally:
        sapien_env.CPU_SIM_BACKENDS, base.reset = backends, reset


def patches() -> list[Patch]:
    """The construction of the scenes, and every reader and writer of the first object alone."""
    from mani_skill.utils.structs.articulation import Articulation
    from mani_skill.utils.structs.base import PhysxRigidBodyComponentStruct, PhysxRigidDynamicComponentStruct

    rigid = [
        _vector(owner, name, "_bodies", name)
        for owner in (PhysxRigidBodyComponentStruct, PhysxRigidDynamicComponentStruct)
        for name in ("linear_velocity", "angular_velocity")
    ]
    joints = [_vector(Articulation, name, "_objs", name) for name in ("qpos", "qvel", "qf", "qacc")]
    root = [
        _vector(Articulation, f"root_{name}", None, f"root_{name}") for name in ("linear_velocity", "angular_velocity")
    ]
    return [_scenes(), *rigid, *joints, *root, _drive_velocities(), *_first_only()]


def _scenes() -> Patch:
    import sapien
    import sapien.physx
    from mani_skill.envs import sapien_env

    base = sapien_env.BaseEnv
    original = base._setup_scene

    def setup_scene(self: Any) -> None:
        if self.num_envs == 1 or self._sim_device.is_cuda():
            original(self)
            return
        self._set_scene_config()
        systems = [sapien.physx.PhysxCpuSystem() for _ in range(self.num_envs)]
        self.scene = sapien_env.ManiSkillScene(
            [sapien.Scene([system]) for system in systems],
            sim_config=self.sim_config,
            device=self.device,
            backend=self.backend,
        )
        self.scene.px = cast("Any", Systems(systems))
        self.scene.px.timestep = 1.0 / self._sim_freq

    return Patch(base, "_setup_scene", setup_scene)


def _vector(owner: type, name: str, objects: str | None, attribute: str) -> Patch:
    """The property `name` [N,D] of `owner`, kept by `attribute` [D] of each of its `objects`. Without `objects` only
    the setter is replaced, which writes `set_<attribute>` of the articulations."""
    import torch
    from mani_skill.utils import common

    original = vars(owner)[name]

    def get(self: Any) -> Any:
        if self.scene.gpu_sim_enabled or self.scene.num_envs == 1 or objects is None:
            return original.fget(self)
        return torch.from_numpy(np.array([getattr(each, attribute) for each in getattr(self, objects)]))

    def put(self: Any, value: Any) -> None:
        if self.scene.gpu_sim_enabled or self.scene.num_envs == 1:
            original.fset(self, value)
            return
        value = common.to_numpy(value)
        for row, i in enumerate(moving(self)):
            mine = value if value.ndim == 1 else value[0 if len(value) == 1 else row]
            if objects is None:
                getattr(self._objs[i], f"set_{attribute}")(mine)
            else:
                setattr(getattr(self, objects)[i], attribute, mine)

    return Patch(owner, name, property(get, put if original.fset else None))


def _drive_velocities() -> Patch:
    from mani_skill.utils.structs.articulation import Articulation

    original = Articulation.set_joint_drive_velocity_targets

    def set_targets(self: Any, targets: Any, joints: Any = None, joint_indices: Any = None) -> None:
        if self.scene.gpu_sim_enabled or self.scene.num_envs == 1:
            original(self, targets, joints, joint_indices)
            return
        values = targets.numpy()
        for row in active(self.scene):
            for i, joint in enumerate(joints):
                joint._objs[row].drive_velocity_target = values[row, i : i + 1]

    return Patch(Articulation, "set_joint_drive_velocity_targets", set_targets)


def _first_only() -> list[Patch]:
    """What reads the first object alone and is too rare to be rewritten refuses to run with several."""
    from mani_skill.utils.structs.articulation import Articulation
    from mani_skill.utils.structs.articulation_joint import ArticulationJoint
    from mani_skill.utils.structs.base import PhysxRigidBodyComponentStruct

    def refusing(owner: type, name: str) -> Patch:
        original: Any = vars(owner)[name]
        read, write = getattr(original, "fget", None), getattr(original, "fset", None)

        def check(self: Any) -> None:
            if not self.scene.gpu_sim_enabled and self.scene.num_envs > 1:
                raise NotImplementedError(f"{owner.__name__}.{name} of several CPU scenes")

        if read is not None:

            def get(self: Any) -> Any:
                check(self)
                return read(self)

            def put(self: Any, value: Any) -> None:
                check(self)
                cast("Any", write)(self, value)

            return Patch(owner, name, property(get, put if write else None))

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            check(self)
            return original(self, *args, **kwargs)

        return Patch(owner, name, call)

    joint = [refusing(ArticulationJoint, name) for name in ("qpos", "qvel", "drive_target", "drive_velocity_target")]
    articulation = [
        refusing(Articulation, name)
        for name in ("get_net_contact_impulses", "get_link_incoming_joint_forces", "compute_passive_force", "set_state")
    ]
    return [*joint, *articulation, refusing(PhysxRigidBodyComponentStruct, "get_net_contact_impulses")]

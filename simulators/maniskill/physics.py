"""Variants of a task's physics, e.g. one that plays the real robot of a policy trained in another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from embodied_rl.errors import UserError


@dataclass(frozen=True)
class Physics:
    """How a task's physics differ from its authors': factors, 1 = as they are."""

    friction: float = 1.0
    """Of every surface, static and sliding."""
    mass: float = 1.0
    """Of everything that moves and is not the robot."""
    stiffness: float = 1.0
    """Of the robot's joint drives, the gripper's too; their damping stays, so a softer robot is also a slower one."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if (factor := getattr(self, field.name)) <= 0:
                raise UserError(f"ManiSkill physics: {field.name} is a factor above 0, not {factor}")


def vary(env: Any, factors: Mapping[str, float]) -> None:
    """Change the CPU scenes of ManiSkill's `env`, now and whenever it builds them anew, by the fields of `Physics`."""
    physics = Physics(**factors)
    if physics == Physics():
        return
    rebuilt = env._after_reconfigure

    def after_reconfigure(options: Any) -> None:
        rebuilt(options)
        _scale(env, physics)

    env._after_reconfigure = after_reconfigure
    _scale(env, physics)


def _scale(env: Any, physics: Physics) -> None:
    from sapien.physx import PhysxMaterial

    robot = env.agent.robot
    own = [body for link in robot.links for body in link._objs]
    for scene in env.scene.sub_scenes:
        system = scene.physx_system
        moving = [*system.rigid_dynamic_components, *system.articulation_link_components]
        for body in [*moving, *system.rigid_static_components]:
            for shape in body.collision_shapes:
                old = shape.physical_material  # bodies share materials: each shape gets its own
                static, sliding = physics.friction * old.static_friction, physics.friction * old.dynamic_friction
                shape.physical_material = PhysxMaterial(static, sliding, old.restitution)
        for body in moving:
            if body not in own and not getattr(body, "kinematic", False):
                inertia = physics.mass * body.inertia
                body.mass = physics.mass * body.mass
                body.inertia = inertia
    for joint in robot.active_joints:
        for each in joint._objs:
            stiffness = physics.stiffness * each.stiffness
            each.set_drive_properties(stiffness, each.damping, each.force_limit, each.drive_mode)

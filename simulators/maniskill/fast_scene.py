"""Reading bodies, joints and contacts of one CPU scene; see `fast.py`."""

from __future__ import annotations

from typing import Any

import numpy as np

from embodied_rl.simulators.maniskill.fast_math import array, from_sapien, plain, pose, to_sapien
from embodied_rl.simulators.maniskill.patch import Patch, same


def patches() -> list[Patch]:
    """Pose getters and setters, drive targets, contact impulses and the angle between vectors."""
    return [*_poses(), _drive_targets(), _impulses(), _grasping(), *_vectors()]


def moving(struct: Any) -> list[int]:
    """Which of a struct's objects a setter means: those of the environments being reset, as in ManiSkill's GPU code."""
    scene = struct.scene
    if scene.num_envs == 1:
        return list(range(len(struct._objs)))
    mask = scene._reset_mask.tolist()
    return [i for i, environment in enumerate(struct._scene_idxs.tolist()) if mask[environment]]


def _poses() -> list[Patch]:
    import sapien
    from mani_skill.utils.structs.actor import Actor
    from mani_skill.utils.structs.link import Link
    from mani_skill.utils.structs.pose import Pose

    def patched(owner: type, attribute: str) -> Patch:
        original = vars(owner)["pose"]

        def get(self: Any) -> Any:
            if self.scene.gpu_sim_enabled:
                return original.fget(self)
            if len(self._objs) == 1:
                return pose(from_sapien(getattr(self._objs[0], attribute)))
            return pose(from_sapien(*[getattr(body, attribute) for body in self._objs]))

        def put(self: Any, value: Any) -> None:
            if self.scene.gpu_sim_enabled:
                original.fset(self, value)
                return
            if not isinstance(value, (sapien.Pose, Pose)):
                value = Pose.create(value)
            bodies = [self._objs[i] for i in moving(self)]
            raw = array(value) if isinstance(value, Pose) else None
            if raw is None or len(raw) == 1:
                single = value if isinstance(value, sapien.Pose) else value.sp
                for body in bodies:
                    body.pose = single
                return
            for body, row in zip(bodies, raw, strict=True):
                body.pose = to_sapien(row)

        return Patch(owner, "pose", property(get, put))

    return [patched(Actor, "pose"), patched(Link, "entity_pose")]


def _drive_targets() -> Patch:
    from mani_skill.utils.structs.articulation import Articulation

    original = Articulation.set_joint_drive_targets

    def set_joint_drive_targets(self: Any, targets: Any, joints: Any = None, joint_indices: Any = None) -> None:
        if self.scene.gpu_sim_enabled or not plain(targets):
            original(self, targets, joints, joint_indices)
            return
        values = targets.numpy()
        for row in active(self.scene):
            for i, joint in enumerate(joints):
                joint._objs[row].drive_target = values[row, i : i + 1]

    return Patch(Articulation, "set_joint_drive_targets", set_joint_drive_targets)


def active(scene: Any) -> list[int]:
    """The environments of a CPU scene that are being stepped."""
    return getattr(scene.px, "active", [0])


def _impulses() -> Patch:
    import torch
    from mani_skill.envs.scene import ManiSkillScene

    original = ManiSkillScene.get_pairwise_contact_impulses

    def between(system: Any, entity1: Any, entity2: Any) -> np.ndarray:
        total = np.zeros(3)
        for contact in system.get_contacts():
            body0, body1 = contact.bodies
            first, second = body0.entity, body1.entity
            if first == entity1 and second == entity2:
                sign = 1
            elif first == entity2 and second == entity1:
                sign = -1
            else:
                continue
            total += np.sum([point.impulse for point in contact.points], axis=0) * sign
        return total

    def get_pairwise_contact_impulses(self: Any, obj1: Any, obj2: Any) -> Any:
        if self.gpu_sim_enabled:
            return original(self, obj1, obj2)
        systems = getattr(self.px, "systems", [self.px])
        rows = zip(systems, obj1._bodies, obj2._bodies, strict=True)
        impulses = [between(system, body1.entity, body2.entity) for system, body1, body2 in rows]
        return torch.from_numpy(np.array(impulses).astype(np.float32))

    return Patch(ManiSkillScene, "get_pairwise_contact_impulses", get_pairwise_contact_impulses)


def _grasping() -> Patch:
    import torch
    from mani_skill.agents.robots.panda.panda import Panda

    original = Panda.is_grasping

    def is_grasping(self: Any, object: Any, min_force: float = 0.5, max_angle: Any = 85) -> Any:
        """Most of the time no finger touches the object; the angles of zero forces need not be computed."""
        if min_force > 0 and not self.scene.gpu_sim_enabled:
            for finger in (self.finger1_link, self.finger2_link):
                impulse = self.scene.get_pairwise_contact_impulses(finger, object).numpy()
                if not impulse.any():
                    return torch.zeros(len(impulse), dtype=torch.bool)
        return original(self, object, min_force, max_angle)

    return Patch(Panda, "is_grasping", is_grasping)


def _vectors() -> list[Patch]:
    import torch
    from mani_skill.utils import common

    normalize_original, angle_original = common.normalize_vector, common.compute_angle_between

    def unit(x: Any, eps: float) -> np.ndarray:
        norm = torch.linalg.norm(x, axis=1).numpy()
        norm[norm < eps] = 1
        return x.numpy() * (np.float32(1) / norm)[:, None]

    def normalize_vector(x: Any, eps: float = 1e-6) -> Any:
        return torch.from_numpy(unit(x, eps)) if plain(x) else normalize_original(x, eps)

    def compute_angle_between(x1: Any, x2: Any) -> Any:
        if not (plain(x1) and plain(x2)):
            return angle_original(x1, x2)
        a, b = torch.from_numpy(unit(x1, 1e-6)), torch.from_numpy(unit(x2, 1e-6))
        dot = torch.bmm(a[:, None, :], b[:, :, None]).reshape(len(a))  # what einsum("ij,ij->i") comes down to
        return torch.arccos(torch.clip(dot, -1, 1))

    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    x[7] = 0

    def check_normalize() -> bool:
        rows = [x[i : i + 1] for i in range(100)]
        return all(same(normalize_vector(row), normalize_original(row)) for row in [x, *rows])

    def check_angle() -> bool:
        pairs = [(x[i : i + 1], x[99 - i : 100 - i]) for i in range(100)]
        return all(same(compute_angle_between(a, b), angle_original(a, b)) for a, b in [(x, x.flip(0)), *pairs])

    return [
        Patch(common, "normalize_vector", normalize_vector, check_normalize),
        Patch(common, "compute_angle_between", compute_angle_between, check_angle),
    ]

"""Controllers of one robot on the CPU: what happens between an action and the joints' drive targets; see `fast.py`."""

from __future__ import annotations

from typing import Any

import numpy as np

from embodied_rl.simulators.maniskill.fast_math import array, plain, to_sapien
from embodied_rl.simulators.maniskill.fast_scene import active
from embodied_rl.simulators.maniskill.patch import Patch


def patches() -> list[Patch]:
    """Joint readings, the scaling of actions, the mimic gripper, and inverse kinematics."""
    return [*_base(), _mimic(), _end_effector(), _inverse_kinematics()]


def _cached(owner: Any, name: str, source: Any, compute: Any) -> Any:
    """`compute(source)`, remembered on `owner` for as long as `source` is the same object."""
    entry = owner.__dict__.get(name)
    if entry is None or entry[0] is not source:
        entry = owner.__dict__[name] = (source, compute(source))
    return entry[1]


def _indices(tensor: Any) -> np.ndarray:
    return tensor.numpy().astype(np.intp)


def _base() -> list[Patch]:
    import torch
    from mani_skill.agents.controllers.base_controller import BaseController

    original = {name: vars(BaseController)[name] for name in ("qpos", "qvel", "_clip_and_scale_action")}

    def reading(name: str) -> Patch:
        def get(self: Any) -> Any:
            articulation = self.articulation
            index = self.active_joint_indices
            if articulation.scene.gpu_sim_enabled or isinstance(index, list):
                return original[name].fget(self)
            index = _cached(self, "_fast_index", index, _indices)
            return torch.from_numpy(np.array([getattr(each, name)[index] for each in articulation._objs]))

        return Patch(BaseController, name, property(get))

    def clip_and_scale(self: Any, action: Any) -> Any:
        low, high = self.action_space_low, self.action_space_high
        if not (plain(action) and plain(low)):
            return original["_clip_and_scale_action"](self, action)
        half = np.float32(0.5)
        bounds = (low.numpy(), high.numpy())
        middle, radius = _cached(
            self, "_fast_scale", low, lambda _: (half * (bounds[1] + bounds[0]), half * (bounds[1] - bounds[0]))
        )
        clipped = np.minimum(np.maximum(action.numpy(), np.float32(-1)), np.float32(1))
        return torch.from_numpy(middle + radius * clipped)

    return [reading("qpos"), reading("qvel"), Patch(BaseController, "_clip_and_scale_action", clip_and_scale)]


def _mimic() -> Patch:
    from mani_skill.agents.controllers.pd_joint_pos import PDJointPosMimicController

    original = PDJointPosMimicController.set_action

    def set_action(self: Any, action: Any) -> None:
        config = self.config
        if self.scene.gpu_sim_enabled or config.use_delta or config.interpolate or not plain(self._target_qpos):
            original(self, action)
            return
        action = self._preprocess_action(action)
        self._step = 0
        self._start_qpos = self.qpos
        target = self._target_qpos.numpy()  # the tensor's own memory
        control = _cached(self, "_fast_control", self.control_joint_indices, _indices)
        source = _cached(self, "_fast_source", self.mimic_control_joint_indices, _indices)
        mimic = _cached(self, "_fast_mimic", self.mimic_joint_indices, _indices)
        target[:, control] = action.numpy()
        target[:, mimic] = target[:, source] * self._multiplier.numpy()[None, :] + self._offset.numpy()[None, :]
        self.set_drive_targets(self._target_qpos)

    return Patch(PDJointPosMimicController, "set_action", set_action)


def _end_effector() -> Patch:
    from mani_skill.agents.controllers.pd_ee_pose import PDEEPosController

    original = PDEEPosController.set_action

    def set_action(self: Any, action: Any) -> None:
        if self.scene.gpu_sim_enabled:
            original(self, action)
            return
        action = self._preprocess_action(action)
        self._step = 0
        self._start_qpos = self.qpos
        previous = self._target_pose if self.config.use_target else self.ee_pose_at_base
        self._target_pose = self.compute_target_pose(previous, action)
        # On the CPU the solver starts from q0 and has no use for the current pose, which is dear.
        self._target_qpos = self.kinematics.compute_ik(
            pose=self._target_pose, q0=self.articulation.get_qpos(), solver_config=self.config.delta_solver_config
        )
        if self._target_qpos is None:
            self._target_qpos = self._start_qpos
        if self.config.interpolate:
            self._step_size = (self._target_qpos - self._start_qpos) / self._sim_steps
        else:
            self.set_drive_targets(self._target_qpos)

    return Patch(PDEEPosController, "set_action", set_action)


def _inverse_kinematics() -> Patch:
    import torch
    from mani_skill.agents.controllers.utils.kinematics import Kinematics
    from mani_skill.utils.structs.pose import Pose

    original = Kinematics.compute_ik

    def compute_ik(self: Any, pose: Any, q0: Any, *args: Any, **kwargs: Any) -> Any:
        targets = array(pose) if isinstance(pose, Pose) and not self.use_gpu_ik else None
        if targets is None:
            return original(self, pose, q0, *args, **kwargs)
        joints = _cached(self, "_fast_joints", self.pmodel_active_joint_indices, _indices)
        controlled = _cached(self, "_fast_controlled", self.pmodel_controlled_joint_indices, _indices)
        mask = _cached(self, "_fast_mask", self.qmask, lambda mask: mask.numpy())
        start = q0.numpy()
        own = _cached(self, "_fast_own", self.active_joint_indices, _indices)
        out = start[:, own]
        for row in active(self.articulation.scene):
            result, success, _ = self.pmodel.compute_inverse_kinematics(
                self.end_link_idx,
                to_sapien(targets[row]),
                initial_qpos=start[row, joints],
                active_qmask=mask,
                max_iterations=100,
            )
            if success:
                out[row] = result[controlled]
            elif len(out) == 1:
                return None
        return torch.from_numpy(out)

    return Patch(Kinematics, "compute_ik", compute_ik)

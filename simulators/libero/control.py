"""robosuite's operational-space controller for LIBERO's Panda, without its layers.

Every number comes from the same operations on the same operands in the same memory layout as in robosuite 1.4, so the
torques are the same bits (`tests/simulators/test_libero_exact.py`); what is left out is work whose result nobody reads:
robosuite computes the forward dynamics twice more per 2 ms of physics than `mj_step` does anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from embodied_rl.simulators.libero import installed

SUBSTEPS = 25
"""Physics steps of 2 ms in a control step (20 Hz)."""


class Measured(NamedTuple):
    """The arm as the controller sees it: position, orientation and velocities of the gripper site, joints, the site's
    Jacobians and the arm's mass matrix."""

    position: np.ndarray
    orientation: np.ndarray
    velocity: np.ndarray
    angular_velocity: np.ndarray
    joints: np.ndarray
    joint_velocity: np.ndarray
    jacobian_position: np.ndarray
    jacobian_orientation: np.ndarray
    jacobian: np.ndarray
    mass: np.ndarray


@dataclass
class Memory:
    """What the controller remembers between steps."""

    goal_position: np.ndarray
    goal_orientation: np.ndarray
    gripper: np.ndarray
    """Where the fingers are driven, in [-1, 1]; moves by 0.01 per physics step."""
    measured: Measured | None
    """robosuite's controller looks at the arm when it is made and uses that for the first physics step, even when the
    arm has been put elsewhere since. None afterwards."""

    def copy(self) -> Memory:
        return Memory(self.goal_position, self.goal_orientation, self.gripper, self.measured)


class Looked(NamedTuple):
    """What robosuite's sensors see after a physics step: joints have moved on to `qpos`, but where bodies are in space
    still belongs to the positions `before` (both [nq])."""

    before: np.ndarray
    qpos: np.ndarray


class Controller:
    """The constants of one scene, read off robosuite's robot, and one step with them."""

    def __init__(self, model: Any, robot: Any) -> None:
        """`model` is the `mujoco.MjModel`, `robot` robosuite's `SingleArm` after a reset."""
        from robosuite.utils import control_utils

        controller = robot.controller
        self._mujoco, self._model, self._utils = installed.mujoco(), model, control_utils
        self._site = model.site(controller.eef_name).id
        self._joints, self._velocities = np.array(controller.qpos_index), np.array(controller.qvel_index)
        self._initial_joints = np.array(controller.initial_joint)
        self._stiffness, self._damping = np.split(controller.kp, 2), np.split(controller.kd, 2)
        controller.scale_action(np.zeros(6))  # fills in the next three
        self._scale = controller.action_scale, controller.action_input_transform, controller.action_output_transform
        self._bounds = controller.input_min, controller.input_max
        self._motors = np.array(robot._ref_joint_actuator_indexes)
        self._torque_limits = tuple(np.array(limit) for limit in robot.torque_limits)
        self._fingers = np.array(robot._ref_joint_gripper_actuator_indexes)
        limits = model.actuator_ctrlrange[self._fingers]
        self._finger_centre = 0.5 * (limits[:, 1] + limits[:, 0])
        self._finger_range = 0.5 * (limits[:, 1] - limits[:, 0])
        self._jacobians = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        self._mass = np.zeros((model.nv, model.nv))

    @staticmethod
    def memory(robot: Any) -> Memory:
        """What robosuite's controller remembers right after its reset."""
        c = robot.controller
        measured = Measured(
            c.ee_pos, c.ee_ori_mat, c.ee_pos_vel, c.ee_ori_vel, c.joint_pos, c.joint_vel,
            c.J_pos, c.J_ori, c.J_full, c.mass_matrix,
        )  # fmt: skip
        return Memory(np.array(c.goal_pos), np.array(c.goal_ori), np.zeros(2), measured)

    def measure(self, data: Any) -> Measured:
        """The arm in `data`, whose positions and velocities must be up to date."""
        model, site, velocities = self._model, self._site, self._velocities
        linear, angular = self._jacobians
        self._mujoco.mj_jacSite(model, data, linear, angular, site)
        qvel = data.qvel
        # Indexing gives columns in Fortran order, which decides how the products with them are summed.
        position, orientation = linear[:, velocities], angular[:, velocities]
        self._mujoco.mj_fullM(model, self._mass, data.qM)
        return Measured(
            data.site_xpos[site].copy(),
            data.site_xmat[site].reshape(3, 3).copy(),
            np.dot(linear, qvel),
            np.dot(angular, qvel),
            data.qpos[self._joints],
            qvel[velocities],
            position,
            orientation,
            np.concatenate((position, orientation)),
            self._mass[velocities][:, velocities],
        )

    def set_goal(self, memory: Memory, measured: Measured, action: np.ndarray) -> None:
        """A new goal: `action` [6] from where the gripper is; without rotation the old orientation stays the goal."""
        scale, centre, offset = self._scale
        delta = (np.clip(action, *self._bounds) - centre) * scale + offset
        if not all(math.isclose(angle, 0.0) for angle in delta[3:]):
            memory.goal_orientation = self._utils.set_goal_orientation(delta[3:], measured.orientation)
        memory.goal_position = measured.position + delta[:3]

    def torques(self, memory: Memory, measured: Measured, bias: np.ndarray) -> np.ndarray:
        """float64 [7], N m. `bias` [nv] is MuJoCo's `qfrc_bias`. Khatib 1987, position and orientation decoupled, with
        the joints drawn to their initial position in the null space."""
        (kp, kp_turn), (kd, kd_turn) = self._stiffness, self._damping
        turn = self._utils.orientation_error(memory.goal_orientation, measured.orientation)
        force = (memory.goal_position - measured.position) * kp + -measured.velocity * kd
        torque = turn * kp_turn + -measured.angular_velocity * kd_turn
        _, inertia_position, inertia_orientation, null_space = self._utils.opspace_matrices(
            measured.mass, measured.jacobian, measured.jacobian_position, measured.jacobian_orientation
        )
        wrench = np.concatenate([np.dot(inertia_position, force), np.dot(inertia_orientation, torque)])
        torques = np.dot(measured.jacobian.T, wrench) + bias[self._velocities]
        torques += self._utils.nullspace_torques(
            measured.mass, null_space, self._initial_joints, measured.joints, measured.joint_velocity
        )
        return torques

    def step(self, memory: Memory, data: Any, action: np.ndarray, look: int | None) -> Looked | None:
        """One control step of `action` float [7]; returns what the sensors of physics step `look` see, if any."""
        mujoco, model = self._mujoco, self._model
        ctrl = data.ctrl
        fingers = np.array([-1.0, 1.0]) * 0.01 * np.sign(action[6:])
        looked = None
        for substep in range(SUBSTEPS):
            mujoco.mj_step1(model, data)
            measured = memory.measured or self.measure(data)
            memory.measured = None
            if not substep:
                self.set_goal(memory, measured, action[:6])
            torques = self.torques(memory, measured, data.qfrc_bias)
            memory.gripper = (memory.gripper + fingers).clip(-1.0, 1.0)
            ctrl[self._motors] = torques.clip(*self._torque_limits)
            ctrl[self._fingers] = self._finger_centre + self._finger_range * memory.gripper
            before = data.qpos.copy() if substep == look else None
            mujoco.mj_step2(model, data)
            if before is not None:
                looked = Looked(before, data.qpos.copy())
        return looked


def looks(steps: int, forced: int) -> list[int | None]:
    """In which physics step of each of the next `steps` control steps robosuite samples its sensors, whose observations
    it returns at the end of the step; `forced` samples were taken since the reset. By robosuite's own clock, a float
    that adds up 2 ms and starts again at 50."""
    clock, period, sampled = 0.0, 1.0 / 20, True
    for _ in range(forced):
        clock += 0.002
    found: list[int | None] = []
    for _ in range(steps):
        found.append(None)
        for substep in range(SUBSTEPS):
            clock += 0.002
            if not sampled and period >= clock:
                found[-1], sampled = substep, True
            if clock >= period:
                if not sampled:
                    found[-1] = substep
                clock, sampled = clock % period, False
    return found

"""A scripted demonstrator for PickCube-v1 under the controller "pd_ee_delta_pos", from the privileged state."""

from __future__ import annotations

from typing import Final

import numpy as np

from embodied_rl.errors import UserError

# The state of PickCube-v1 with the panda, 42 numbers, positions in metres in the world frame, quaternions wxyz:
# 0:9 qpos (7 arm joints, 2 fingers), 9:18 qvel, 18 is_grasped, 19:26 tcp pose, 26:29 goal, 29:36 cube pose,
# 36:39 tcp to cube, 39:42 cube to goal.
STATE_SIZE: Final = 42
FINGER_GAP: Final = slice(7, 9)
GRASPED: Final = 18
TO_CUBE: Final = slice(36, 39)
TO_GOAL: Final = slice(39, 42)

ABOVE, DESCEND, CLOSE, CARRY = range(4)
"""Phases of an episode: over the cube with open fingers, down, close them, carry the cube to the goal."""

_HOVER = 0.06
"""Height over the cube's centre at which to line up, metres."""
_REACH = 0.1
"""Metres per control step at action 1."""


def pick_cube(state: np.ndarray, phase: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The actions float32 [N,4] (three of translation, one of the gripper, in [-1, 1]) and the phases [N] after them,
    of rows in `state` [N,42] and `phase` [N]."""
    to_cube, to_goal = state[:, TO_CUBE].astype(np.float64), state[:, TO_GOAL].astype(np.float64)
    aligned = np.linalg.norm(to_cube[:, :2], axis=1) < 0.01
    low = np.abs(to_cube[:, 2]) < 0.01
    grasped = state[:, GRASPED] > 0.5
    slipped = (phase == CARRY) & ~grasped
    phase = np.where(slipped, ABOVE, phase)
    phase = np.where((phase == ABOVE) & aligned, DESCEND, phase)
    phase = np.where((phase == DESCEND) & aligned & low, CLOSE, phase)
    phase = np.where((phase == CLOSE) & grasped, CARRY, phase)
    hover = to_cube + np.array([0.0, 0.0, _HOVER])
    wanted = np.stack([hover, to_cube, np.zeros_like(to_cube), to_goal])[phase, np.arange(len(phase))]
    closed = (phase == CLOSE) | (phase == CARRY)
    actions = np.concatenate([np.clip(wanted / _REACH, -1.0, 1.0), np.where(closed, -1.0, 1.0)[:, None]], axis=1)
    return actions.astype(np.float32), phase


class ScriptedPickCube:
    """Demonstrates PickCube-v1 in N rows; the caller adds noise. Interface of every demonstrator: `reset`, `actions`.

    Raises `UserError` when the task or controller is not the one it was written for.
    """

    def __init__(self, task: str = "PickCube-v1", control: str = "pd_ee_delta_pos", num_envs: int = 1) -> None:
        if (task, control) != ("PickCube-v1", "pd_ee_delta_pos"):
            raise UserError(
                f"the scripted demonstrator knows PickCube-v1 with pd_ee_delta_pos, not {task} with {control}"
            )
        self._phase = np.full(num_envs, ABOVE)

    def reset(self, rows: np.ndarray, tasks: np.ndarray) -> None:
        """Forget what the episodes of `rows` were doing; there is one task only."""
        self._phase[rows] = ABOVE

    def actions(self, state: np.ndarray) -> np.ndarray:
        """float32 [N,4] for the N rows' states [N,42]."""
        if state.shape != (len(self._phase), STATE_SIZE):
            raise UserError(
                f"the PickCube-v1 demonstrator needs states [{len(self._phase)},{STATE_SIZE}], got {list(state.shape)}"
            )
        actions, self._phase = pick_cube(state, self._phase)
        return actions

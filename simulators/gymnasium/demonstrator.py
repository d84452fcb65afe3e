"""A scripted expert for FetchReach."""

from __future__ import annotations

import numpy as np

STEP = 0.05
"""Metres that the hand moves in a step by a full action."""
SHARE = 0.5
"""Of the way to the goal that is asked for in a step: the hand lags behind, and overshoots when asked for all of it."""


class ScriptedFetchReach:
    """Moves the hand towards the goal in proportion to the distance, from states that begin with the hand's position
    and the goal (achieved_goal, desired_goal), three numbers each."""

    def reset(self, rows: np.ndarray, tasks: np.ndarray) -> None:
        """It remembers nothing."""

    def actions(self, state: np.ndarray) -> np.ndarray:
        """float32 [N,4] for states [N,S]: displacement, and a gripper that this task does not move."""
        actions = np.zeros((len(state), 4), np.float32)
        actions[:, :3] = np.clip(SHARE / STEP * (state[:, 3:6] - state[:, :3]), -1, 1)
        return actions

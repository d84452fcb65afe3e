"""MetaWorld's scripted experts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from embodied_rl.errors import UserError
from embodied_rl.simulators.metaworld.environment import STATE_SIZE


class ScriptedMetaWorld:
    """The expert of each row's task, from its state float32 [39]; actions are clipped to [-1, 1]."""

    def __init__(self, tasks: Sequence[str], num_envs: int = 1) -> None:
        from metaworld.policies import ENV_POLICY_MAP

        # They keep nothing between two calls: one of each task serves all rows.
        self._experts = [ENV_POLICY_MAP[name]() for name in tasks]
        self._task = np.zeros(num_envs, np.int64)

    def reset(self, rows: np.ndarray, tasks: np.ndarray) -> None:
        """`rows` begin episodes of `tasks`."""
        self._task[rows] = tasks

    def actions(self, state: np.ndarray) -> np.ndarray:
        """float32 [N,4] for the N rows' states [N,39]."""
        if state.shape != (len(self._task), STATE_SIZE):
            raise UserError(
                f"MetaWorld's experts need states [{len(self._task)},{STATE_SIZE}], got {list(state.shape)}"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Constant(s) may be too high", at every action that will be clipped
            actions = [
                self._experts[task].get_action(state[row].astype(np.float64)) for row, task in enumerate(self._task)
            ]
        return np.clip(actions, -1.0, 1.0).astype(np.float32)

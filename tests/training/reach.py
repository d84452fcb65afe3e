"""A point that must reach a target. Imports nothing heavy: workers start in no time."""

from __future__ import annotations

import numpy as np

from embodied_rl.simulators.base import Environment, InitialState
from embodied_rl.specs import ActionSpec, ObservationSpec, TaskSpec

SPEED = 0.2
LIMIT = 12


class Reach(Environment):
    """State: position and target in [-1, 1]^2. Success within 0.1; the reward is dense, in [0, 1]."""

    observation_spec = ObservationSpec(state=4)
    action_spec = ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0), hold=(0.0, 0.0), control="velocity")
    tasks = (TaskSpec("reach", "reach the target", LIMIT, True, "dense"),)

    def __init__(self, nan_at_seed_below: int = 0) -> None:
        self.nan_at_seed_below = nan_at_seed_below

    def reset(self, state: InitialState) -> None:
        self.position, self.target = np.random.default_rng(state.seed).uniform(-1, 1, (2, 2))
        self.broken = state.seed < self.nan_at_seed_below
        self.at = 0

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool | None]:
        self.position = np.clip(self.position + SPEED * np.clip(action, -1, 1), -1, 1)
        self.at += 1
        distance = float(np.linalg.norm(self.position - self.target))
        return 1 - np.tanh(distance), distance < 0.1, self.at >= LIMIT, distance < 0.1

    def observe(self) -> dict[str, np.ndarray]:
        state = np.concatenate([self.position, self.target]).astype(np.float32)
        if self.broken and self.at > 3:
            state[1] = np.nan
        return {"state": state}

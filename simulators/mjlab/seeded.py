"""An mjlab environment whose episodes are functions of their seeds."""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
from typing import Any

import numpy as np

from embodied_rl.simulators.tensor_randomness import resample_by_seed, seed_everything


def settings(name: str, num_envs: int, max_steps: int | None = None) -> Any:
    """mjlab's configuration of the task `name`, without what makes one row differ from another or from its past:

    - what is drawn once at start-up, for each row, is drawn at every reset (friction, masses, ...);
    - the curricula, which change the task with the number of steps taken so far, stay at their first stage;
    - noise on observations is off;
    - all rows stand at the origin: their worlds never touch, but offsets would round their numbers differently;
    - on generated terrain a reset draws the place, as mjlab does when it plays a policy.
    """
    os.environ["MUJOCO_GL"] = "disable"  # Warp traces the images; without this mjlab wants an OpenGL library
    import mjlab.tasks  # noqa: F401 - importing registers
    from mjlab.envs import mdp
    from mjlab.managers import EventTermCfg
    from mjlab.tasks.registry import load_env_cfg

    cfg = load_env_cfg(name)
    cfg.scene.num_envs = num_envs
    cfg.scene.env_spacing = 0.0
    cfg.seed = 0
    cfg.auto_reset = False
    cfg.curriculum = {}
    for event in cfg.events.values():
        if event.mode == "startup":
            event.mode = "reset"
    if cfg.scene.terrain is not None and cfg.scene.terrain.terrain_generator is not None:
        place = EventTermCfg(func=mdp.randomize_terrain, mode="reset")
        cfg.events = {"randomize_terrain": place, **cfg.events}  # first: other events start from there
    for group in cfg.observations.values():
        group.enable_corruption = False
        group.concatenate_terms = False  # for the names of the terms
    if max_steps is not None:
        # Half a step less: mjlab divides by the step's length and rounds up.
        cfg.episode_length_s = (max_steps - 0.5) * cfg.sim.mujoco.timestep * cfg.decimation
    return cfg


def make(cfg: Any, device: str) -> Any:
    """mjlab's environment with, besides, `seeds` (int64 [N]): those of the rows' episodes, set before a reset."""
    from mjlab.envs import ManagerBasedRlEnv

    class SeededEnv(ManagerBasedRlEnv):
        def __init__(self) -> None:
            self.seeds = np.zeros(cfg.scene.num_envs, np.int64)
            super().__init__(cfg, device)
            resample_by_seed(self, self.seeds)

        def step(self, action: Any) -> Any:
            if {"interval", "step"} & set(self.event_manager.available_modes):
                # What is drawn on the way (pushes) depends on all episodes that run now, not on past ones.
                seed_everything(*self.seeds.tolist(), *self.episode_length_buf.tolist())
            # Rows that ended are not reset before the chunk's border: until then they go on, holding still.
            self._manual_reset_pending.zero_()
            return super().step(action)

        def _reset_idx(self, env_ids: Any = None) -> None:
            for row in env_ids.split(1):
                seed_everything(int(self.seeds[int(row)]))
                super()._reset_idx(row)

    return SeededEnv()

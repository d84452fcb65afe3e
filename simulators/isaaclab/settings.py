"""Isaac Lab's configuration of a task, made fit for episodes that are functions of their seeds."""

# pyright: reportMissingImports=false, reportOptionalMemberAccess=false
from __future__ import annotations

import re
from typing import Any

from embodied_rl.errors import UserError, unknown


def load(task: str, num_envs: int, device: str, physics: str) -> Any:
    """Isaac Lab's configuration. Raises `UserError` for an unknown task or physics preset."""
    import gymnasium
    from isaaclab_tasks.utils import parse_env_cfg

    if task not in gymnasium.registry:
        raise unknown("Isaac Lab task", task, [name for name in gymnasium.registry if name.startswith("Isaac")])
    try:
        return parse_env_cfg(task, device=device, num_envs=num_envs, overrides=[f"physics={physics}"])
    except ValueError as error:
        raise UserError(f"Isaac Lab task '{task}' cannot run with physics '{physics}': {error}") from error


def adapt(cfg: Any, images: bool, image_size: int | None, max_steps: int | None) -> list[str]:
    """Change `cfg` in place; returns the names of the cameras that remain.

    Gone is what makes a row differ from another or from its past: noise on observations and actions, their delays,
    curricula (they change the task with the steps taken so far), randomised textures and lights, cool-downs between
    resets. With Newton, whose worlds never touch, all rows stand at the origin: offsets would round their numbers
    differently.
    """
    cfg.seed = 0  # of what is drawn once, at start-up
    cfg.num_rerenders_on_reset = 0
    newton = type(cfg.sim.physics).__name__.startswith("Newton")
    if newton:
        cfg.scene.replicate_physics = True
        cfg.scene.env_spacing = 0.0
    for name in ("action_noise_model", "observation_noise_model", "curriculum"):
        if getattr(cfg, name, None) is not None:
            setattr(cfg, name, None)
    for command in _terms(cfg, "commands").values():
        command.debug_vis = False
    for name, event in _terms(cfg, "events").items():
        event.min_step_count_between_reset = 0
        if "textures" in event.params:
            setattr(cfg.events, name, None)
    if max_steps is not None:
        # Half a step less: Isaac Lab divides by the step's length and rounds up.
        cfg.episode_length_s = (max_steps - 0.5) * cfg.sim.dt * cfg.decimation
    cameras = _cameras(cfg, newton, images, image_size)
    for group in _terms(cfg, "observations").values():
        group.enable_corruption = False
        group.concatenate_terms = False  # for the names of the terms
        for name, term in list(vars(group).items()):
            if not hasattr(term, "params"):
                continue
            term.delay_min_lag = term.delay_max_lag = 0
            if getattr(term.params.get("sensor_cfg"), "name", None) in cameras:
                setattr(group, name, None)  # images are taken when they are asked for
    return [name for name in cameras if images]


def _cameras(cfg: Any, newton: bool, images: bool, size: int | None) -> list[str]:
    """Names of all cameras of the scene. They are removed unless there are to be `images`."""
    from isaaclab.sensors import CameraCfg

    cameras = {name: each for name, each in vars(cfg.scene).items() if isinstance(each, CameraCfg)}
    for name, camera in cameras.items():
        if not images:
            setattr(cfg.scene, name, None)
            continue
        camera.data_types = ["rgb"]
        camera.height, camera.width = size or camera.height, size or camera.width
        camera.update_latest_camera_pose = True  # else Newton's renderer leaves a wrist camera where a reset put it
        if newton:
            from isaaclab_newton.renderers import NewtonWarpRendererCfg

            camera.renderer_cfg = NewtonWarpRendererCfg()
            # Optional parts of a path, e.g. "(Geometry/.*/)?panda_hand", which only Isaac Sim can spawn below.
            camera.prim_path = re.sub(r"\([^)]*\)\?", "", camera.prim_path)
    return list(cameras)


def _terms(cfg: Any, manager: str) -> dict[str, Any]:
    """{name: configuration of a term} of a manager; empty for tasks that are not manager-based."""
    manager_cfg = getattr(cfg, manager, None)
    terms = vars(manager_cfg).items() if manager_cfg is not None else ()
    return {name: term for name, term in terms if hasattr(term, "__dataclass_fields__")}

"""One Isaac Lab task, many environments stepped together; runs in Isaac Lab's own Python environment."""

# pyright: reportMissingImports=false, reportOptionalMemberAccess=false
from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from embodied_rl.errors import UserError
from embodied_rl.simulators import tensor_randomness as randomness
from embodied_rl.simulators.base import BatchedEnvironment, InitialState
from embodied_rl.simulators.isaaclab import histories, settings
from embodied_rl.simulators.isaaclab import tasks as known
from embodied_rl.simulators.tensor_groups import Layout, replaced
from embodied_rl.specs import ActionSpec, ObservationSpec, TaskSpec

CAMERA = "camera"
"""Our name of the group of images."""


class IsaacLabEnvironment(BatchedEnvironment):
    """`num_envs` environments of a manager-based or direct task on `device`; a process can have one.

    Isaac Lab resets rows that end within the very step that ends them. Here they stay where they ended until `reset`.
    A start depends on its seed alone; what follows does too, with `settings.adapt`, in tasks that draw nothing while
    stepping but commands. (What else a task draws then comes from generators that a reset of all rows seeds.)
    """

    def __init__(
        self,
        num_envs: int,
        task: str,
        observation: str = "state",
        state: tuple[str, ...] | None = None,
        reward: str = "task",
        device: str = "cpu",
        physics: str = "newton_mjwarp",
        image_size: int | None = None,
        max_steps: int | None = None,
    ) -> None:
        os.environ[known.ASSET_ROOT] = os.environ.get(known.ASSET_ROOT) or str(known.ASSETS)  # read at the import below
        import torch
        from isaaclab.app import launch_simulation

        if device != "cpu" and not torch.cuda.is_available():
            raise UserError(f"Isaac Lab device '{device}' needs CUDA, and torch finds none; use device 'cpu'")
        cfg = settings.load(task, num_envs, device, physics)
        self._cameras = settings.adapt(cfg, observation != "state", image_size, max_steps)
        if observation != "state" and not self._cameras:
            raise UserError(f"Isaac Lab task '{task}' has no cameras; use observation 'state'")
        self.num_envs = num_envs
        with contextlib.ExitStack() as opened:
            opened.enter_context(launch_simulation(cfg, {"enable_cameras": bool(self._cameras)}))
            self.env = _make(task, cfg)
            opened.callback(self.env.close)
            self._set_up(task, observation, state, reward)
            self._exit = opened.pop_all()

    def _set_up(self, task: str, observation: str, state: tuple[str, ...] | None, reward: str) -> None:
        """What follows from the environment."""
        import torch

        device = self.env.device
        self._reward = _Reward(self.env, task, reward)
        self.action_spec = action_spec(self.env)
        # Kernels that only a reset or a step needs are compiled now, not against a chunk's deadline; and Isaac Lab's
        # first reset, which loses the velocities that it draws, is over.
        self.env.reset()
        still = torch.zeros(self.num_envs, self.action_spec.dim, device=device)
        self._groups: Mapping[str, Any] = self.env.step(still)[0]
        self._seeds = np.zeros(self.num_envs, np.int64)
        self._live = torch.zeros(self.num_envs, dtype=torch.bool, device=device)
        self._final: Mapping[str, Any] | None = None
        self._reset_row = self.env._reset_idx
        self.env._reset_idx = self._keep_final
        randomness.resample_by_seed(self.env, self._seeds)
        groups = self._observed()
        hidden, images = (("critic",) if "critic" in groups else ()), ((CAMERA,) if self._cameras else ())
        self._layout = Layout.of(groups, state or _default_state(groups, observation), hidden, images)
        self.observation_spec = observation_spec(self._layout, groups)
        limit, success = int(self.env.max_episode_length), self._reward.success
        self.tasks = (TaskSpec(task, known.instruction(task), limit, has_success=success, reward=reward),)

    def reset(self, rows: np.ndarray, states: list[InitialState]) -> None:
        import torch

        env, index = self.env, torch.from_numpy(np.asarray(rows, np.int64)).to(self.env.device)
        self._seeds[rows] = [state.seed for state in states]
        with randomness.apart(str(env.device)):
            for row, state in zip(index.int().split(1), states, strict=True):
                randomness.seed_everything(state.seed)
                self._reset_row(row)
        if len(rows) == self.num_envs:
            randomness.seed_everything(states[0].seed)
        env.episode_length_buf[index] = 0  # direct tasks may draw it, to spread the ends of episodes
        env.scene.write_data_to_sim()
        env.sim.forward()
        _update_sensors(env)
        with histories.advanced(env, index):
            manager = getattr(env, "observation_manager", None)
            fresh = manager.compute(update_history=True) if manager is not None else env._compute_observations()
        self._groups = replaced(self._groups, fresh, index)
        self._live[index] = True
        self._reward.reset(index)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        import torch

        self._final = None
        tensor = torch.from_numpy(np.array(actions, np.float32)).to(self.env.device)
        self._groups, reward, terminated, truncated, _ = self.env.step(tensor)
        # For tasks that have no time limit of their own, which `max_steps` may give them.
        truncated = truncated | (self.env.episode_length_buf >= self.env.max_episode_length)
        ended = self._live & (terminated | truncated)
        self._live &= ~ended
        if self._final is not None:
            self._groups = replaced(self._groups, self._final, ended.nonzero().squeeze(-1))
        earned, success = self._reward(reward, self._groups)
        return _numpy(earned), _numpy(terminated), _numpy(truncated), success

    def observe(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self._layout.arrays(self._observed(), np.asarray(rows))

    def close(self) -> None:
        self._exit.close()

    def _keep_final(self, rows: Any) -> None:
        """Called by Isaac Lab's step in place of its own reset, before it draws new commands for the rows that go on.
        (The observations of a direct task do not change any more within the step, and computing them may count.)"""
        manager = getattr(self.env, "observation_manager", None)
        if manager is not None and bool(self._live[rows.long()].any()):
            self._final = _cloned(manager.compute())

    def _observed(self) -> dict[str, Any]:
        """All groups. A camera that is up to date is not rendered again."""
        views = {name: self.env.scene[name].data.output["rgb"] for name in self._cameras}
        images = {name: getattr(view, "torch", view) for name, view in views.items()}
        return {**self._groups, CAMERA: images} if images else dict(self._groups)


class _Reward:
    """What an episode earns, and whether it succeeds: the task's termination of that name, where there is one."""

    def __init__(self, env: Any, task: str, kind: str) -> None:
        self._env, self._kind = env, kind
        managed = hasattr(env, "termination_manager")
        self.success = managed and "success" in env.termination_manager.active_terms
        self._stages = env.observation_manager.active_terms.get("subtask_terms", []) if managed else []
        own = not managed or bool(env.reward_manager.active_terms)
        possible = {"task": own, "success": self.success, "staged": self.success and bool(self._stages)}
        if not possible[kind]:
            has = ", ".join(name for name, there in possible.items() if there)
            raise UserError(f"Isaac Lab task '{task}' has no reward '{kind}'; it has: {has}")
        self._reached: Any = None

    def reset(self, rows: Any) -> None:
        if self._reached is not None:
            self._reached[rows] = False

    def __call__(self, reward: Any, groups: Mapping[str, Any]) -> tuple[Any, np.ndarray | None]:
        """(reward [N], success [N] or None) of a step that ended in `groups`."""
        import torch

        if not self.success:
            return reward, None
        success = self._env.termination_manager.get_term("success").bool()
        if self._kind == "success":
            reward = success.float()
        elif self._kind == "staged":
            stages = [groups["subtask_terms"][name].reshape(len(success)).bool() for name in self._stages]
            now = torch.stack([*stages, success], dim=1)
            before = torch.zeros_like(now) if self._reached is None else self._reached
            self._reached = before | now
            reward = (self._reached & ~before).float().mean(dim=1)
        return reward, _numpy(success)


def _update_sensors(env: Any) -> None:
    """Newton's own sensors follow the bodies only when time passes: after a reset they would show the old pose."""
    manager = env.sim.physics_manager
    for kind in ("frame_transform", "imu"):
        for sensor in getattr(manager, f"_newton_{kind}_sensors", ()):
            sensor.update(manager.get_state_0())


def _make(task: str, cfg: Any) -> Any:
    """Isaac Lab's environment. Raises `UserError` when its scene needs a file that is not there."""
    import gymnasium

    try:
        return gymnasium.make(task, cfg=cfg).unwrapped
    except FileNotFoundError as error:
        raise UserError(
            f"Isaac Lab task '{task}' needs NVIDIA's assets ({error}): set {known.ASSET_ROOT} to their folder or server"
        ) from error


def action_spec(env: Any) -> ActionSpec:
    """Isaac Lab neither bounds nor clips actions: -1 to 1 where a task does not say. Zero moves nothing in relative
    control, is no effort, and in absolute joint control the default pose."""
    space = env.single_action_space
    if getattr(space, "shape", None) is None or len(space.shape) != 1:
        raise UserError(f"Isaac Lab's action space {space} is not supported: it must be a vector")
    bounded = bool(np.isfinite(space.low).all() and np.isfinite(space.high).all())
    low, high = (space.low, space.high) if bounded else (-np.ones(space.shape), np.ones(space.shape))
    control, gripper = [], []
    if manager := getattr(env, "action_manager", None):
        ends = np.cumsum(manager.action_term_dim)
        for name, end in zip(manager.active_terms, ends.tolist(), strict=True):
            term = manager.get_term(name)
            relative = getattr(getattr(term.cfg, "controller", None), "use_relative_mode", False)
            control.append(("relative " if relative else "") + type(term).__name__.removesuffix("Action"))
            if type(term).__name__.startswith("Binary"):
                gripper.append(end - 1)
    return ActionSpec(
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        hold=tuple(np.clip(np.zeros(space.shape), low, high).tolist()),
        control="+".join(control) or type(env).__name__,
        gripper=gripper[0] if len(gripper) == 1 else None,
        gripper_open=1,  # BinaryJointAction closes below zero
    )


def observation_spec(layout: Layout, groups: Mapping[str, Any]) -> ObservationSpec:
    starts: list[int] = []
    for term in layout.state:
        names = [name.rpartition(".")[0] for name in layout.state_names]
        starts += [names.index(term) + at for at in known.quaternions(term, names.count(term))]
    return ObservationSpec(
        **layout.spec_fields(), quaternion=_quaternion_order() if starts else None, quaternion_at=tuple(starts)
    )


def _quaternion_order() -> Literal["wxyz", "xyzw"]:
    """Isaac Lab 2 has wxyz, 3 has xyzw: seen where its identity has the 1."""
    import torch
    from isaaclab.utils.math import quat_from_euler_xyz

    zero = torch.zeros(1)
    return "wxyz" if quat_from_euler_xyz(zero, zero, zero)[0, 0] == 1 else "xyzw"


def _default_state(groups: Mapping[str, Any], observation: str) -> tuple[str, ...]:
    """The vectors of the group `policy`; of these, with "rgb", what a robot knows without looking."""
    policy = groups["policy"]
    if not isinstance(policy, Mapping):
        return () if policy.ndim > 3 else ("policy",)
    names = [name for name, term in policy.items() if term.ndim <= 3]
    return tuple(f"policy.{name}" for name in names if observation != "rgb" or known.PROPRIOCEPTION.fullmatch(name))


def _cloned(groups: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _cloned(each) if isinstance(each, Mapping) else each.clone() for name, each in groups.items()}


def _numpy(tensor: Any) -> np.ndarray:
    """A copy: Isaac Lab overwrites what it returned."""
    return np.array(tensor.cpu())

"""One mjlab task, many environments stepped together; runs in mjlab's own Python environment."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import numpy as np

from embodied_rl.errors import UserError
from embodied_rl.simulators.base import BatchedEnvironment, InitialState
from embodied_rl.simulators.mjlab import seeded, tasks
from embodied_rl.simulators.tensor_groups import Layout, replaced
from embodied_rl.specs import ActionSpec, ObservationSpec, TaskSpec

CAMERA = "camera"
"""mjlab's name of the group of images."""


class MjlabEnvironment(BatchedEnvironment):
    """`num_envs` environments of one task on `device`.

    A start depends on its seed alone, whichever row it is in and whatever ran before (`seeded.settings` says what that
    takes). On the CPU so does what follows, bit for bit, in the cartpole and manipulation tasks. In the locomotion
    tasks it does not quite: random pushes depend on the episodes beside, MuJoCo Warp couples rows of the G1 in the last
    bits, and a reward of the rough ones remembers the episode before.

    Success is what the task's goal says at the end of a step (within 5 cm for the lifting tasks); it ends no episode.
    Raises `UserError` for what `tasks.check` refuses and for a CUDA device that is not there.
    """

    def __init__(
        self,
        num_envs: int,
        task: str,
        observation: str = "state",
        reward: str = "task",
        device: str = "cpu",
        image_size: int | None = None,
        max_steps: int | None = None,
    ) -> None:
        import torch

        torch.set_num_threads(1)  # what torch does here are hundreds of operations on small tensors
        if device != "cpu" and not torch.cuda.is_available():
            raise UserError(f"mjlab device '{device}' needs CUDA, and torch finds none; use device 'cpu'")
        facts = tasks.check(task, observation, reward)
        self.num_envs = num_envs
        images = observation != "state"
        cfg = seeded.settings(task, num_envs, max_steps)
        _configure_cameras(cfg, images, image_size)
        self.env = seeded.make(cfg, device)
        self._pays_success = reward == "success"
        commands = self.env.command_manager._terms.values()
        self._goal = next((term for term in commands if hasattr(term, "compute_success")), None)
        self._render = _postpone_rendering(self.env) if images else None
        self._rendered = False
        self._groups, _ = self.env.reset()
        groups = self._observed()
        state = "critic" if observation == "state+rgb" else "actor"
        hidden = tuple(name for name in ("critic",) if name in groups and name != state)
        self._layout = Layout.of(groups, (state,), hidden, (CAMERA,) if images else ())
        self.observation_spec = ObservationSpec(**self._layout.spec_fields())
        self.action_spec = action_spec(self.env)
        limit = self.env.max_episode_length
        self.tasks = (TaskSpec(task, facts.instruction, limit, has_success=self._goal is not None, reward=reward),)
        self.step(np.zeros((num_envs, self.action_spec.dim), np.float32))  # compiles what only a step needs

    def reset(self, rows: np.ndarray, states: list[InitialState]) -> None:
        import torch

        index = torch.from_numpy(rows).to(self.env.device)
        self.env.seeds[rows] = [state.seed for state in states]
        fresh, _ = self.env.reset(env_ids=index)
        # Only these rows: mjlab reads the contact sensors of the others again, one physics step later.
        self._groups = replaced(self._groups, fresh, index)
        self._rendered = False

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        import torch

        tensor = torch.from_numpy(np.array(actions, np.float32)).to(self.env.device)
        self._groups, reward, terminated, truncated, _ = self.env.step(tensor)
        self._rendered = False
        success = None if self._goal is None else _numpy(self._goal.compute_success())
        earned = _numpy(reward) if success is None or not self._pays_success else success.astype(np.float32)
        return earned, _numpy(terminated), _numpy(truncated), success

    def observe(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self._layout.arrays(self._observed(), rows)

    def close(self) -> None:
        self.env.close()

    def _observed(self) -> dict[str, Any]:
        """All groups, images rendered once per step at most."""
        if self._render is not None and not self._rendered:
            self._render()
            self._groups = {**self._groups, CAMERA: self.env.observation_manager.compute_group(CAMERA)}
            self._rendered = True
        return self._groups


def _configure_cameras(cfg: Any, images: bool, image_size: int | None) -> None:
    """Remove the cameras that are not observed, or set their size."""
    from mjlab.sensor import CameraSensorCfg

    if not images and CAMERA in cfg.observations:
        del cfg.observations[CAMERA]
        cfg.scene.sensors = tuple(each for each in cfg.scene.sensors if not isinstance(each, CameraSensorCfg))
    for sensor in cfg.scene.sensors or ():
        if isinstance(sensor, CameraSensorCfg) and image_size is not None:
            sensor.width = sensor.height = image_size


def _postpone_rendering(env: Any) -> Any:
    """Keep `env` from rendering at every step; returns the function that renders its present state."""
    render = env.sim.sense
    env.sim.sense = lambda: None
    return render


def action_spec(env: Any) -> ActionSpec:
    """mjlab's actions have no bounds of their own. Here they end where the motors saturate whatever the pose, so that
    nothing is lost. Zero is the default pose, or no effort."""
    low, high, joints = [], [], []
    for term in env.action_manager._terms.values():
        driven = term._entity.indexing.joint_ids[term.target_ids].tolist()
        motors = [env.sim.mj_model.actuator_trnid[:, 0].tolist().index(joint) for joint in driven]
        ends = (env.sim.mj_model.actuator_ctrlrange[motors] - _column(term.offset)) / _column(term.scale)
        low += ends[:, 0].tolist()
        high += ends[:, 1].tolist()
        joints += term.target_names
    gripper = joints.index("left_finger") if "left_finger" in joints else None
    control = "+".join(env.action_manager.active_terms)
    return ActionSpec(tuple(low), tuple(high), (0.0,) * len(low), control, gripper, gripper_open=1)


def _column(value: Any) -> np.ndarray:
    """A number, or what [N,A] values say for the first row, as [1 or A,1]."""
    return np.array([[value]]) if isinstance(value, float) else _numpy(value)[0, :, None]


def _numpy(tensor: Any) -> np.ndarray:
    """A copy: mjlab overwrites what it returned."""
    return np.array(tensor.cpu())

"""One Gymnasium environment behind our contract, without Gymnasium's wrappers for time limits and checks."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np

from embodied_rl.errors import UserError
from embodied_rl.simulators import mujoco_gl
from embodied_rl.simulators.base import Environment, InitialState
from embodied_rl.simulators.gymnasium import registered
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec, TaskSpec

CAMERA = "render"
SUCCESS = ("is_success", "success")
"""Where in `info` environments say whether they are solved."""


class GymnasiumEnvironment(Environment):
    """Observations (as float32), rewards and ends are the environment's own; every reset is `reset(seed=...)`.

    Raises `UserError` for an unknown id, a missing package, spaces that are not supported, or no time limit.
    """

    def __init__(
        self,
        task: str,
        kwargs: dict[str, Any] | None = None,
        observation: str = "state",
        max_steps: int | None = None,
    ) -> None:
        self._images, self._has_state = observation != "state", observation != "rgb"
        self._env = make(task, kwargs or {}, self._images)
        limit = max_steps or registered.spec(task).max_episode_steps
        if limit is None:
            raise UserError(f"Gymnasium task '{task}' registers no time limit; set max_steps")
        self._max_steps, self._steps = int(limit), 0
        self.action_spec = action_spec(task, self._env.action_space)
        self._space = self._env.action_space  # wrappers look for it one below the other
        names = tuple(state_names(task, self._env.observation_space)) if self._has_state else ()
        # A throw-away step: which key of `info`, if any, tells about success, and how large the frames are.
        self._observed, _ = self._env.reset(seed=0)
        *_, info = self._env.step(self._action(np.asarray(self.action_spec.hold, np.float32)))
        self._success = next((key for key in SUCCESS if key in info), None)
        cameras = {}
        if self._images:
            height, width, _ = self._frame().shape
            cameras[CAMERA] = CameraSpec(height, width)
        self.observation_spec = ObservationSpec(state=len(names), state_names=names, cameras=cameras)
        words = registered.instruction(task)
        self.tasks = (TaskSpec(task, words, self._max_steps, self._success is not None, "its own"),)

    def reset(self, state: InitialState) -> None:
        self._observed, _ = self._env.reset(seed=state.seed)
        self._steps = 0

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool | None]:
        self._observed, reward, terminated, truncated, info = self._env.step(self._action(action))
        self._steps += 1
        success = bool(info[self._success]) if self._success else None
        return float(reward), bool(terminated), bool(truncated) or self._steps >= self._max_steps, success

    def observe(self) -> dict[str, np.ndarray]:
        if not self._has_state:
            state = np.zeros(0, np.float32)
        elif isinstance(self._observed, np.ndarray):
            state = self._observed.astype(np.float32).reshape(-1)
        else:
            state = np.concatenate(list(_leaves(self._env.observation_space, self._observed))).astype(np.float32)
        frame = {"state": state}
        if self._images:
            frame[f"image.{CAMERA}"] = self._frame()
        return frame

    def close(self) -> None:
        viewer = self._make_current()
        if viewer is not None:
            viewer.con.free()  # later, it would be freed in whichever context is current then
        self._env.close()

    def _action(self, action: np.ndarray) -> Any:
        """What the environment wants for float32 [A]."""
        space = self._space
        if self.action_spec.choices:
            return int(np.rint(action[0])) + int(space.start)
        if action.shape == space.shape and action.dtype == space.dtype:
            return action
        return action.reshape(space.shape).astype(space.dtype, copy=False)

    def _frame(self) -> np.ndarray:
        """uint8 [H,W,3]."""
        self._make_current()
        return np.ascontiguousarray(self._env.render())

    def _make_current(self) -> Any:
        """The viewer of a MuJoCo environment that has one. Gymnasium draws in whichever context is current, perhaps
        another environment's (Gymnasium#736)."""
        viewer = getattr(getattr(self._env.unwrapped, "mujoco_renderer", None), "viewer", None)
        if viewer is not None:
            viewer.make_context_current()
        return viewer


def make(task: str, kwargs: dict[str, Any], images: bool) -> Any:
    """The environment without the wrappers that limit its time or check what it is given; others that its registration
    asks for remain."""
    if images and find_spec("mujoco"):
        mujoco_gl.configure()
    spec = registered.spec(task)
    import gymnasium
    from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker

    render_mode = {"render_mode": "rgb_array"} if images else {}
    try:
        env = gymnasium.make(spec.id, max_episode_steps=-1, disable_env_checker=True, **render_mode, **kwargs)
    except (gymnasium.error.Error, ImportError) as error:
        raise UserError(f"Gymnasium task '{task}' cannot run here: {_plain(error)}") from error
    except TypeError as error:
        raise UserError(f"Gymnasium task '{task}' with {kwargs or 'no arguments'}: {error}") from error
    while isinstance(env, OrderEnforcing | PassiveEnvChecker):
        env = env.env
    return env


def _plain(error: Exception) -> str:
    return str(error.args[0] if error.args else error)


def action_spec(task: str, space: Any) -> ActionSpec:
    """A Box as it is, flattened, its infinite bounds kept; Discrete(n) as one number that holds the choice."""
    from gymnasium.spaces import Box, Discrete

    if isinstance(space, Discrete):
        return ActionSpec((0.0,), (float(space.n - 1),), (0.0,), control="discrete", choices=int(space.n))
    if not isinstance(space, Box) or space.dtype.kind != "f":
        raise UserError(
            f"Gymnasium task '{task}' has the action space {space}; Box of floats and Discrete are supported"
        )
    low, high = (bound.ravel().astype(np.float32) for bound in (space.low, space.high))
    hold = np.clip(0.0, low, high)
    return ActionSpec(tuple(low.tolist()), tuple(high.tolist()), tuple(hold.tolist()))


def state_names(task: str, space: Any, prefix: str = "") -> list[str]:
    """A name for each number of the flattened observation: "2" in a Box, "desired_goal.2" in a Dict, whose parts come
    in the order of the space (alphabetical for Fetch: achieved_goal, desired_goal, observation)."""
    from gymnasium.spaces import Box, Dict

    if isinstance(space, Dict):
        return [name for key, part in space.items() for name in state_names(task, part, f"{prefix}{key}.")]
    if not isinstance(space, Box):
        raise UserError(
            f"Gymnasium task '{task}' has the observation space {space}; Box and Dict of Boxes are supported, and "
            "observation 'rgb' needs none"
        )
    return [f"{prefix}{i}" for i in range(int(np.prod(space.shape)))]


def _leaves(space: Any, observed: Any) -> Iterator[np.ndarray]:
    """The arrays of an observation in the order of `state_names`."""
    from gymnasium.spaces import Dict

    if isinstance(space, Dict):
        for key, part in space.items():
            yield from _leaves(part, observed[key])
    else:
        yield np.ravel(observed)

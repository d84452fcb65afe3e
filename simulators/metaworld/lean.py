"""MetaWorld's tasks, its own code and numbers, without what nobody reads.

`lean(cls)` is a subclass of a MetaWorld task. Its `advance` makes the same simulation steps, observation, reward and
success as MetaWorld's `step`, bit for bit, and leaves out a search through all contacts for a number that only `info`
holds, a second evaluation of the dynamics, look-ups by name, and array functions applied to single numbers. The task's
own functions are kept and given faster versions of the helpers they call; MetaWorld itself is not touched.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np

CAMERA_POSITION = (0.75, 0.075, 0.7)
"""Of corner2, metres: closer to the table than in MetaWorld's files, where lerobot and its datasets have it."""


class Scene:
    """The compiled model of one task and its data, used by one environment at a time."""

    def __init__(self, name: str) -> None:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        self.name = name
        self.mujoco: Any = mujoco
        self.task_class = lean(ALL_V3_ENVIRONMENTS[name])
        self.settled: Any = None
        """The data after MetaWorld's opening moves (`_reset_hand`) in the model as it was compiled."""
        self.model: Any = None
        self.data: Any = None
        env = self.fresh()
        self.model, self.data = env.model, env.data
        self.model.camera("corner2").pos = CAMERA_POSITION
        # The only fields of a model that tasks change, and the only ones to restore.
        self._body_pos, self._site_pos = self.model.body_pos.copy(), self.model.site_pos.copy()
        del env.sawyer_observation_space  # computed before it was known that the goal is visible
        self.low, self.high = env.sawyer_observation_space.low, env.sawyer_observation_space.high

    def fresh(self) -> Any:
        """The task as its constructor makes it, whatever ran before."""
        if self.model is not None:
            self.model.body_pos[:], self.model.site_pos[:] = self._body_pos, self._site_pos
        env = object.__new__(self.task_class)
        env.scene = self
        env.__init__()
        # The goal is part of the observation, as in the multi-task benchmarks.
        env._partially_observable = False
        env._set_task_called = True
        return env

    def as_compiled(self) -> bool:
        """Whether every body is where the model file has it."""
        return np.array_equal(self.model.body_pos, self._body_pos)


class LeanTask:
    """Mixed in before a MetaWorld task."""

    scene: Scene
    settles = True
    """False: the opening moves are skipped, for those who want to know only what a reset draws."""

    def _initialize_simulation(self: Any) -> tuple[Any, Any]:
        """Instead of compiling the model again, the scene's with its data as new."""
        scene = self.scene
        if scene.model is None:
            model, data = super()._initialize_simulation()  # pyright: ignore[reportAttributeAccessIssue]
        else:
            model, data = scene.model, scene.data
            scene.mujoco.mj_resetData(model, data)
        # Views into the data.
        self._hand = data.body("hand").xpos
        self._right_claw, self._left_claw = data.body("rightclaw").xpos, data.body("leftclaw").xpos
        self._right_tip, self._left_tip = data.site("rightEndEffector").xpos, data.site("leftEndEffector").xpos
        return model, data

    def _reset_hand(self: Any, steps: int = 50) -> None:
        """The opening moves do not depend on the episode as long as nothing was placed: they are made once."""
        scene = self.scene
        known = scene.settled is not None and scene.as_compiled()
        if known:
            scene.mujoco.mj_copyData(self.data, self.model, scene.settled)
        super()._reset_hand(0 if known or not self.settles else steps)  # pyright: ignore[reportAttributeAccessIssue]
        if scene.settled is None and self.settles:
            scene.settled = scene.mujoco.MjData(self.model)
            scene.mujoco.mj_copyData(scene.settled, self.model, self.data)

    def advance(self: Any, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """One control step: float32 [4] -> (observation float64 [39], reward, success)."""
        mujoco, data = self.scene.mujoco, self.data
        # Sums of float32 and float64 in the order of `set_xyz_action`.
        moved = data.mocap_pos[0] + np.minimum(np.maximum(action[:3], -1.0), 1.0) * self.action_scale
        data.mocap_pos[0] = np.minimum(np.maximum(moved, self.mocap_low), self.mocap_high)
        data.ctrl[0], data.ctrl[1] = action[3], -action[3]
        mujoco.mj_step(self.model, data, nstep=self.frame_skip)
        mujoco.mj_kinematics(self.model, data)  # the positions, which are all that tasks look at
        obs = np.minimum(np.maximum(self._get_obs(), self.scene.low), self.scene.high)
        reward, info = self.evaluate_state(obs, action)
        return obs, float(reward), bool(info["success"])

    @property
    def touching_main_object(self: Any) -> bool:
        """Whether both pads press on the object. It needs the dynamics once more, so it is worked out only where it
        decides about success, and not for info["grasp_success"]."""
        if self.scene.name != "stick-push-v3":
            return False
        data = self.data
        self.scene.mujoco.mj_forward(self.model, data)
        pairs, rows = data.contact.geom, data.contact.efc_address
        with_object = (pairs == self._get_id_main_object()).any(1)
        touching = [with_object & (pairs == data.geom(pad).id).any(1) for pad in ("leftpad_geom", "rightpad_geom")]
        return all(sum(data.efc_force[rows[pad]].tolist()) > 0 for pad in touching)

    @property
    def tcp_center(self: Any) -> np.ndarray:
        return (self._right_tip + self._left_tip) / 2.0

    def _get_curr_obs_combined_no_goal(self: Any) -> np.ndarray:
        obs = np.zeros(18)
        obs[:3] = self._hand
        gap = self._right_claw - self._left_claw
        obs[3] = min(max(math.sqrt(gap.dot(gap)) / 0.1, 0.0), 1.0)
        positions, quaternions = self._get_pos_objects(), self._get_quat_objects()
        for i in range(len(positions) // 3):
            obs[7 * i + 4 : 7 * i + 7] = positions[3 * i : 3 * i + 3]
            obs[7 * i + 7 : 7 * i + 11] = quaternions[4 * i : 4 * i + 4]
        return obs


@functools.cache
def lean(task_class: type) -> type:
    """The lean subclass of a MetaWorld task class."""
    from metaworld.sawyer_xyz_env import SawyerXYZEnv

    body: dict[str, Any] = {}
    for cls in (SawyerXYZEnv, task_class):
        for name, value in vars(cls).items():
            if isinstance(value, types.FunctionType):
                body[name] = _with_fast_helpers(value)
            elif isinstance(value, property) and isinstance(value.fget, types.FunctionType):
                body[name] = property(_with_fast_helpers(value.fget))
    return type(f"Lean{task_class.__name__}", (LeanTask, type(task_class.__name__, (task_class,), body)), {})


def _with_fast_helpers(function: types.FunctionType) -> types.FunctionType:
    """A copy of `function` that finds the fast helpers where it looks for the slow ones."""
    if function.__qualname__.endswith("assert_task_is_set.<locals>.inner"):
        function = inspect.getclosurevars(function).nonlocals["func"]
    scope = function.__globals__
    helpers = {name: helper for name, helper in _helpers().items() if name in scope}
    copy = types.FunctionType(
        function.__code__, scope | helpers, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@functools.cache
def _helpers() -> dict[str, Any]:
    from metaworld.utils import reward_utils

    fast_rewards = types.SimpleNamespace(**vars(reward_utils) | {"tolerance": _tolerance(reward_utils)})
    fast_linalg = types.SimpleNamespace(**vars(np.linalg) | {"norm": norm})
    fast_numpy = types.SimpleNamespace(**vars(np) | {"linalg": fast_linalg})
    return {"np": fast_numpy, "reward_utils": fast_rewards, "Rotation": MatrixRotation}


def norm(x: Any, ord: Any = None, **rest: Any) -> Any:
    """`np.linalg.norm`, quicker for a vector of float64."""
    if ord in (None, 2) and not rest and type(x) is np.ndarray and x.ndim == 1 and x.dtype == np.float64:
        return np.sqrt(x.dot(x))
    return np.linalg.norm(x, ord, **rest)


def _tolerance(reward_utils: Any) -> Callable[..., Any]:
    """`reward_utils.tolerance`, quicker for single numbers and the sigmoid that almost all rewards use."""
    original = reward_utils.tolerance
    value_at_margin = reward_utils._DEFAULT_VALUE_AT_MARGIN
    scale = float(np.sqrt(1 / value_at_margin - 1))

    def tolerance(x: Any, bounds: Any = (0.0, 0.0), margin: Any = 0.0, sigmoid: str = "gaussian", **rest: Any) -> Any:
        if sigmoid != "long_tail" or rest or not isinstance(x, float) or not margin > 0 or bounds[0] > bounds[1]:
            return original(x, bounds, margin, sigmoid, **rest)
        x, margin, lower, upper = float(x), float(margin), float(bounds[0]), float(bounds[1])
        if lower <= x <= upper:
            return 1.0
        distance = (lower - x if x < lower else x - upper) / margin
        return 1 / ((distance * scale) ** 2 + 1)

    return tolerance


class MatrixRotation:
    """The two calls of scipy's `Rotation` that tasks make: from_matrix(m).as_quat(), xyzw."""

    def __init__(self, quaternion: np.ndarray) -> None:
        self._quaternion = quaternion

    @classmethod
    def from_matrix(cls, matrix: np.ndarray) -> MatrixRotation:
        """Of a rotation matrix [3,3]; Markley, Unit Quaternion from Rotation Matrix, JGCD 31(2), 2008."""
        m = matrix.tolist()
        trace = m[0][0] + m[1][1] + m[2][2]
        diagonal = [m[0][0], m[1][1], m[2][2], trace]
        largest = diagonal.index(max(diagonal))
        q = [0.0] * 4
        if largest == 3:
            q = [m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1], 1 + trace]
        else:
            i, j, k = largest, (largest + 1) % 3, (largest + 2) % 3
            q[i] = 1 - trace + 2 * m[i][i]
            q[j] = m[j][i] + m[i][j]
            q[k] = m[k][i] + m[i][k]
            q[3] = m[k][j] - m[j][k]
        length = math.sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3])
        return cls(np.array([value / length for value in q]))

    def as_quat(self) -> np.ndarray:
        """[4], xyzw."""
        return self._quaternion

"""What a simulator emits and consumes, what a policy needs, and the named conversions between the two.

A simulator and a policy each state their `ObservationSpec` and `ActionSpec`; `connect` picks, at start-up, the named
conversions that make the first fit the second, or raises `SpecError` with both in the message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from embodied_rl.errors import SpecError, unknown
from embodied_rl.types import Observation

CAMERA_ALIASES: tuple[frozenset[str], ...] = (
    frozenset(
        {
            "base_camera",
            "agentview",
            "agentview_image",
            "table_cam",
            "corner2",
            "primary",
            "third_person",
            "front",
            "image",
            "base_0_rgb",
        }
    ),
    frozenset(
        {"hand_camera", "wrist_cam", "robot0_eye_in_hand", "wrist", "wrist_image", "eye_in_hand", "left_wrist_0_rgb"}
    ),
)
"""Names the field uses for the same view; a policy's camera takes the simulator's of the same group."""


@dataclass(frozen=True)
class CameraSpec:
    """One camera: uint8 RGB [height,width,3]."""

    height: int
    width: int
    rotated: bool = False
    """True when the image is upside down (turned by 180 degrees) against the field's usual view."""


@dataclass(frozen=True)
class ObservationSpec:
    """Shapes and conventions of an `Observation`; a policy leaves at its default what it does not care about."""

    state: int = 0
    """S, size of the state vector."""
    state_names: tuple[str, ...] = field(default=(), repr=False)
    """Name of each number in `state`, e.g. "extra.obj_pose.2"; () when the simulator does not tell. A policy that names
    numbers gets these, in its order, from a simulator that has them by name."""
    cameras: Mapping[str, CameraSpec] = field(default_factory=dict)
    privileged: int = 0
    """P, size of the critic-only vector."""
    quaternion: Literal["wxyz", "xyzw"] | None = None
    """Order of the quaternions in `state`; None when there are none."""
    quaternion_at: tuple[int, ...] = ()
    """Where in `state` each quaternion starts."""
    history: tuple[int, int] = (1, 1)
    """(frames, stride in decisions) that a policy wants stacked; simulators emit (1, 1)."""


@dataclass(frozen=True)
class ActionSpec:
    """A chunk element: float32 [A] between `low` and `high`."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    hold: tuple[float, ...]
    """The action that leaves the robot where it is, given to rows whose episode ended inside a chunk."""
    control: str = ""
    """The controller's name, e.g. "pd_ee_delta_pos"; "" when a policy accepts any."""
    gripper: int | None = None
    """Index of the gripper dimension, None without one."""
    gripper_open: Literal[1, -1] = 1
    """Sign that opens the gripper."""
    choices: int = 0
    """Number of discrete choices, 0 for continuous actions. With choices A = 1 and an action holds the index of the
    choice, 0 to choices - 1, which are also `low` and `high`."""

    @property
    def dim(self) -> int:
        """A."""
        return len(self.low)


@dataclass(frozen=True)
class TaskSpec:
    """One task of a simulator."""

    name: str
    instruction: str
    max_steps: int
    """Time limit in environment steps."""
    has_success: bool
    """False when the task defines no success."""
    reward: str
    """Reward kind in use: "sparse", "normalized_dense", ..."""


def pick_state(simulator: ObservationSpec, names: Sequence[str]) -> ObservationSpec:
    """The spec of a policy that sees these numbers of the simulator's state, in this order, and nothing else; () means
    all of them as they come. A name means a number or all numbers below it: "hand" those from "hand.0" to "hand.2". The
    quaternion among the numbers of "hand" can be had as the rotation's axis times its angle, "hand:axis_angle".

    Raises `UserError` for a name that the simulator does not have.
    """
    if not names:
        return ObservationSpec(simulator.state, quaternion=simulator.quaternion, quaternion_at=simulator.quaternion_at)
    has = _named_numbers(simulator)
    if not has:
        raise SpecError(f"the simulator does not name the numbers of its state, so none can be chosen: {names[0]}")
    chosen: list[str] = []
    for name in names:
        below = [each for each in has if each.startswith(f"{name}.") and (":" in each) == (":" in name)]
        meant = [name] if name in has else below
        if not meant:
            raise unknown("part of the simulator's state", name, {each.rpartition(".")[0] or each for each in has})
        chosen += [each for each in meant if each not in chosen]
    columns = [has.index(name) for name in chosen]
    runs = [(columns.index(at), at) for at in simulator.quaternion_at if at in columns]
    starts = tuple(new for new, at in runs if columns[new : new + 4] == list(range(at, at + 4)))
    order = simulator.quaternion if starts else None
    return ObservationSpec(len(chosen), tuple(chosen), quaternion=order, quaternion_at=starts)


def _named_numbers(simulator: ObservationSpec) -> tuple[str, ...]:
    """Names of the numbers that `with_axis_angles` makes of the simulator's state; () when it does not name its own."""
    parts = [simulator.state_names[at].rpartition(".")[0] for at in simulator.quaternion_at if simulator.state_names]
    return (*simulator.state_names, *(f"{part}:axis_angle.{axis}" for part in parts for axis in "xyz"))


Convert = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Connection:
    """The conversions between one simulator and one policy. Without any, both methods return their argument itself."""

    names: list[str]
    """What is converted, readable, in order."""
    state: tuple[Convert, ...] = ()
    cameras: Mapping[str, tuple[str, tuple[Convert, ...]]] | None = None
    """{policy camera: (simulator camera, conversions)}; None when the images stay as they are."""
    actions: tuple[Convert, ...] = ()

    def observation(self, observation: Observation) -> Observation:
        """What the policy needs of a simulator's (numpy) `observation`; arrays that need no conversion are shared."""
        if self.state:
            observation = replace(observation, state=_chain(self.state, observation.state))
        if self.cameras is None:
            return observation
        views = self.cameras.items()
        images = {name: _chain(convert, observation.images[source]) for name, (source, convert) in views}
        masks = {name: observation.image_mask[source] for name, (source, _) in views}
        return replace(observation, images=images, image_mask=masks)

    def action(self, actions: np.ndarray) -> np.ndarray:
        """The simulator's actions float32 [...,A] for a policy's."""
        return _chain(self.actions, actions)


def connect(
    simulator_observation: ObservationSpec,
    simulator_action: ActionSpec,
    policy_observation: ObservationSpec,
    policy_action: ActionSpec,
) -> Connection:
    """Choose the conversions by which the simulator serves the policy; `SpecError` when none do."""
    names: list[str] = []
    state = _state_conversions(simulator_observation, policy_observation, names)
    cameras = _camera_conversions(simulator_observation, policy_observation, names)
    actions = _action_conversions(simulator_action, policy_action, names)
    return Connection(names, state, cameras, actions)


def _state_conversions(simulator: ObservationSpec, policy: ObservationSpec, names: list[str]) -> tuple[Convert, ...]:
    convert: list[Convert] = []
    wanted, starts, size = policy.state_names, simulator.quaternion_at, simulator.state
    has_names = _named_numbers(simulator)
    if wanted and wanted != simulator.state_names and set(wanted) <= set(has_names):
        picked = pick_state(simulator, wanted)
        columns = [has_names.index(name) for name in picked.state_names]
        if max(columns) >= simulator.state:
            names.append(f"quaternion {simulator.quaternion}->axis-angle")
            convert.append(
                lambda array: with_axis_angles(array, simulator.quaternion_at, simulator.quaternion == "xyzw")
            )
        starts, size = picked.quaternion_at, picked.state
        names.append(f"pick {size} of {simulator.state} numbers of the state")
        convert.append(lambda array: array[..., columns])
    for what, has in (("state", size), ("privileged", simulator.privileged)):
        needs = getattr(policy, what)
        if needs and needs != has:
            raise _misfit(f"the simulator's {what} has size {has}, the policy needs {needs}", simulator, policy)
    if policy.quaternion is None or (policy.quaternion, policy.quaternion_at) == (simulator.quaternion, starts):
        return tuple(convert)
    if simulator.quaternion is None or starts != policy.quaternion_at:
        raise _misfit("the quaternions in the state are at other places", simulator, policy)
    names.append(f"quaternion {simulator.quaternion}->{policy.quaternion}")
    to_xyzw = policy.quaternion == "xyzw"
    return (*convert, lambda array: reorder_quaternions(array, starts, to_xyzw))


def _camera_conversions(
    simulator: ObservationSpec, policy: ObservationSpec, names: list[str]
) -> dict[str, tuple[str, tuple[Convert, ...]]] | None:
    if dict(policy.cameras) == dict(simulator.cameras):
        return None
    if not policy.cameras:
        names.append("drop images")
    views: dict[str, tuple[str, tuple[Convert, ...]]] = {}
    for name, needs in policy.cameras.items():
        source = _find_camera(name, simulator, policy)
        has, convert = simulator.cameras[source], []
        if source != name:
            names.append(f"camera {source}->{name}")
        if has.rotated != needs.rotated:
            names.append(f"rotate {name} by 180")
            convert.append(rotate_180)
        if (has.height, has.width) != (needs.height, needs.width):
            names.append(f"resize {name} {has.height}x{has.width}->{needs.height}x{needs.width}")
            convert.append(Resize((has.height, has.width), (needs.height, needs.width)))
        views[name] = (source, tuple(convert))
    if policy.cameras and len(policy.cameras) < len(simulator.cameras):
        names.append(f"pick cameras {','.join(policy.cameras)}")
    return views


def _find_camera(name: str, simulator: ObservationSpec, policy: ObservationSpec) -> str:
    if name in simulator.cameras:
        return name
    group = next((group for group in CAMERA_ALIASES if name in group), frozenset())
    same = [camera for camera in simulator.cameras if camera in group and camera not in policy.cameras]
    if len(same) != 1:
        has = ", ".join(simulator.cameras) or "none"
        raise _misfit(f"the policy needs camera '{name}', the simulator has {has}", simulator, policy)
    return same[0]


def _action_conversions(simulator: ActionSpec, policy: ActionSpec, names: list[str]) -> tuple[Convert, ...]:
    if policy.dim != simulator.dim:
        raise _misfit(f"the policy's actions have {policy.dim} dimensions, not {simulator.dim}", simulator, policy)
    if policy.control and policy.control != simulator.control:
        raise _misfit(
            f"the policy acts through '{policy.control}', the simulator's controller is '{simulator.control}'",
            simulator,
            policy,
        )
    if policy.choices != simulator.choices:
        has, needs = (f"{n} choices" if n else "continuous actions" for n in (simulator.choices, policy.choices))
        raise _misfit(f"the policy gives {needs}, the simulator takes {has}", simulator, policy)
    convert: list[Convert] = []
    low, high = (np.array(bound, np.float64) for bound in (policy.low, policy.high))
    if policy.gripper is not None:
        if policy.gripper != simulator.gripper:
            raise _misfit("the gripper is another action dimension", simulator, policy)
        if policy.gripper_open != simulator.gripper_open:
            index = policy.gripper
            if not np.isfinite(low[index] + high[index]):
                raise _misfit("a gripper without bounds cannot be flipped", simulator, policy)
            names.append("flip gripper")
            centre = low[index] + high[index]
            convert.append(lambda actions: flip(actions, index, centre))
    if (policy.low, policy.high) != (simulator.low, simulator.high):
        new_low, new_high = (np.array(bound, np.float64) for bound in (simulator.low, simulator.high))
        moved = (low != new_low) | (high != new_high)
        if not np.isfinite([low, high, new_low, new_high])[:, moved].all() or (low >= high)[moved].any():
            raise _misfit("action ranges that are infinite or empty cannot be mapped", simulator, policy)
        names.append("map action range")
        safe = np.where(moved, high - low, 1.0)
        scale = np.where(moved, (new_high - new_low) / safe, 1.0)
        offset = np.where(moved, new_low - np.where(moved, low, 0.0) * scale, 0.0)
        convert.append(lambda actions: (actions * scale + offset).astype(np.float32))
    return tuple(convert)


def reorder_quaternions(state: np.ndarray, starts: tuple[int, ...], to_xyzw: bool) -> np.ndarray:
    """A copy of `state` [...,S] whose quaternions, which begin at `starts`, are xyzw instead of wxyz, or back."""
    state = np.array(state)
    for start in starts:
        part = slice(start, start + 4)
        state[..., part] = np.roll(state[..., part], -1 if to_xyzw else 1, axis=-1)
    return state


def with_axis_angles(state: np.ndarray, starts: tuple[int, ...], xyzw: bool) -> np.ndarray:
    """`state` [...,S] and behind it the rotation vectors [...,3] of its unit quaternions, which begin at `starts`: axis
    times angle, 0 to 2 pi, so that the negative quaternion has another one, as in robosuite's states of LIBERO."""
    parts = [state]
    for start in starts:
        turned = np.roll(state[..., start : start + 4].astype(np.float64), 0 if xyzw else -1, axis=-1)
        axis, cosine = turned[..., :3], turned[..., 3:].clip(-1, 1)
        sine = np.sqrt(1 - cosine**2)
        vector = np.where(sine > 1e-8, axis * 2 * np.arccos(cosine) / np.maximum(sine, 1e-8), 0.0)
        parts.append(vector.astype(state.dtype))
    return np.concatenate(parts, axis=-1)


def rotate_180(images: np.ndarray) -> np.ndarray:
    """`images` [...,H,W,3] upside down: a view, its own inverse."""
    return images[..., ::-1, ::-1, :]


def flip(actions: np.ndarray, index: int, centre: float = 0.0) -> np.ndarray:
    """A copy of `actions` [...,A] with a[index] replaced by `centre` - a[index]; its own inverse."""
    actions = np.array(actions)
    actions[..., index] = centre - actions[..., index]
    return actions


class Resize:
    """uint8 [...,H,W,3] to another size: bilinear, antialiased when shrinking (the triangle filter of Pillow's
    `BILINEAR`), aspect ratio not kept."""

    def __init__(self, source: tuple[int, int], target: tuple[int, int]) -> None:
        self._rows, self._columns = (_triangle_filter(a, b) for a, b in zip(source, target, strict=True))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        *batch, height, width, channels = images.shape
        tall = self._rows @ images.reshape(-1, height, width * channels).astype(np.float32)
        tall = tall.reshape(-1, width, channels)
        out = np.rint(self._columns @ tall).clip(0, 255).astype(np.uint8)
        return out.reshape(*batch, len(self._rows), len(self._columns), channels)


def _triangle_filter(source: int, target: int) -> np.ndarray:
    """Weights float32 [target,source], rows summing to 1."""
    scale = source / target
    support = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale - 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(source) - centres[:, None]) / support)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _chain(converts: tuple[Convert, ...], array: np.ndarray) -> np.ndarray:
    for convert in converts:
        array = convert(array)
    return array


def _misfit(what: str, simulator: ObservationSpec | ActionSpec, policy: ObservationSpec | ActionSpec) -> SpecError:
    return SpecError(f"simulator and policy do not fit: {what}. Simulator: {simulator}. Policy: {policy}.")

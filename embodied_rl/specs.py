"""What a simulator emits and consumes, what a policy needs, and the named conversions between the two.

A simulator and a policy each state their `ObservationSpec` and `ActionSpec`; `connect` picks, at start-up, the named
conversions that make the first fit the second, or raises `SpecError` with both in the message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal



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

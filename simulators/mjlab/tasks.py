"""What mjlab 1.6 registers, so that listing it needs no import of mjlab (tests hold this table to the real one)."""

from __future__ import annotations

from dataclasses import dataclass

from embodied_rl.errors import UserError, unknown


@dataclass(frozen=True)
class Task:
    """Facts about a task that do not change between runs."""

    instruction: str
    """mjlab's tasks carry no language; these words are ours."""
    action_dim: int
    max_steps: int
    """Time limit in environment steps, as mjlab sets it."""
    cameras: tuple[str, ...] = ()
    """Those that give RGB; depth and segmentation are not observations here."""
    has_success: bool = False
    missing: str = ""
    """What mjlab does not ship with the task."""


_BALANCE = "balance the pole"
_SWING_UP = "swing the pole up and balance it"
_LIFT = "lift the cube to the goal"
_LIFT_ONE = "lift the chosen cube to the goal"
_WALK = "walk at the commanded velocity"
_TRACK = "follow the reference motion"
_MOTION = "needs a recorded motion file, which mjlab does not ship; mjlab's own training scripts take one"

TASKS = {
    "Mjlab-Cartpole-Balance": Task(_BALANCE, 1, 1000),
    "Mjlab-Cartpole-Swingup": Task(_SWING_UP, 1, 1000),
    "Mjlab-Lift-Cube-Yam": Task(_LIFT, 7, 1000, has_success=True),
    "Mjlab-Lift-Cube-Yam-Depth": Task(_LIFT, 7, 1000, has_success=True),
    "Mjlab-Lift-Cube-Yam-Rgb": Task(_LIFT, 7, 1000, ("camera_d405_rgb",), has_success=True),
    "Mjlab-Multi-Cube-Seg-Yam": Task(_LIFT_ONE, 7, 1000, has_success=True),
    "Mjlab-Tracking-Flat-Unitree-G1": Task(_TRACK, 29, 500, missing=_MOTION),
    "Mjlab-Tracking-Flat-Unitree-G1-No-State-Estimation": Task(_TRACK, 29, 500, missing=_MOTION),
    "Mjlab-Velocity-Flat-Unitree-G1": Task(_WALK, 29, 1000),
    "Mjlab-Velocity-Flat-Unitree-Go1": Task(_WALK, 12, 1000),
    "Mjlab-Velocity-Rough-Unitree-G1": Task(_WALK, 29, 1000),
    "Mjlab-Velocity-Rough-Unitree-Go1": Task(_WALK, 12, 1000),
}


def rewards(task: Task) -> tuple[str, ...]:
    """The kinds of reward it has."""
    return ("task", "success") if task.has_success else ("task",)


def check(name: str, observation: str, reward: str) -> Task:
    """The task `name`; raises `UserError` when it is unknown, cannot run, or has no such observation or reward."""
    if name not in TASKS:
        raise unknown("mjlab task", name, TASKS)
    task = TASKS[name]
    if task.missing:
        raise UserError(f"mjlab task '{name}' {task.missing}")
    if observation != "state" and not task.cameras:
        seeing = ", ".join(each for each, facts in TASKS.items() if facts.cameras)
        raise UserError(f"mjlab task '{name}' has no RGB camera for observation '{observation}'; those with: {seeing}")
    if reward not in rewards(task):
        raise UserError(f"mjlab task '{name}' has no reward '{reward}'; it has: {', '.join(rewards(task))}")
    return task

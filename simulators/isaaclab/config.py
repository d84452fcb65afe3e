"""The configuration of an Isaac Lab simulator; importing it imports no simulator."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from embodied_rl.errors import UserError, unknown
from embodied_rl.simulators import interpreters
from embodied_rl.simulators.base import Demonstrator, Listing, ResetSchedule, Simulator
from embodied_rl.simulators.isaaclab import tasks as known
from embodied_rl.simulators.settings import OneTask, check_settings

_START_TIMEOUT = 1800.0
"""Seconds: the first start of a task on a machine compiles its kernels, minutes on a busy one."""
_TIMEOUT = 600.0
"""Seconds per chunk or reset: hundreds of images on a CPU take their time."""


@dataclass(frozen=True)
class IsaacLabConfig(OneTask):
    """Which Isaac Lab task to run, and how; `embodied-rl install isaaclab` makes the Python environment it runs in."""

    task: str = "Isaac-Reach-Franka"
    """A registered id; `tasks()` lists them. Those whose scene we ship run without NVIDIA's assets."""
    observation: Literal["state", "rgb", "state+rgb"] = "state"
    """"state": every number of the group `policy`, no cameras. "rgb": all cameras, and of `policy` what a robot knows
    without looking. "state+rgb": all cameras and all numbers. The group `critic`, where there is one, is privileged."""
    state: tuple[str, ...] | None = None
    """Instead of these: groups or terms that make up the state, e.g. ("policy.eef_pos", "policy.gripper_pos")."""
    reward: Literal["task", "success", "staged"] = "task"
    """"task": the task's own, where it has one. "success": 1 for success. "staged", for the stacking tasks: an equal
    share of 1 for reaching each of their subtasks, once, and for success."""
    num_envs: int = 16
    """Environments, stepped together within a worker."""
    workers: int = 1
    """Processes that share them."""
    device: str = "cpu"
    """Where a worker simulates: "cpu", or a CUDA device such as "cuda:0"."""
    physics: str = "newton_mjwarp"
    """One of the task's physics presets. Those other than Newton's need Isaac Sim and are untested."""
    image_size: int | None = None
    """Height and width of every camera, pixels; None is the task's own."""
    max_steps: int | None = None
    """Time limit in environment steps; None is the task's own."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UserError(f"Isaac Lab device '{self.device}' is neither 'cpu' nor a CUDA device such as 'cuda:0'")
        check_settings("Isaac Lab", self)

    @property
    def environment(self) -> tuple[str, dict[str, Any]]:
        """("module:class", JSON-able keyword arguments): how a worker constructs its environments, all at once."""
        kwargs = {name: value for name, value in asdict(self).items() if name not in ("num_envs", "workers")}
        return "embodied_rl.simulators.isaaclab.environment:IsaacLabEnvironment", kwargs

    def demonstrator(self) -> Demonstrator:
        """Raises `UserError`: there is none."""
        raise UserError(f"Isaac Lab task '{self.task}' has no scripted expert")

    def build(self, schedule: ResetSchedule, *, log_dir: Path | None = None) -> Simulator:
        """Start the simulator; its resets follow `schedule`, worker logs go to `log_dir`.

        The first start of a task compiles kernels into Warp's cache (WARP_CACHE_PATH). Raises `UserError` when Isaac
        Lab is not installed, and for an unknown task, missing assets, or a preset, camera or reward it does not have.
        """
        from embodied_rl.simulators.workers import WorkerSimulator

        python = interpreters.interpreter("isaaclab")
        if self.task not in (ids := known.registered()):
            raise unknown("Isaac Lab task", self.task, ids)
        target, kwargs = self.environment
        return WorkerSimulator(
            target,
            kwargs,
            self.num_envs,
            self.workers,
            schedule,
            log_dir=log_dir,
            python=python,
            timeout=_TIMEOUT,
            start_timeout=_START_TIMEOUT,
        )


def tasks() -> list[Listing]:
    """All tasks of the installed Isaac Lab (their ids are read, nothing is imported); ours when it is not installed."""
    return known.listings()

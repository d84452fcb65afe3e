"""The configuration of an mjlab simulator; importing it imports no simulator."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from embodied_rl.errors import UserError
from embodied_rl.simulators import interpreters
from embodied_rl.simulators.base import Demonstrator, Listing, ResetSchedule, Simulator
from embodied_rl.simulators.mjlab.tasks import TASKS, check, rewards
from embodied_rl.simulators.settings import OneTask, check_settings

_START_TIMEOUT = 900.0
"""Seconds: the first start of a task on a machine compiles its kernels, minutes on a busy one."""
_TIMEOUT = 600.0
"""Seconds per chunk or reset: hundreds of images on a CPU take their time."""


@dataclass(frozen=True)
class MjlabConfig(OneTask):
    """Which mjlab task to run, and how; `embodied-rl install mjlab` makes the Python environment it runs in."""

    task: str = "Mjlab-Lift-Cube-Yam"
    """One of mjlab's ids; `tasks()` lists them."""
    observation: Literal["state", "rgb", "state+rgb"] = "state"
    """"state": the task's `actor` group. "rgb": the same and its cameras. "state+rgb": its cameras and the `critic`
    group, which knows where things are. The critic's numbers are `privileged` in the first two."""
    reward: Literal["task", "success"] = "task"
    """"task": the task's own, dense. "success": 1 for every step at the goal, in tasks that define success."""
    num_envs: int = 16
    """Environments, stepped together within a worker."""
    workers: int = 1
    """Processes that share them."""
    device: str = "cpu"
    """Where a worker simulates: "cpu", or a CUDA device such as "cuda:0"."""
    image_size: int | None = None
    """Height and width of every camera, pixels; None is the task's own."""
    max_steps: int | None = None
    """Time limit in environment steps; None is the task's own."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UserError(f"mjlab device '{self.device}' is neither 'cpu' nor a CUDA device such as 'cuda:0'")
        check_settings("mjlab", self)

    @property
    def environment(self) -> tuple[str, dict[str, Any]]:
        """("module:class", JSON-able keyword arguments): how a worker constructs its environments, all at once."""
        kwargs = {name: value for name, value in asdict(self).items() if name not in ("num_envs", "workers")}
        return "embodied_rl.simulators.mjlab.environment:MjlabEnvironment", kwargs

    def demonstrator(self) -> Demonstrator:
        """Raises `UserError`: there is none."""
        raise UserError(f"mjlab task '{self.task}' has no scripted expert")

    def build(self, schedule: ResetSchedule, *, log_dir: Path | None = None) -> Simulator:
        """Start the simulator; its resets follow `schedule`, worker logs go to `log_dir`.

        The first start of a task compiles kernels into Warp's cache (WARP_CACHE_PATH). Raises `UserError` when mjlab is
        not installed, and for a task, camera or reward that it does not have.
        """
        from embodied_rl.simulators.workers import WorkerSimulator

        check(self.task, self.observation, self.reward)
        target, kwargs = self.environment
        return WorkerSimulator(
            target,
            kwargs,
            self.num_envs,
            self.workers,
            schedule,
            log_dir=log_dir,
            python=interpreters.interpreter("mjlab"),
            timeout=_TIMEOUT,
            start_timeout=_START_TIMEOUT,
        )


def tasks() -> list[Listing]:
    """All tasks of mjlab."""
    try:
        interpreters.interpreter("mjlab")
        absent = ""
    except UserError as error:
        absent = str(error)
    return [
        Listing(
            name,
            task.instruction,
            task.cameras,
            task.action_dim,
            task.max_steps,
            reward=", ".join(rewards(task)),
            missing=task.missing or absent,
        )
        for name, task in TASKS.items()
    ]

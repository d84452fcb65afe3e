"""The configuration of a LIBERO simulator; importing it imports no simulator."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from embodied_rl.errors import UserError
from embodied_rl.simulators.base import Demonstrator, Listing, ResetSchedule, Simulator
from embodied_rl.simulators.libero import assets, init_states, suites
from embodied_rl.simulators.settings import check_settings


@dataclass(frozen=True)
class LiberoConfig:
    """Which tasks of which LIBERO suite to run, and how. Raises `UserError` for whatever does not exist; `build` also
    for missing assets."""

    suite: str = "libero_spatial"
    """"libero_spatial", "libero_object", "libero_goal", "libero_10" (also called long), "libero_90", or "libero_130",
    which is all of them."""
    tasks: tuple[int, ...] = ()
    """Indices of tasks in the suite; empty for all. `InitialState.task` counts through these."""
    observation: Literal["state", "rgb", "state+rgb"] = "rgb"
    """"rgb": two cameras and the robot's own state. "state": that and where all objects are, nothing rendered; only for
    tasks with equally many objects. "state+rgb": both."""
    image_size: int = 256
    """Height and width of both cameras, pixels."""
    step_limits: str = "openvla"
    """Whose time limits (steps) for spatial, object, goal, 10, 90: "openvla" 220, 280, 300, 520, 400; "lerobot" 280,
    280, 300, 520, 400; "rlinf" 240, none, none, 512, 512 (an error where there is none); "simplevla" 512 for all."""
    max_steps: int | None = None
    """Time limit in environment steps for all tasks instead."""
    settle_steps: int = 10
    """Steps without motion after a reset, not counted: recorded objects hover or overlap a little. The field's 10."""
    reflections: bool = True
    """Whether the stove mirrors its surroundings. Without, scenes with a stove render in half the time, but the images
    are others: by 1.1 of 255 on average and up to 135 in the agentview. For training only, never for evaluation."""
    num_envs: int = 8
    """Environments stepped together."""
    workers: int = 2
    """Processes that share them. A process builds each task once for all its environments, in 1 to 2 seconds and
    100 to 400 MB."""
    built_tasks: int = 10
    """Tasks that a process keeps built; the one not used for longest goes first."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        count = len(suites.suite_tasks(self.suite))
        wrong = [index for index in self.tasks if not 0 <= index < count]
        if wrong or len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"LIBERO tasks must be different numbers from 0 to {count - 1}, not {list(self.tasks)}")
        check_settings("LIBERO", self, "built_tasks")
        if self.settle_steps < 0:
            raise UserError(f"LIBERO settle_steps is {self.settle_steps}; it must be at least 0")
        self.limits  # noqa: B018 - raises where there is none

    @property
    def chosen(self) -> tuple[suites.Task, ...]:
        """The tasks that `InitialState.task` indexes."""
        every = suites.suite_tasks(self.suite)
        return tuple(every[index] for index in self.tasks or range(len(every)))

    @property
    def limits(self) -> tuple[int, ...]:
        """Their time limits, environment steps."""
        if self.max_steps is not None:
            return (self.max_steps,) * len(self.chosen)
        return tuple(suites.step_limit(self.step_limits, self.suite, task) for task in self.chosen)

    @property
    def environment(self) -> tuple[str, dict[str, Any]]:
        """("module:class", JSON-able keyword arguments): how a worker constructs each of its environments."""
        kwargs = {name: value for name, value in asdict(self).items() if name not in ("num_envs", "workers")}
        return "embodied_rl.simulators.libero.environment:LiberoEnvironment", kwargs

    @property
    def num_tasks(self) -> int:
        """Tasks that `InitialState.task` indexes."""
        return len(self.chosen)

    @property
    def num_states(self) -> int:
        """Recorded initial states that every chosen task has: 50 in all files of hf-libero 0.1.4."""
        return min(len(init_states.read(task.init_states)) for task in self.chosen)

    def demonstrator(self) -> Demonstrator:
        """LIBERO has none: raises `UserError`."""
        raise UserError("LIBERO has no scripted expert; its demonstrations are data sets")

    def build(self, schedule: ResetSchedule, *, log_dir: Path | None = None) -> Simulator:
        """Start the simulator; its resets follow `schedule`, worker logs go to `log_dir`. Raises `UserError` without
        LIBERO or the tasks' assets, or when the observation asks for object states of tasks that differ in size."""
        from embodied_rl.simulators.workers import WorkerSimulator

        for task in self.chosen:
            assets.check(task)
        if self.observation != "rgb":
            self._check_equal_states()
        target, kwargs = self.environment
        return WorkerSimulator(target, kwargs, self.num_envs, self.workers, schedule, log_dir=log_dir)

    def _check_equal_states(self) -> None:
        first = self.chosen[0]
        for task in self.chosen[1:]:
            sizes = [(len(suites.contents(t)), init_states.read(t.init_states).shape[1]) for t in (first, task)]
            if sizes[0] != sizes[1]:
                raise UserError(
                    f"LIBERO observation '{self.observation}' needs tasks with equally many objects and joints; "
                    f"'{first.name}' and '{task.name}' differ: use 'rgb', or choose other tasks"
                )


def tasks() -> list[Listing]:
    """All 130 tasks, named "suite/task". Reads LIBERO's files, imports nothing of it."""
    found = []
    for task in suites.suite_tasks("libero_130"):
        limit = suites.step_limit("openvla", task.suite, task)
        name = f"{task.suite}/{task.name}"
        found.append(Listing(name, task.instruction, suites.CAMERAS, 7, limit, "sparse", _missing(task)))
    return found


def _missing(task: suites.Task) -> str:
    try:
        assets.check(task)
    except UserError as error:
        return str(error)
    return ""

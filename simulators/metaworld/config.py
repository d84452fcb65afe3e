"""The configuration of a MetaWorld simulator; importing it imports no simulator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from embodied_rl.errors import UserError, unknown
from embodied_rl.simulators.base import Demonstrator, Listing, ResetSchedule, Simulator
from embodied_rl.simulators.metaworld.instructions import BENCHMARKS, INSTRUCTIONS
from embodied_rl.simulators.settings import check_settings


@dataclass(frozen=True)
class MetaWorldConfig:
    """Which MetaWorld tasks to run, and how. `build` raises `UserError` for whatever cannot be run."""

    tasks: tuple[str, ...] = ("reach-v3",)
    """Task names, e.g. "reach-v3", and benchmarks "MT10", "MT25", "MT50", which stand for their tasks."""
    observation: Literal["state", "rgb", "state+rgb"] = "state"
    """"state": MetaWorld's 39 numbers, the goal included. "rgb": one camera, the hand's position and the gripper's
    opening. "state+rgb": the camera and all 39 numbers."""
    reward: Literal["dense", "sparse"] = "dense"
    """"dense": MetaWorld's own, in [0, 10]. "sparse": 1 where the task is solved, else 0."""
    placements: Literal["recorded", "random"] = "recorded"
    """Where objects and goals are: "recorded" takes one of the 50 places per task of `metaworld.MT1(task, seed=42)`,
    "random" draws a new one from each episode's seed."""
    end_on_success: bool = True
    """End an episode when the task is solved; otherwise it goes on to the time limit, as in MetaWorld's benchmarks."""
    max_steps: int = 500
    """Time limit in environment steps; 500 in MetaWorld."""
    image_size: int = 224
    """Height and width of the camera's image, pixels."""
    rendering: Literal["full", "plain"] = "full"
    """"plain" leaves out shadows, reflections and antialiasing: a tenth of the time in software rendering, but not what
    others see."""
    num_envs: int = 16
    """Environments stepped together."""
    workers: int = 2
    """Processes that share them."""

    def __post_init__(self) -> None:
        for name in self.tasks:
            if name not in INSTRUCTIONS and name not in BENCHMARKS:
                raise unknown("MetaWorld task", name, [*INSTRUCTIONS, *BENCHMARKS])
        if not self.names:
            raise UserError("MetaWorld tasks is empty; name at least one")
        check_settings("MetaWorld", self)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks that `InitialState.task` indexes: benchmarks spelled out, each task once."""
        return tuple(dict.fromkeys(task for name in self.tasks for task in BENCHMARKS.get(name, (name,))))

    @property
    def environment(self) -> tuple[str, dict[str, Any]]:
        """("module:class", JSON-able keyword arguments): how a worker constructs an environment."""
        kwargs: dict[str, Any] = {"tasks": list(self.names)}
        for name in ("observation", "reward", "end_on_success", "max_steps", "image_size", "rendering"):
            kwargs[name] = getattr(self, name)
        return "embodied_rl.simulators.metaworld.environment:MetaWorldEnvironment", kwargs

    @property
    def num_tasks(self) -> int:
        return len(self.names)

    @property
    def num_states(self) -> int:
        """50 recorded places of each task, or 0 when every episode draws its own."""
        return 50 if self.placements == "recorded" else 0

    def demonstrator(self) -> Demonstrator:
        """MetaWorld's scripted experts, which need all 39 numbers: raises `UserError` for "rgb"."""
        if self.observation == "rgb":
            raise UserError("MetaWorld's scripted experts need the full state: use observation 'state' or 'state+rgb'")
        from embodied_rl.simulators.metaworld.demonstrator import ScriptedMetaWorld

        return ScriptedMetaWorld(self.names, self.num_envs)

    def build(self, schedule: ResetSchedule, *, log_dir: Path | None = None) -> Simulator:
        """Start the simulator; its resets follow `schedule`, worker logs go to `log_dir`."""
        from embodied_rl.simulators.workers import WorkerSimulator

        target, kwargs = self.environment
        return WorkerSimulator(target, kwargs, self.num_envs, self.workers, schedule, log_dir=log_dir)


def tasks() -> list[Listing]:
    """MetaWorld's 50 tasks. Imports nothing."""
    from importlib.util import find_spec

    missing = "" if find_spec("metaworld") else "metaworld is not installed: pip install metaworld==3.0.0"
    return [
        Listing(name, words, ("corner2",), 4, 500, "dense, sparse", missing) for name, words in INSTRUCTIONS.items()
    ]

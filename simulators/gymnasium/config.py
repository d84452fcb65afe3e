"""The configuration of a Gymnasium simulator; importing it imports no simulator."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from embodied_rl.errors import UserError
from embodied_rl.simulators.base import Demonstrator, Listing, ResetSchedule, Simulator
from embodied_rl.simulators.settings import OneTask, check_settings


@dataclass(frozen=True)
class GymnasiumConfig(OneTask):
    """Which Gymnasium environment to run, and how. `build` raises `UserError` for whatever cannot be run."""

    task: str = "CartPole-v1"
    """A registered id, e.g. "HalfCheetah-v5", or "package.module:id" for one that importing the module registers."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """What its constructor takes besides, plain JSON values, e.g. {"xml_file": "my_cheetah.xml"}."""
    observation: Literal["state", "rgb", "state+rgb"] = "state"
    """"state": its own observation, a Box or a Dict of Boxes, flattened. "rgb": its rendered frames as camera "render",
    no state. "state+rgb": both."""
    max_steps: int | None = None
    """Time limit in environment steps; None is the registered one."""
    num_envs: int = 8
    """Environments stepped together."""
    workers: int | None = 2
    """Processes that share them; none = the environments are in the learner's process, which on one core is faster, but
    does not outlive their crashes."""

    def __post_init__(self) -> None:
        check_settings("Gymnasium", self)

    @property
    def environment(self) -> tuple[str, dict[str, Any]]:
        """("module:class", JSON-able keyword arguments): how a worker constructs an environment."""
        kwargs = {name: getattr(self, name) for name in ("task", "kwargs", "observation", "max_steps")}
        return "embodied_rl.simulators.gymnasium.environment:GymnasiumEnvironment", kwargs

    def demonstrator(self) -> Demonstrator:
        """A proportional controller for FetchReach; raises `UserError` for every other task and without a state."""
        if not self.task.startswith("FetchReach"):
            raise UserError(f"Gymnasium task '{self.task}' has no scripted demonstrator; FetchReach has one")
        if self.observation == "rgb":
            raise UserError("FetchReach's demonstrator needs the state: use observation 'state' or 'state+rgb'")
        from embodied_rl.simulators.gymnasium.demonstrator import ScriptedFetchReach

        return ScriptedFetchReach()

    def build(self, schedule: ResetSchedule, *, log_dir: Path | None = None) -> Simulator:
        """Start the simulator; its resets follow `schedule`, worker logs go to `log_dir`.

        Raises `UserError` for an unknown id, a missing package, or spaces that are not supported.
        """
        from embodied_rl.simulators.workers import WorkerSimulator

        target, kwargs = self.environment
        return WorkerSimulator(target, kwargs, self.num_envs, self.workers, schedule, log_dir=log_dir)


def tasks() -> list[Listing]:
    """All registered ids. Imports Gymnasium and the packages that register with it, but builds nothing."""
    from importlib.util import find_spec

    if not find_spec("gymnasium"):
        return []
    from embodied_rl.simulators.gymnasium import registered

    return registered.listings()

"""The configuration of a ManiSkill3 simulator; importing it imports no simulator."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import embodied_rl
from embodied_rl.errors import UserError
from embodied_rl.simulators.base import Demonstrator, Listing, ResetSchedule, Simulator
from embodied_rl.simulators.maniskill.physics import Physics
from embodied_rl.simulators.settings import OneTask, check_settings


@dataclass(frozen=True)
class ManiSkillConfig(OneTask):
    """Which ManiSkill3 task to run, and how. `build` raises `UserError` for whatever cannot be run."""

    task: str = "PickCube-v1"
    """A registered ManiSkill id; `tasks()` lists them."""
    control_mode: str | None = None
    """A controller of the task's robot, e.g. "pd_ee_delta_pos"; None is the robot's first."""
    observation: Literal["state", "rgb", "state+rgb"] = "state"
    """"state": every number the task offers, object poses included, no renderer needed. "rgb": all cameras, and the
    robot's own state (plus what the task adds without looking). "state+rgb": all cameras and the full state."""
    reward: Literal["sparse", "normalized_dense", "dense", "none"] = "sparse"
    """"sparse": 1 on success, -1 on failure. "dense" and "normalized_dense" are shaped by the task's authors."""
    num_envs: int = 16
    """Environments stepped together."""
    workers: int = 2
    """Processes that share them; not used on the GPU."""
    backend: Literal["cpu", "gpu"] = "cpu"
    """PhysX on the CPU, one scene per environment, or all environments in one GPU scene (needs CUDA)."""
    image_size: int = 128
    """Height and width of every camera, pixels."""
    max_steps: int | None = None
    """Time limit in environment steps; None is the task's registered one."""
    physics: Physics = field(default_factory=Physics)
    """A variant of the task's physics, on the CPU."""
    rebuild: bool = False
    """Build the scene anew at every reset, on the CPU: then an episode never depends on those before it, not even where
    PhysX remembers them. A reset takes about 35 ms longer, and environments of one process step one by one."""

    def __post_init__(self) -> None:
        check_settings("ManiSkill", self)
        if self.backend == "gpu" and self.physics != Physics():
            raise UserError("ManiSkill physics can be varied on backend 'cpu' only")
        if self.backend == "gpu" and self.rebuild:
            raise UserError("ManiSkill scenes are rebuilt at every reset on backend 'cpu' only: leave rebuild false")

    @property
    def environment(self) -> tuple[str, dict[str, Any]]:
        """("module:class", JSON-able keyword arguments): how a worker constructs its environments, all at once."""
        skip = ("num_envs", "workers", "backend")
        kwargs = {name: value for name, value in asdict(self).items() if name not in skip}
        return "embodied_rl.simulators.maniskill.rows:ManiSkillRows", kwargs

    def demonstrator(self) -> Demonstrator:
        """The scripted expert; raises `UserError` for a task or controller without one."""
        from embodied_rl.simulators.maniskill.demonstrator import ScriptedPickCube

        return ScriptedPickCube(self.task, self.control_mode or "", self.num_envs)

    def build(self, schedule: ResetSchedule, *, log_dir: Path | None = None) -> Simulator:
        """Start the simulator; its resets follow `schedule`, worker logs go to `log_dir`.

        Raises `UserError` for an unknown task, missing assets, or a control or reward mode the task does not have.
        """
        target, kwargs = self.environment
        if self.backend == "gpu":
            from embodied_rl.simulators.chunk import BatchedSimulator
            from embodied_rl.simulators.maniskill.batched import ManiSkillBatchedEnvironment

            del kwargs["physics"], kwargs["rebuild"]
            return BatchedSimulator(ManiSkillBatchedEnvironment(num_envs=self.num_envs, **kwargs), schedule)
        from embodied_rl.simulators.workers import WorkerSimulator

        return WorkerSimulator(target, kwargs, self.num_envs, self.workers, schedule, log_dir=log_dir)


def tasks() -> list[Listing]:
    """Every task of the pinned ManiSkill with its default robot, as `scripts/describe_maniskill_tasks.py` found them.

    Tasks that another package registers are not in it.
    """
    table = json.loads((Path(embodied_rl.__file__).parent / "assets" / "maniskill_tasks.json").read_text())
    data = Path(os.environ.get("MS_ASSET_DIR") or Path.home() / ".maniskill") / "data"
    listings = []
    for name, facts in table.items():
        downloaded = facts["assets"] and all((data / path).exists() for path in facts["assets"])
        listings.append(
            Listing(
                name=name,
                instruction=instruction(name),
                cameras=None if facts["cameras"] is None else tuple(facts["cameras"]),
                action_dim=facts["action_dim"],
                max_steps=facts["max_steps"],
                reward=", ".join(reward for reward in facts["rewards"] if reward != "none") or "none",
                missing="" if downloaded else facts["problem"],
            )
        )
    return listings


def instruction(task: str) -> str:
    """The task in words: ManiSkill's tasks carry no language, so the id is spelled out ("PickCube-v1": "pick cube")."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+|[a-z]+|\d+", re.sub(r"-v\d+$", "", task))
    return " ".join(words).lower()

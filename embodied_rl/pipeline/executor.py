"""Where a run's environments are and who collects in them: this process, or Ray actors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from embodied_rl.config import PipelineConfig
from embodied_rl.pipeline import env_groups
from embodied_rl.pipeline.rollout import Intervene, Result, RolloutWorker
from embodied_rl.pipeline.tickets import TicketCounter
from embodied_rl.policies.base import Policy
from embodied_rl.simulators.base import ResetSchedule
from embodied_rl.specs import Connection
from embodied_rl.types import EpisodeBatch, Trajectory


class Collector(Protocol):
    """What on-policy workflows and runs ask of rollout workers; `RolloutWorker` says what it means."""

    simulator: Any
    """`num_envs`, `tasks` and specs of the environments, and the `deaths` there were."""
    policy: Any
    intervene: Intervene | None
    check: Callable[[], object]
    env_steps: int
    lost_episodes: int

    def restart(self, tickets: TicketCounter) -> None: ...

    def collect(self, decisions: int, version: int) -> Trajectory: ...

    def collect_episodes(self, tickets: range, version: int) -> EpisodeBatch: ...

    def apart(
        self, policy: Policy, function: Callable[[RolloutWorker, range], Result], tickets: range
    ) -> list[Result]: ...


def start(simulator: Any, pipeline: PipelineConfig, schedule: ResetSchedule, log_dir: Path | None = None) -> Any:
    """The environments of `simulator`, a context manager. Raises `UserError` for what cannot be run."""
    if pipeline.executor == "ray":
        from embodied_rl.pipeline.ray_actors import RolloutActors

        return RolloutActors(simulator, pipeline, schedule, log_dir)
    return env_groups.build_simulator(simulator, pipeline.env_groups, schedule, log_dir)


def collector(simulator: Any, policy: Any, connection: Connection, seed: int) -> Collector:
    """Who collects in what `start` gave."""
    from embodied_rl.pipeline.ray_actors import RolloutActors

    if isinstance(simulator, RolloutActors):
        from embodied_rl.pipeline.ray_rollouts import RayRolloutWorker

        return RayRolloutWorker(simulator, policy, connection, seed)
    return env_groups.rollout_worker(simulator, policy, connection, seed)

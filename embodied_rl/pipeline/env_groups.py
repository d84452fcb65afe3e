"""Double buffering: environments in groups, each a simulator of its own, so that while the policy decides for one the
others are stepped.

Nothing is collected that one group of all would not have collected: every row has its own tickets, and the noise of a
decision belongs to its ticket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embodied_rl.errors import UserError
from embodied_rl.pipeline.rollout import RolloutWorker
from embodied_rl.pipeline.tickets import Tickets
from embodied_rl.policies.base import Policy
from embodied_rl.simulators.base import ResetSchedule, Simulator
from embodied_rl.simulators.chunk import BatchedSimulator, check_reset, check_send
from embodied_rl.specs import Connection
from embodied_rl.types import ChunkResult, EpisodeBatch, Observation, Trajectory


class EnvGroups(Simulator):
    """Simulators of one kind as one: its rows are theirs, in order. What takes time in each is done in all at once."""

    def __init__(self, groups: Sequence[Simulator]) -> None:
        first = groups[0]
        self.groups = tuple(groups)
        self.observation_spec, self.action_spec, self.tasks = first.observation_spec, first.action_spec, first.tasks
        bounds = accumulate([group.num_envs for group in groups], initial=0)
        self.rows = [slice(start, stop) for start, stop in pairwise(bounds)]
        """Which are whose."""
        self.num_envs = self.rows[-1].stop
        self._threads = ThreadPoolExecutor(len(groups), "env-group")

    @property
    def deaths(self) -> int:  # type: ignore[override]
        return sum(group.deaths for group in self.groups)

    def reset(self, env_ids: np.ndarray | None = None, tickets: np.ndarray | None = None) -> Observation:
        rows, tickets, _ = check_reset(self.num_envs, env_ids, tickets)
        whose = [np.flatnonzero((own.start <= rows) & (rows < own.stop)) for own in self.rows]

        def reset(group: Simulator, own: slice, which: np.ndarray) -> Observation | None:
            return group.reset(rows[which] - own.start, tickets[which]) if len(which) else None

        parts = [part for part in self._threads.map(reset, self.groups, self.rows, whose) if part is not None]
        return Observation.concatenate(parts).rows(np.argsort(np.concatenate(whose)))

    def send(
        self, actions: np.ndarray, observe: Literal["last", "all"] = "last", next_tickets: np.ndarray | None = None
    ) -> None:
        actions, tickets = check_send(self.num_envs, self.action_spec.dim, actions, next_tickets)
        for group, rows in zip(self.groups, self.rows, strict=True):
            group.send(actions[rows], observe, tickets[rows])

    def receive(self) -> ChunkResult:
        results = [group.receive() for group in self.groups]
        starts = [rows.start for rows in self.rows]

        def join(name: str) -> np.ndarray:
            return np.concatenate([getattr(result, name) for result in results])

        finals = [result.final_observation for result in results if result.final_observation is not None]
        every = [result.intermediate for result in results if result.intermediate is not None]
        return ChunkResult(
            observation=Observation.concatenate([result.observation for result in results]),
            reward=join("reward"),
            terminated=join("terminated"),
            truncated=join("truncated"),
            valid=join("valid"),
            success=None if results[0].success is None else join("success"),
            final_rows=np.concatenate([start + r.final_rows for start, r in zip(starts, results, strict=True)]),
            final_observation=Observation.concatenate(finals) if finals else None,
            episodes=[
                replace(episode, env_id=start + episode.env_id)
                for start, result in zip(starts, results, strict=True)
                for episode in result.episodes
            ],
            tickets=join("tickets"),
            lost=join("lost"),
            intermediate=[Observation.concatenate(at) for at in zip(*every, strict=True)] if every else None,
        )

    def close(self) -> None:
        self._threads.shutdown()
        for group in self.groups:
            group.close()


def build_simulator(config: Any, groups: int, schedule: ResetSchedule, log_dir: Path | None = None) -> Simulator:
    """The simulator of `config`, its environments and processes dealt out to `groups`. Raises `UserError` when it is
    not stepped in so many processes of its own."""
    if groups == 1:
        return config.build(schedule, log_dir=log_dir)
    if min(config.num_envs, getattr(config, "workers", None) or 0) < groups:
        raise UserError(
            f"pipeline.env_groups {groups} needs as many environments and processes of the simulator: set "
            f"simulator.num_envs and simulator.workers to at least {groups}, or pipeline.env_groups to 1"
        )
    each = deal_out(config, groups)

    def start_one(index: int) -> Simulator:
        return each[index].build(schedule, log_dir=log_dir and log_dir / f"group-{index}")

    with ThreadPoolExecutor(groups) as threads:
        starts = [threads.submit(start_one, index) for index in range(groups)]
    with ExitStack() as started:  # closed again when one of them failed
        built = [started.enter_context(start.result()) for start in starts if not start.exception()]
        for start in starts:
            start.result()
        if any(isinstance(simulator, BatchedSimulator) for simulator in built):
            raise UserError("pipeline.env_groups must be 1: this simulator steps in the learner's process")
        started.pop_all()
    return EnvGroups(built)


def deal_out(config: Any, parts: int) -> list[Any]:
    """`config` as `parts` with their shares, as equal as can be, of its environments and of its processes."""
    workers = getattr(config, "workers", None)
    if workers is None:
        return [replace(config, num_envs=envs) for envs in _deal(config.num_envs, parts)]
    return [
        replace(config, num_envs=envs, workers=max(1, min(share, envs)))
        for envs, share in zip(_deal(config.num_envs, parts), _deal(workers, parts), strict=True)
    ]


def _deal(count: int, parts: int) -> list[int]:
    """`count` in `parts` equal ones, or nearly so."""
    return [count * (i + 1) // parts - count * i // parts for i in range(parts)]


class GroupedRolloutWorker(RolloutWorker):
    """A rollout worker whose collections take the groups of its simulator in turn. `begin` and `finish` act in all of
    them at once; `restart` before a collection that follows."""

    def __init__(self, simulator: EnvGroups, policy: Policy, connection: Connection, seed: int) -> None:
        super().__init__(simulator, policy, connection, seed)
        self._groups = [RolloutWorker(group, policy, connection, seed) for group in simulator.groups]
        # Every group waits for whatever is done between two decisions; one alone is stepped meanwhile.
        self._beside = ThreadPoolExecutor(1, "segment")

    @property
    def groups(self) -> Sequence[RolloutWorker]:
        return self._groups

    def restart(self, tickets: Tickets) -> None:
        super().restart(tickets)
        for group, rows in self._rows():
            group.take_over(self, rows)

    def collect(self, decisions: int, version: int) -> Trajectory:
        with self._counted():
            return super().collect(decisions, version)

    def collect_episodes(self, tickets: range, version: int) -> EpisodeBatch:
        with self._counted():
            return super().collect_episodes(tickets, version)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """The groups act by this worker's policy, and what they count it counts."""
        before = self.env_steps
        for group in self._groups:
            group.policy, group.env_steps, group.lost_episodes = self.policy, before, 0
        try:
            yield
        finally:
            self.env_steps += sum(group.env_steps - before for group in self._groups)
            self.lost_episodes += sum(group.lost_episodes for group in self._groups)


def rollout_worker(simulator: Simulator, policy: Policy, connection: Connection, seed: int) -> RolloutWorker:
    """The one that fits `simulator`."""
    if isinstance(simulator, EnvGroups):
        return GroupedRolloutWorker(simulator, policy, connection, seed)
    return RolloutWorker(simulator, policy, connection, seed)

"""A rollout worker whose environments, and replicas of whose policy, are in Ray actors.

One call per worker and segment: out goes a reference to the weights, unless the worker has them, back comes a reference
to the segment. Observations stay where they are until the segment that holds them is done.

A worker that dies is replaced and collects its rows of the segment again, in the same weights, with tickets beyond
those of the last segment that was handed over; what it collected before is nowhere. So every segment is whole and is
handed over once; lost are the episodes that ran when it died. Where there is no place for another worker, the rows are
dealt out anew to those that are left, and all of them collect the segment again in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

from embodied_rl.pipeline.episodes import in_order
from embodied_rl.pipeline.ray_actors import DealtOut, RolloutActors
from embodied_rl.pipeline.rollout import Intervene, Result, RolloutWorker
from embodied_rl.pipeline.rollout_actor import Order, Reply, Versioned
from embodied_rl.pipeline.segment import Memory
from embodied_rl.pipeline.tickets import RowTickets, TicketCounter
from embodied_rl.pipeline.transfer import Packed, side_by_side, unpack
from embodied_rl.pipeline.weights import Structure, bucket, frozen
from embodied_rl.policies.base import Policy
from embodied_rl.specs import Connection
from embodied_rl.types import EpisodeBatch, Trajectory

_NUMBERS = count(1)
"""Of versions, so that none is ever taken for another."""


class RayRolloutWorker:
    """Collects as `RolloutWorker` does; the same tickets and weights give the same batches."""

    def __init__(self, simulator: RolloutActors, policy: Policy, connection: Connection, seed: int) -> None:
        self.simulator = simulator
        self.policy = policy
        self.connection = connection
        self.seed = seed
        self.intervene: Intervene | None = None
        self.env_steps = 0
        """Valid environment steps so far."""
        self.lost_episodes = 0
        self.check: Callable[[], object] = lambda: None
        """Called several times a second while a batch is collected, which ends when this raises."""
        self._memory = Memory()
        self._sources: list[RowTickets] = []
        self._fresh: set[int] = set()
        """Workers whose rows begin anew."""
        self._outgoing = Outgoing(connection, seed)

    def restart(self, tickets: TicketCounter) -> None:
        """Abandon what runs and start fresh episodes in every row, with tickets from `tickets`."""
        self._sources = tickets.rows(self.simulator.num_envs)
        self._fresh = set(self.simulator.rows)

    def collect(self, decisions: int, version: int) -> Trajectory:
        """See `RolloutWorker.collect`."""
        replies = self._ask("collect", lambda _: (decisions, version), self.policy, version)
        for reply in replies:
            rows = self.simulator.rows[reply.worker]
            for mine, theirs in zip(self._sources[rows], reply.sources or (), strict=True):
                vars(mine).update(vars(theirs))
        self._fresh.clear()
        parts = [self._batch(reply) for reply in replies]
        return side_by_side(parts, self._memory, self.policy.device)

    def collect_episodes(self, tickets: range, version: int) -> EpisodeBatch:
        """See `RolloutWorker.collect_episodes`."""
        replies = self._ask("collect_episodes", self._share(tickets, lambda its: (its, version)), self.policy, version)
        return in_order([self._batch(reply) for reply in replies])

    def apart(self, policy: Policy, function: Callable[[RolloutWorker, range], Result], tickets: range) -> list[Result]:
        """See `RolloutWorker.apart`; `function` runs where the environments are."""
        replies = self._ask("apart", self._share(tickets, lambda its: (function, its)), policy, None)
        return [result for reply in replies for result in reply.result]

    def _ask(
        self, method: str, arguments: Callable[[int], tuple[Any, ...] | None], policy: Policy, version: int | None
    ) -> list[Reply]:
        """Let every worker do `method` with the `arguments` of its index, or nothing for None, by the weights of
        `policy`; None is the version of weights that may change any time."""
        structure, weights = self._outgoing.of(policy, version)

        def order(index: int) -> Order | None:
            if (its := arguments(index)) is None:
                return None
            begins = method == "collect" and index in self._fresh
            self._fresh.add(index)  # who is asked a second time is a new worker
            sources = self._sources[self.simulator.rows[index]] if begins else None
            return Order(structure, weights, method, its, sources)

        lost = self.simulator.lost_episodes
        while True:
            try:
                replies = self.simulator.ask(order, self.check)
                break
            except DealtOut:
                self._fresh = set(self.simulator.rows)
        self.env_steps += sum(reply.env_steps for reply in replies)
        self.lost_episodes += sum(reply.lost_episodes for reply in replies) + self.simulator.lost_episodes - lost
        return replies

    def _share(
        self, tickets: range, arguments: Callable[[range], tuple[Any, ...]]
    ) -> Callable[[int], tuple[Any, ...] | None]:
        """The `arguments` of a worker, by its index, of its share of the tickets, if it gets any. Any share would do,
        because what a ticket gives does not depend on who runs it."""

        def its(index: int) -> tuple[Any, ...] | None:
            workers = list(self.simulator.rows)
            share = tickets[workers.index(index) :: len(workers)]
            return arguments(share) if share else None

        return its

    def _batch(self, reply: Reply) -> Any:
        first = self.simulator.rows[reply.worker].start
        episodes = [replace(episode, env_id=first + episode.env_id) for episode in reply.result.episodes]
        return replace(unpack(reply.result), episodes=episodes)


class Outgoing:
    """What replicas need of a policy, put once for all of them."""

    def __init__(self, connection: Connection, seed: int) -> None:
        self._master = next(_NUMBERS)
        self._besides = connection, seed
        self._policy: Policy | None = None
        self._version: int | None = None
        self._still: list[tuple[int, int]] | None = None
        self._frozen: Any = None
        self._structure = self._weights = Versioned(0, [])

    def of(self, policy: Policy, version: int | None) -> tuple[Versioned, Versioned]:
        """(structure, weights): see `Order`. The weights of a version are read once."""
        import ray

        still = [(tensor.data_ptr(), tensor._version) for tensor in frozen(policy)]
        known = policy is self._policy and still == self._still
        if still != self._still or self._frozen is None:
            self._frozen = ray.put([Packed.of(tensor) for tensor in frozen(policy)])
        if not known:
            structure = ray.put((self._master, Structure(policy), *self._besides))
            self._structure = Versioned(next(_NUMBERS), [structure, self._frozen])
        if not known or version is None or version != self._version:
            self._weights = Versioned(next(_NUMBERS), [ray.put(bucket(policy))])
        self._policy, self._version, self._still = policy, version, still
        return self._structure, self._weights

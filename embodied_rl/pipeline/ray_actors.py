"""Rollout workers as Ray actors, supervised: one that dies or hangs is replaced, what it was asked for is asked again,
and nothing that it had begun is ever seen. Where there is no place for it any more, the others share its environments.

Ray itself retries nothing: a call that it repeated would run in a fresh simulator without a word.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Any

from embodied_rl.config import PipelineConfig
from embodied_rl.errors import SimulatorDied, UserError
from embodied_rl.pipeline import ray_cluster
from embodied_rl.pipeline.env_groups import deal_out
from embodied_rl.pipeline.ray_actor import START, Actor, get
from embodied_rl.pipeline.rollout_actor import Order, Reply
from embodied_rl.simulators.base import ResetSchedule
from embodied_rl.simulators.worker import Specs

MAX_DEATHS = 3
"""Of rollout workers in a run, on nodes that are still there."""
LONGEST = 600.0
"""Seconds without a chunk after which a rollout worker is taken for stuck."""
ROOM = 15.0
"""Seconds that a place for a worker that was lost with its own is waited for."""
_TICK = 0.2
"""Seconds between looks at anything but the result that is waited for."""


class DealtOut(Exception):
    """There are fewer workers than there were, with other environments: ask again, all begin anew."""


class _NoPlace(Exception):
    """For a worker that died."""


class RolloutActors:
    """Actors with their shares of the environments; says of them what a simulator says of itself."""

    def __init__(
        self, simulator: Any, pipeline: PipelineConfig, schedule: ResetSchedule, log_dir: Path | None = None
    ) -> None:
        """Raises `UserError` for what cannot be placed or started, `SimulatorDied` when one dies while it starts."""
        self.num_envs = simulator.num_envs
        self.lost_episodes = 0
        """Those that ran in rollout workers that died, and those that were given up because of it."""
        self._simulator = simulator
        self._pipeline = pipeline
        self._need = pipeline.rollout_cpus, pipeline.rollout_gpus
        self._schedule = schedule
        self._log_dir = log_dir
        self._orders = count(1)
        self._died = self._failures = 0
        self._buried = 0
        """Deaths of simulator processes that nobody has any more."""
        self._actors: list[Actor] = []
        self._coming: list[Actor] = []
        self._asked = 0.0
        """When those who are coming were asked for."""
        wanted = pipeline.rollout_workers
        self._shares(wanted)
        with ExitStack() as started:
            started.enter_context(ray_cluster.cluster(pipeline.ray_address))
            started.callback(self._release)
            if pipeline.elastic:
                wanted = max(1, min(wanted, self.room))
            for place in ray_cluster.reserve(wanted, *self._need):
                self._actors.append(self._new(place))
            for actor, share in zip(self._actors, self._shares(wanted), strict=True):
                actor.start(share)
            specs = [self._first(actor) for actor in self._actors]
            if any(each != specs[0] for each in specs):
                raise UserError("the simulator has different specs in different rollout workers")
            self._resources = started.pop_all()
        self.observation_spec, self.action_spec, self.tasks = specs[0].observation, specs[0].action, specs[0].tasks

    @property
    def rows(self) -> dict[int, slice]:
        """Which environments are whose, in their order."""
        return {actor.index: actor.rows for actor in self._actors}

    @property
    def pids(self) -> list[int]:
        """Process ids of the rollout workers that run now."""
        return [actor.pid for actor in self._actors]

    @property
    def nodes(self) -> list[str]:
        """Ids of the Ray nodes that they run on."""
        return [actor.node for actor in self._actors]

    @property
    def deaths(self) -> int:
        """Of rollout workers and of processes of their simulators."""
        return self._died + self._buried + sum(actor.deaths for actor in self._actors)

    @property
    def room(self) -> int:
        """How many rollout workers the cluster could hold if nobody else were there."""
        return ray_cluster.capacity(*self._need)

    def ask(self, order: Callable[[int], Order | None], check: Callable[[], object]) -> list[Reply]:
        """What the workers answer to `order(index)`, in the order of their rows; those whose order is None are left
        out.

        One that dies is replaced and gets the order of that moment. Raises what an order raised in a worker, what
        `check` raises while it is waited for, `SimulatorDied` after more than `MAX_DEATHS` deaths, and `DealtOut` when
        there was no place for one that died.
        """
        import ray
        from ray.exceptions import RayError

        replies: dict[int, Reply] = {}
        pending: dict[Any, tuple[Actor, Order]] = {}

        def send(actor: Actor) -> None:
            if (its := order(actor.index)) is not None:
                its.sequence = next(self._orders)
                pending[actor.run(its)] = actor, its

        for actor in self._actors:
            send(actor)
        while pending:
            ready, _ = ray.wait(list(pending), timeout=_TICK)
            check()
            for reference in ready:
                actor, its = pending.pop(reference)
                try:
                    reply = get(reference)
                except RayError as error:
                    self._mourn(actor, error)
                    send(actor)
                    continue
                if (reply.worker, reply.epoch, reply.sequence) != (actor.index, actor.epoch, its.sequence):
                    raise RuntimeError(f"{actor.name} answered another order than was given: {reply}")
                actor.deaths = reply.deaths
                replies[actor.index] = reply
            for actor, _ in pending.values():
                actor.look_after(LONGEST)
        return [replies[actor.index] for actor in self._actors if actor.index in replies]

    def prepare(self, workers: int) -> bool:
        """Whether all is there for `scale(workers)`; begins to get what is not, beside what goes on. Raises `UserError`
        for what cannot be placed or started, `SimulatorDied` for who dies while it starts; nothing is left of it."""
        from ray.exceptions import RayError

        shares = self._shares(workers)
        missing = max(0, workers - len(self._actors))
        try:
            if len(self._coming) != missing:
                self.forget()
                ray_cluster.require_room(workers, *self._need)
                for _ in range(missing):
                    self._coming.append(self._new(ray_cluster.place(*self._need)))
                self._asked = time.monotonic()
            ready = True
            for actor, share in zip(self._coming, shares[len(self._actors) :], strict=False):
                if actor.handle is None and ray_cluster.there(actor.place):
                    actor.start(share)
                try:
                    ready &= actor.handle is not None and actor.started() is not None
                except RayError as error:
                    raise SimulatorDied(f"at start-up: {actor.obituary(error)}") from error
            late = any(actor.handle is None for actor in self._coming)
            if late and time.monotonic() - self._asked > ray_cluster.RESERVE:
                raise ray_cluster.taken(workers, *self._need)
        except (UserError, SimulatorDied):
            self.forget()
            raise
        return ready

    def forget(self) -> None:
        """End what was prepared."""
        while self._coming:
            self._end(self._coming.pop())

    def scale(self, workers: int) -> None:
        """Deal the environments out to `workers`, for whom all is prepared: those that were prepared come, those that
        are too many end, the others stay and start their new share. What ran is abandoned."""
        self._actors, self._coming = [*self._actors, *self._coming], []
        while len(self._actors) > workers:
            self._end(self._actors.pop())
        self._deal()

    def close(self) -> None:
        """End the workers, and the cluster where it is a private one; may be called twice."""
        self._resources.close()

    def __enter__(self) -> RolloutActors:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _new(self, place: Any) -> Actor:
        """Nobody has its index."""
        taken = {actor.index for actor in [*self._actors, *self._coming]}
        index = next(index for index in count() if index not in taken)
        return Actor(index, place, self._pipeline, self._schedule, self._log_dir)

    def _first(self, actor: Actor) -> Specs:
        """What an actor says when it has started for the first time."""
        from ray.exceptions import RayError

        try:
            return self._specs(actor)
        except RayError as error:
            raise SimulatorDied(f"at start-up: {actor.obituary(error)}") from error

    def _specs(self, actor: Actor) -> Specs:
        while (specs := actor.started(START)) is None:
            pass
        return specs

    def _deal(self) -> None:
        """Give every worker its share, as equal as can be; whoever has it already keeps it."""
        from ray.exceptions import RayError

        while True:
            for actor, share in zip(self._actors, self._shares(len(self._actors)), strict=True):
                if actor.share != share:
                    self._buried, actor.deaths = self._buried + actor.deaths, 0
                    actor.start(share)
            try:
                for actor in self._actors:
                    try:
                        self._specs(actor)
                    except RayError as error:
                        self._replace(actor, error)
            except _NoPlace:
                continue
            return

    def _mourn(self, actor: Actor, error: BaseException) -> None:
        """Replace one that died of `error` while others collect. Raises `DealtOut` where there is no place for it."""
        running = actor.rows.stop - actor.rows.start
        self.lost_episodes += running
        try:
            self._replace(actor, error)
        except _NoPlace:
            self.lost_episodes += self.num_envs - running
            self._deal()
            raise DealtOut from error
        for other in self._actors:  # nobody has looked after them
            other.seen = time.monotonic()

    def _replace(self, actor: Actor, error: BaseException) -> None:
        """Start another incarnation in place of one that ended with `error`. Raises `_NoPlace` when it had to go, and
        `SimulatorDied` when it was the last or there were too many deaths."""
        from ray.exceptions import RayError

        assert actor.share is not None
        self._buried, actor.deaths = self._buried + actor.deaths, 0
        self._died += 1
        self._failures += _lives(actor.node)
        while True:
            actor.end()
            if self._failures > MAX_DEATHS:
                raise SimulatorDied(f"{self._failures} deaths of rollout workers; the last: {actor.obituary(error)}")
            last = len(self._actors) == 1
            if not ray_cluster.there(actor.place, ray_cluster.RESERVE if last else ROOM):
                if last:
                    raise SimulatorDied(f"there is no place for the last of the workers: {actor.obituary(error)}")
                print(f"{actor.name} was lost with its place; the others go on with its environments", file=sys.stderr)
                self._actors.remove(actor)
                self._end(actor)
                raise _NoPlace
            actor.start(actor.share)
            try:
                self._specs(actor)
            except RayError as death:
                # Ray sends it to a node that is gone as long as it has not noticed that.
                error, again = death, _lives(actor.node)
                self._died, self._failures = self._died + again, self._failures + again
            else:
                return

    def _shares(self, workers: int) -> list[tuple[slice, Any]]:
        """(rows, simulator configuration) of each of so many workers."""
        simulator, groups = self._simulator, self._pipeline.env_groups
        if simulator.num_envs < workers:
            raise UserError(
                f"pipeline.rollout_workers {workers} needs as many environments: set simulator.num_envs to at least "
                f"that"
            )
        if groups > 1 and min(simulator.num_envs, getattr(simulator, "workers", None) or 0) < workers * groups:
            raise UserError(
                f"pipeline.rollout_workers {workers} with env_groups {groups} needs {workers * groups} environments "
                f"and processes of the simulator: set simulator.num_envs and simulator.workers to at least that"
            )
        shares = deal_out(simulator, workers)
        bounds = pairwise(accumulate([share.num_envs for share in shares], initial=0))
        return [(slice(*rows), share) for rows, share in zip(bounds, shares, strict=True)]

    def _end(self, actor: Actor) -> None:
        self._buried += actor.deaths
        actor.end()
        ray_cluster.give_back(actor.place)

    def _release(self) -> None:
        self.forget()
        while self._actors:
            self._end(self._actors.pop())


def _lives(node: str) -> bool:
    """Whether Ray takes the node of this id for alive."""
    import ray

    return any(each["Alive"] and each["NodeID"] == node for each in ray.nodes())

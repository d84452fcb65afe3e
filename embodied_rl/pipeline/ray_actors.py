"""Rollout workers as Ray actors, supervised: one that dies or hangs is replaced, what it was asked for is asked again,
and nothing that it had begun is ever seen.

Ray itself retries nothing: a call that it repeated would run in a fresh simulator without a word.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Any

from embodied_rl.config import PipelineConfig
from embodied_rl.errors import SimulatorDied, UserError
from embodied_rl.pipeline.env_groups import deal_out
from embodied_rl.pipeline.ray_cluster import cluster, reserve
from embodied_rl.pipeline.rollout_actor import Order, Reply, RolloutActor
from embodied_rl.simulators.base import ResetSchedule
from embodied_rl.simulators.worker import Specs

MAX_DEATHS = 3
"""Of rollout workers in a run."""
START = 900.0
"""Seconds that a rollout worker and its simulators get to start."""
LONGEST = 600.0
"""Seconds without a chunk after which a rollout worker is taken for stuck."""
_TICK = 0.2
"""Seconds between looks at anything but the result that is waited for."""
_BEAT = 5.0
"""Seconds between questions whether a rollout worker gets on."""


@dataclass
class _Actor:
    """The near side of one rollout worker."""

    index: int
    rows: slice
    simulator: Any
    """Its share of the configured one."""
    log: Path | None
    epoch: int = 0
    """The incarnation."""
    handle: Any = None
    pid: int = 0
    node: str = ""
    """The id of its Ray node."""
    deaths: int = 0
    """Of simulator processes of this incarnation."""
    chunks: int = 0
    seen: float = 0.0
    """When it last got on."""
    beat: Any = None
    """A question how many chunks there were."""
    asked: float = 0.0

    @property
    def name(self) -> str:
        return f"rollout worker {self.index} (environments {self.rows.start}-{self.rows.stop - 1})"


class RolloutActors:
    """`pipeline.rollout_workers` actors, each with its share of the environments; says of them what a simulator says
    of itself."""

    def __init__(
        self, simulator: Any, pipeline: PipelineConfig, schedule: ResetSchedule, log_dir: Path | None = None
    ) -> None:
        """Raises `UserError` for what cannot be placed or started, `SimulatorDied` when one dies while it starts."""
        self.num_envs = simulator.num_envs
        self.lost_episodes = 0
        """Those that ran in rollout workers that died."""
        self._pipeline = pipeline
        self._schedule = schedule
        self._log_dir = log_dir
        self._orders = count(1)
        self._died = 0
        self._buried = 0
        """Deaths of simulator processes in earlier incarnations."""
        self._actors = _deal(simulator, pipeline, log_dir)
        with ExitStack() as started:
            started.enter_context(cluster(pipeline.ray_address))
            self._group = reserve(pipeline.rollout_workers, pipeline.rollout_cpus, pipeline.rollout_gpus)
            started.callback(self._release)
            specs = self._start(self._actors)
            self._resources = started.pop_all()
        self.observation_spec, self.action_spec, self.tasks = specs.observation, specs.action, specs.tasks

    @property
    def rows(self) -> list[slice]:
        """Which environments are whose."""
        return [actor.rows for actor in self._actors]

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

    def ask(self, order: Callable[[int], Order | None], check: Callable[[], object]) -> list[Any]:
        """What the workers answer to `order(index)`, in their order; those whose order is None are left out.

        One that dies is replaced and gets the order of that moment. Raises what an order raised in a worker, what
        `check` raises while it is waited for, and `SimulatorDied` after more than `MAX_DEATHS` deaths.
        """
        import ray
        from ray.exceptions import RayError

        replies: dict[int, Reply] = {}
        pending: dict[Any, tuple[_Actor, Order]] = {}

        def send(actor: _Actor) -> None:
            if (its := order(actor.index)) is not None:
                its.sequence = next(self._orders)
                actor.seen = time.monotonic()
                pending[actor.handle.run.remote(its)] = actor, its

        for actor in self._actors:
            send(actor)
        while pending:
            ready, _ = ray.wait(list(pending), timeout=_TICK)
            check()
            for reference in ready:
                actor, its = pending.pop(reference)
                try:
                    reply = _get(reference)
                except RayError as error:
                    self._replace(actor, error)
                    send(actor)
                    continue
                if (reply.worker, reply.epoch, reply.sequence) != (actor.index, actor.epoch, its.sequence):
                    raise RuntimeError(f"{actor.name} answered another order than was given: {reply}")
                actor.deaths = reply.deaths
                replies[actor.index] = reply
            for actor, _ in pending.values():
                self._look_after(actor)
        return [replies[index] for index in sorted(replies)]

    def close(self) -> None:
        """End the workers, and the cluster where it is a private one; may be called twice."""
        self._resources.close()

    def __enter__(self) -> RolloutActors:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _start(self, actors: Iterable[_Actor]) -> Specs:
        """Start an incarnation of all `actors` at once; returns their common specs."""
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        pipeline, starting = self._pipeline, {}
        decorate: Any = ray.remote
        remote = decorate(concurrency_groups={"watch": 1})(RolloutActor)
        for actor in actors:
            actor.epoch, actor.beat, actor.chunks = actor.epoch + 1, None, 0
            actor.handle = remote.options(
                num_cpus=pipeline.rollout_cpus,
                num_gpus=pipeline.rollout_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, actor.index),
                max_restarts=0,
                max_task_retries=0,
            ).remote(actor.index, actor.epoch, actor.log, sys.path)
            logs = self._log_dir and self._log_dir / f"rollout-worker-{actor.index}"
            device = "cuda" if pipeline.rollout_gpus else "cpu"
            starting[actor.handle.start.remote(actor.simulator, pipeline.env_groups, self._schedule, logs, device)] = (
                actor
            )
        specs: list[Specs] = []
        deadline = time.monotonic() + START
        for reference, actor in starting.items():
            if not ray.wait([reference], timeout=max(0.0, deadline - time.monotonic()))[0]:
                raise SimulatorDied(f"{actor.name} did not start within {START:.0f} seconds; {_last_words(actor)}")
            try:
                its, actor.pid, actor.node = _get(reference)
            except RayError as error:
                raise SimulatorDied(f"at start-up: {_obituary(actor, error)}") from error
            specs.append(its)
        if any(each != specs[0] for each in specs):
            raise UserError("the simulator has different specs in different rollout workers")
        return specs[0]

    def _replace(self, actor: _Actor, error: BaseException) -> None:
        """Start another incarnation in place of one that ended with `error`."""
        import ray

        self.lost_episodes += actor.rows.stop - actor.rows.start
        self._buried, actor.deaths = self._buried + actor.deaths, 0
        self._died += 1
        node = actor.node
        while True:
            ray.kill(actor.handle)  # who cannot be reached may still be there
            if self._died > MAX_DEATHS:
                raise SimulatorDied(f"{self._died} deaths of rollout workers; the last: {_obituary(actor, error)}")
            try:
                self._start([actor])
            except SimulatorDied as death:
                if death.__cause__ is None:
                    raise
                error = death.__cause__
                # Ray sends it to a node that is gone as long as it has not noticed that.
                self._died += any(each["Alive"] and each["NodeID"] == node for each in ray.nodes())
            else:
                break
        for other in self._actors:  # nobody has looked after them
            other.seen = time.monotonic()

    def _look_after(self, actor: _Actor) -> None:
        """Kill it when it has not made a chunk for long."""
        import ray
        from ray.exceptions import RayError

        now = time.monotonic()
        if now - actor.seen > LONGEST:
            ray.kill(actor.handle)
        elif actor.beat is None and now - actor.asked > _BEAT:
            actor.asked = now
            actor.beat = actor.handle.progress.options(concurrency_group="watch").remote()
        elif actor.beat is not None and ray.wait([actor.beat], timeout=0)[0]:
            beat, actor.beat = actor.beat, None
            try:
                chunks = _get(beat)
            except RayError:  # the order that is waited for says so, too
                return
            if chunks != actor.chunks:
                actor.chunks, actor.seen = chunks, now

    def _release(self) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            if actor.handle is not None:
                ray.kill(actor.handle)
        remove_placement_group(self._group)


def _deal(simulator: Any, pipeline: PipelineConfig, log_dir: Path | None) -> list[_Actor]:
    workers, groups = pipeline.rollout_workers, pipeline.env_groups
    if simulator.num_envs < workers:
        raise UserError(
            f"pipeline.rollout_workers {workers} needs as many environments: set simulator.num_envs to at least that"
        )
    if groups > 1 and min(simulator.num_envs, getattr(simulator, "workers", None) or 0) < workers * groups:
        raise UserError(
            f"pipeline.rollout_workers {workers} with env_groups {groups} needs {workers * groups} environments and "
            f"processes of the simulator: set simulator.num_envs and simulator.workers to at least that"
        )
    shares = deal_out(simulator, workers)
    bounds = pairwise(accumulate([share.num_envs for share in shares], initial=0))
    logs: Sequence[Path | None] = [log_dir and log_dir / f"rollout-worker-{index}.log" for index in range(workers)]
    return [
        _Actor(index, slice(*rows), share, log)
        for index, (rows, share, log) in enumerate(zip(bounds, shares, logs, strict=True))
    ]


def _get(reference: Any) -> Any:
    """The result of a call that is done. Raises what it raised, with the worker's traceback as its cause."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(reference, timeout=LONGEST)
    except RayTaskError as error:
        raise error.cause from error


def _obituary(actor: _Actor, error: BaseException) -> str:
    """How it ended."""
    reason = str(error).strip().partition("\n")[0]
    return f"{actor.name}, process {actor.pid or '?'}: {reason} {_last_words(actor)}"


def _last_words(actor: _Actor) -> str:
    try:
        lines = actor.log.read_text(errors="replace").splitlines()[-30:] if actor.log else []
    except OSError:
        return f"its output is in {actor.log} on its own machine"
    return "its last output:\n" + ("\n".join(lines) or "(none)")

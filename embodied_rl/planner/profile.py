"""What the stages of a recipe cost on this machine, found by running them at three sizes."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from embodied_rl.algorithms.base import EpisodicAlgorithm
from embodied_rl.algorithms.off_policy import TransitionConfig
from embodied_rl.config import RunConfig
from embodied_rl.errors import UserError
from embodied_rl.pipeline.env_groups import rollout_worker
from embodied_rl.pipeline.learning import Beside, Replica
from embodied_rl.pipeline.tickets import TicketCounter
from embodied_rl.planner import events
from embodied_rl.planner.costs import Cost, Costs, Work
from embodied_rl.planner.events import Variation
from embodied_rl.planner.placement import Placement, Seconds
from embodied_rl.planner.search import Machine, Plan, follow, search
from embodied_rl.planner.timeline import Span, Timeline
from embodied_rl.specs import ActionSpec, ObservationSpec, connect
from embodied_rl.training.on_policy import EpisodeWorkflow, SegmentWorkflow
from embodied_rl.training.streams import Streams

SIZES = (1, 2, 4)
"""Quarters of the environments that a recipe has."""
BUDGET = 1.5
"""Seconds of collecting after which a segment is cut short for the profile."""
REPETITIONS = 3


class Stage(NamedTuple):
    """One call."""

    seconds: float
    cores: float
    """That it kept busy, in each process."""


class Sample(NamedTuple):
    """What was measured at one size."""

    rows: int
    workers: int
    """Processes that stepped them, or 1."""
    simulate: Stage
    infer: Stage
    record: Stage
    train: Stage
    decisions: int
    """Of every environment in a batch."""
    batch: int
    """Decisions that were learned from."""
    steps: int
    """Of environments."""
    spread: float
    """Standard deviation / mean of the seconds of `simulate`."""


@dataclass(frozen=True)
class Profile:
    """Costs of a recipe on this machine."""

    work: Work
    variation: Variation
    samples: list[Sample]
    steps: float
    """Of environments, in an iteration."""
    groups: int
    """Of environments, at most."""
    device: torch.device
    """Of the policy."""
    cores: int
    load: float
    """Of the machine before (processes that wanted to run, as of the last minute)."""
    seen: ObservationSpec
    told: ActionSpec

    def plans(self, staleness: int) -> list[Plan]:
        """What this machine can run, in one process beside its simulators' processes, best first."""
        return search(self.work, self._machine, self.groups, staleness, self.variation)

    def plan(self, placement: Placement) -> Plan:
        """The one of `placement`."""
        return follow(self.work, self._machine, placement, self.variation)

    @property
    def _machine(self) -> Machine:
        return Machine(devices=0 if self.device.type == "cpu" else 1, cores=self.cores)


def profile(config: RunConfig, beside: bool = False) -> Profile:
    """Run every stage of `config` for seconds to a minute or so, with random weights and a learner that never stops
    early; `beside`: also collecting and learning at once. Raises `UserError` for an algorithm that neither collects
    segments nor episodes: what it does when is fixed."""
    _check(config)
    load = os.getloadavg()[0]
    torch.set_num_threads(1)  # as in a run
    stage = _Stages(config, beside)
    sizes = sorted({max(1, config.simulator.num_envs * quarters // 4) for quarters in SIZES})
    samples = [stage.measure(rows) for rows in sizes]
    whole, cores = samples[-1], len(os.sched_getaffinity(0))
    workers = getattr(config.simulator, "workers", None) or 1
    on_device = str(getattr(config.simulator, "device", "cpu")).startswith("cuda")

    def fit(name: str, at: list[float]) -> Cost:
        return Cost.fit(at, [getattr(sample, name).seconds for sample in samples], getattr(whole, name).cores)

    # Processes step their environments one after the other, as many at a time as there are cores.
    rows = [float(sample.rows) for sample in samples]
    stepped = rows if on_device else [count / min(workers, count, cores) for count in rows]
    costs = Costs(
        simulate=fit("simulate", stepped),
        infer=fit("infer", rows),
        record=fit("record", rows),
        train=fit("train", [float(sample.batch) for sample in samples]),
        sync=stage.sync(),
        overlap=_overlap(whole, stage, cores) if beside else 1.0,
    )
    decisions = whole.decisions if stage.episodic else config.training.decisions_per_iteration
    longer = decisions / whole.decisions
    return Profile(
        work=Work(
            costs,
            whole.rows,
            decisions,
            processes=0 if on_device else workers,
            inside=stage.inside,
            learned=round(whole.batch * longer),
        ),
        variation=Variation(spread=whole.spread),
        samples=samples,
        steps=whole.steps * longer,
        groups=1 if stage.inside else min(workers, whole.rows),
        device=stage.policy.device,
        cores=cores,
        load=load,
        seen=stage.seen,
        told=stage.told,
    )


def _check(config: RunConfig) -> None:
    if config.algorithm is None:
        raise UserError(f"recipe '{config.recipe}' only clones: there is nothing to plan")
    if isinstance(config.algorithm, TransitionConfig):
        raise UserError(
            f"'{config.recipe}' learns off-policy, while the simulators execute and in a fixed order: there is nothing "
            f"to plan; choose a recipe of ppo or grpo"
        )
    pipeline = config.pipeline
    if pipeline.executor != "local" or pipeline.learners > 1:
        raise UserError("plans are for one process: leave pipeline.executor at local and pipeline.learners at 1")


class _Stages:
    """One policy and one learner, simulators of any size."""

    policy: Any
    algorithm: Any
    inside = False
    """The simulator is stepped in this process, so it leaves no time to record in."""
    both = 0.0
    """Seconds to collect a batch and learn from one at once, with as many environments as there are."""

    def __init__(self, config: RunConfig, beside: bool) -> None:
        self.config = config
        self.beside = beside
        learner: Any = config.algorithm
        known = {field.name for field in fields(learner)}
        calm: dict[str, Any] = {"critic_warmup": 0, "target_kl": None}  # the usual iteration, in full
        self.learner = replace(learner, **{name: calm[name] for name in known & calm.keys()})

    @property
    def episodic(self) -> bool:
        """It learns from whole episodes."""
        return isinstance(self.algorithm, EpisodicAlgorithm)

    def measure(self, rows: int) -> Sample:
        """The costs with `rows` environments."""
        config = self.config
        fewer: dict[str, Any] = {"num_envs": rows}
        if workers := getattr(config.simulator, "workers", None):
            fewer["workers"] = min(workers, rows)
        group = getattr(config.algorithm, "group_size", 1)
        streams = Streams(
            config.seed, config.simulator.num_tasks, 0, 0, num_states=config.simulator.num_states, group_size=group
        )
        with (
            tempfile.TemporaryDirectory() as logs,
            replace(config.simulator, **fewer).build(streams, log_dir=Path(logs)) as simulator,
        ):
            self.inside = not getattr(simulator, "pids", None)
            self.seen, self.told = simulator.observation_spec, simulator.action_spec
            if not hasattr(self, "policy"):
                self._build()
            connection = connect(self.seen, self.told, self.policy.observation_spec, self.policy.action_spec)
            worker = rollout_worker(simulator, self.policy, connection, config.seed)
            return self._sample(worker, TicketCounter(streams.first("training")))

    def sync(self) -> float:
        """Seconds to hand the weights over."""
        replica = Replica(self.policy)
        replica.follow()
        began = time.perf_counter()
        replica.follow()
        return time.perf_counter() - began

    def _build(self) -> None:
        torch.manual_seed(self.config.seed)
        self.policy = self.config.policy.build(self.seen, self.told)
        self.algorithm = self.learner.build(self.policy, self.config.seed)
        self.policy = self.algorithm.policy

    def _sample(self, worker: Any, tickets: TicketCounter) -> Sample:
        generator = torch.Generator().manual_seed(self.config.seed)
        decisions = self.config.training.decisions_per_iteration
        if self.episodic:
            workflow: Any = EpisodeWorkflow(worker, self.algorithm, generator)
        else:
            workflow = SegmentWorkflow(worker, self.algorithm, 2, generator)
        workflow.restart(tickets)
        began = time.perf_counter()
        workflow.collect()
        if not self.episodic:  # also: all memory is touched once
            each = (time.perf_counter() - began) / 2
            workflow.decisions = min(decisions, max(4, int(BUDGET / each)))
            workflow.collect()
        found = [self._once(workflow, generator) for _ in range(REPETITIONS)]
        if self.beside and worker.simulator.num_envs == self.config.simulator.num_envs:
            self.both = median(self._at_once(workflow, generator) for _ in range(REPETITIONS))
        return _typical(found)

    def _at_once(self, workflow: Any, generator: torch.Generator) -> float:
        replica = Replica(self.policy)
        batch, workflow.worker.policy = workflow.collect(), replica.policy
        began = time.perf_counter()
        with Beside(lambda: self.algorithm.learn(batch, generator)) as learning:
            workflow.collect()
            learning.result()
        workflow.worker.policy = self.policy
        return time.perf_counter() - began

    def _once(self, workflow: Any, generator: torch.Generator) -> Sample:
        """A batch."""
        worker, timeline = workflow.worker, Timeline()
        pids, before = getattr(worker.simulator, "pids", []), worker.env_steps
        computed = computing(pids)
        with timeline.watching(worker), timeline.span("collect", "rollout"):
            batch = workflow.collect()
        computed = max(0.0, computing(pids) - computed)
        with timeline.span("train", "learner"):
            self.algorithm.learn(batch, generator)
        chunks = [span.seconds for span in timeline.of("simulate")]
        infer, wait, collect, train = (_total(timeline.of(name)) for name in ("infer", "wait", "collect", "train"))
        record = collect - infer - wait
        simulate = np.array([sum(chunks), computed / max(1, len(pids))])
        if self.inside:  # it is stepped while this process waits for it, not while a decision is stored
            simulate, infer, record = wait, infer + record, np.zeros(2)

        def stage(total: np.ndarray, calls: int) -> Stage:
            return Stage(max(float(total[0]) / calls, 1e-9), min(float(total[1] / max(total[0], 1e-9)), 1.0))

        count = len(chunks)
        return Sample(
            rows=worker.simulator.num_envs,
            workers=max(1, len(pids)),
            simulate=stage(simulate, count),
            infer=stage(infer, count),
            record=stage(record, count),
            train=stage(train, 1),
            decisions=count,
            batch=batch.log_prob.shape[:-1].numel(),
            steps=worker.env_steps - before,
            spread=float(np.std(chunks) / np.mean(chunks)),
        )


def _typical(samples: list[Sample]) -> Sample:
    """The middle one of every stage."""

    def middle(of: Callable[[Sample], float]) -> Sample:
        return sorted(samples, key=of)[len(samples) // 2]

    collected = middle(lambda sample: sample.simulate.seconds + sample.infer.seconds)
    return collected._replace(train=middle(lambda sample: sample.train.seconds).train)


def _overlap(sample: Sample, stage: _Stages, cores: int) -> float:
    """`Costs.overlap` that explains how long both took at once. Two threads have at least half of the interpreter."""
    on = range(0 if stage.policy.device.type == "cpu" else 1)
    placement = Placement(range(0), on, on, staleness=1)
    stages = {name: getattr(sample, name) for name in ("simulate", "infer", "record", "train")}
    busy = {name: each.cores for name, each in stages.items()}
    busy["simulate"] *= sample.workers
    lasting = {name: each.seconds for name, each in stages.items()}
    alone = Seconds(**lasting, sync=0.0, switch=0.0, sharing=1, cores=busy)

    def lacking(times: float) -> float:
        each = alone.slower(times, stage.inside)
        return events.simulate(sample.decisions, placement, each, cores, iterations=1)[0] - stage.both

    low, high = 1.0, 2.0
    if lacking(low) >= 0:
        return low
    while high - low > 0.02 and lacking(high) > 0:
        middle = (low + high) / 2
        low, high = (low, middle) if lacking(middle) > 0 else (middle, high)
    return high


def _total(spans: list[Span]) -> np.ndarray:
    """Seconds, and those of computing."""
    return np.array([[span.seconds, span.cpu] for span in spans]).reshape(-1, 2).sum(0)


def computing(pids: list[int]) -> float:
    """Seconds that those of these processes that live have computed so far, to a hundredth."""
    ticks = 0
    for stat in (Path(f"/proc/{pid}/stat") for pid in pids):
        if stat.exists():
            user, system = stat.read_text().rpartition(")")[2].split()[11:13]
            ticks += int(user) + int(system)
    return ticks / os.sysconf("SC_CLK_TCK")

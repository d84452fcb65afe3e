"""One run from configuration to report: demonstrations, cloning, reinforcement learning, evaluation.

The run folder holds everything: config.json, demonstrations.h5, metrics.jsonl, checkpoints/, logs/, result.json and
report.html. A run that is killed goes on from its newest checkpoint with the numbers it would have had.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from embodied_rl.algorithms.base import ImitationAlgorithm, Metrics, OfflineAlgorithm
from embodied_rl.algorithms.cotraining import CoTraining
from embodied_rl.config import DemonstrationsConfig, RunConfig, to_dict
from embodied_rl.data import lerobot_dataset
from embodied_rl.data.demonstration_replay import demonstration_replay
from embodied_rl.data.demonstrations import (
    DemonstrationEpisode,
    chunks,
    mixture_statistics,
    observations,
    read,
    write,
)
from embodied_rl.data.replay_buffer import ReplayBuffer
from embodied_rl.errors import LearnerDied, LearnerRaised, UserError
from embodied_rl.files import write_atomic
from embodied_rl.pipeline import executor
from embodied_rl.pipeline.rollout import Intervene, RolloutWorker
from embodied_rl.pipeline.tickets import TicketCounter
from embodied_rl.planner.prediction import Prediction
from embodied_rl.planner.replanning import describe, placed
from embodied_rl.planner.search import Plan
from embodied_rl.planner.watch import Watch
from embodied_rl.specs import connect
from embodied_rl.training import checkpoint, families, statistics
from embodied_rl.training.demonstrations import demonstrate
from embodied_rl.training.evaluation import EvaluationResult, run_episodes
from embodied_rl.training.metrics import MetricLogger, budget
from embodied_rl.training.progress import Progress
from embodied_rl.training.recorded_data import require_fit
from embodied_rl.training.report import write_report
from embodied_rl.training.result import summary
from embodied_rl.training.scaling import Scaling
from embodied_rl.training.streams import Streams
from embodied_rl.training.trajectories import trajectories, write_trajectories
from embodied_rl.training.workflows import Workflow, imitate
from embodied_rl.types import Observation

MAX_LEARNER_DEATHS = 3
"""That a run survives from one start or resume to its end."""


def train(
    config: RunConfig,
    out: Path,
    resume: bool = False,
    intervene: Intervene | None = None,
    prediction: Prediction | None = None,
) -> dict[str, Any]:
    """Run `config` in folder `out` and return the content of its result.json. `intervene`: a person who may take over
    in the training episodes of an off-policy algorithm. `prediction`: how long iterations should take, to be compared.

    Raises `UserError` for what the user can fix, `SimulatorDied` after repeated worker deaths. A run that is refused
    before its first checkpoint leaves no folder behind.
    """
    created = not out.exists()
    run = Run(config, out, resume, intervene, prediction)
    try:
        return run.run()
    except UserError:
        if created and checkpoint.latest(out / "checkpoints") is None:
            shutil.rmtree(out, ignore_errors=True)
        raise


class Run:
    """The state of a run between its phases."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        resume: bool,
        intervene: Intervene | None = None,
        prediction: Prediction | None = None,
    ) -> None:
        self.config = config
        self.intervene = intervene
        self.prediction = prediction
        self.out = out
        self.started = time.monotonic()
        self.iteration = 0
        self.phases: dict[str, float] = defaultdict(float)
        self.evaluations: list[EvaluationResult] = []
        self.succeeded = False
        """The development success that ends the run early was reached."""
        self.learner_deaths = 0
        self.saved = checkpoint.load(newest) if resume and (newest := checkpoint.latest(out / "checkpoints")) else None
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "config.json", json.dumps(to_dict(config), indent=2))
        if self.saved:
            self.iteration = self.saved["iteration"]
            self.succeeded = self.saved["succeeded"]
            self.phases.update(self.saved["phases"])
            self.evaluations = [EvaluationResult(**fields) for fields in self.saved["evaluations"]]
        self.earlier = {name: (self.saved or {}).get(name, 0) for name in ("wall_seconds", "deaths", "learner_deaths")}
        """Of those that this process resumes."""
        self.streams = Streams(
            config.seed,
            config.simulator.num_tasks,
            config.training.development_episodes,
            config.evaluation.episodes,
            num_states=config.simulator.num_states,
            group_size=getattr(config.algorithm, "group_size", 1),
        )
        # Small networks on small batches: a second thread costs more than it brings, and the workers need the core.
        torch.set_num_threads(1)

    def run(self) -> dict[str, Any]:
        """All phases."""
        with (
            Progress(*budget(self.config)) as self.progress,
            ExitStack() as self.loggers,
            ExitStack() as self.processes,
        ):
            self.logger = self.loggers.enter_context(self._new_logger())
            self.progress.phase("start simulators")
            self._start(self.started)
            self.phases["start simulators"] += self.start_seconds
            return self._phases()

    def _start(self, began: float) -> None:
        """What steps the environments and what learns, since `began`."""
        config, logs = self.config, self.out / "logs"
        simulator = executor.start(config.simulator, config.pipeline, self.streams, logs)
        self.simulator = self.processes.enter_context(simulator)
        self.scaling = self.processes.enter_context(Scaling(config, self.simulator, self.out))
        self._build()
        self.start_seconds = time.monotonic() - began

    def _new_logger(self) -> MetricLogger:
        logging = self.config.logging
        return MetricLogger(self.out, self.config, self.iteration, logging.tensorboard, logging.wandb)

    def _build(self) -> None:
        self.policy = self._new_policy()
        self.connection = connect(
            self.simulator.observation_spec,
            self.simulator.action_spec,
            self.policy.observation_spec,
            self.policy.action_spec,
        )
        self.worker = executor.collector(self.simulator, self.policy, self.connection, self.config.seed)
        self.worker.intervene = self.intervene
        self.tickets = TicketCounter(self.streams.first("training"), retry=self.config.training.retry_failed)
        self.generator = torch.Generator().manual_seed(self.config.seed)

    def _phases(self) -> dict[str, Any]:
        data, self.second = self._datasets()
        if self.saved is None:
            if data is not None and self.config.imitation is not None:
                with self._phase("clone demonstrations"):
                    self._clone(self.policy, data, self.config.imitation)
            if count := self.config.training.statistics_episodes:
                with self._phase("fit statistics"):
                    first = self.streams.first("training")
                    self.worker.env_steps += statistics.fit(self.worker, self.policy, range(first, first + count))
            self._evaluate("initial")
        with self._phase("reinforcement learning"):
            self._reinforce(data)
        self._evaluate("final")
        steps, imitation = self.config.training.converged_clone_steps, self.config.imitation
        if data is not None and imitation is not None and steps:
            with self._phase("converged clone"):
                clone = self._new_policy()
                self._clone(clone, data, replace(imitation, steps=steps))
            self._evaluate("converged_clone", clone)
        with self._phase("record trajectories"):
            shown = self.worker.apart(self.policy, trajectories, self.streams.episodes("test")[:4])
            write_trajectories(chain.from_iterable(shown), self.out / "rollout.json")
        result = summary(self.config, self.evaluations, self._counts())
        write_atomic(self.out / "result.json", json.dumps(result, indent=2))
        write_report(self.out)
        return result

    def _new_policy(self) -> Any:
        torch.manual_seed(self.config.seed)
        return self.config.policy.build(self.simulator.observation_spec, self.simulator.action_spec)

    def _datasets(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Chunks {"inputs", "actions" [M,H,A], "valid" [M,H]} of the demonstrations and of the second dataset, and the
        policy's statistics fitted to the mixture that is cloned."""
        first, second = self.config.demonstrations, self.config.cotraining
        if first is not None and self.config.training.statistics_episodes:
            raise UserError("demonstrations say what states are normalised by: leave training.statistics_episodes at 0")
        found: list[list[DemonstrationEpisode]] = []
        if first is not None:
            self.demonstrations = self._read_or_collect(first)
            found.append(self.demonstrations)
        if second is not None:
            found.append(self._read(second.path, second.episodes))
        seen = [self._seen(episodes) for episodes in found]
        if first is not None:
            self.statistics = mixture_statistics(seen[0].state, seen[-1].state, second.share if second else 0.0)
            if self.saved is None:
                self.policy.set_statistics(*self.statistics)
        data = [self._chunks(episodes, each) for episodes, each in zip(found, seen, strict=True)]
        return data[0] if first else None, data[-1] if second else None

    def _read_or_collect(self, wanted: DemonstrationsConfig) -> list[DemonstrationEpisode]:
        path = self.out / "demonstrations.h5"
        if wanted.path:
            return self._read(wanted.path, wanted.episodes)
        if self.saved:
            return read(path)
        if wanted.episodes is None:
            raise UserError("--demonstrations.episodes none takes all of a dataset: add --demonstrations.path")
        with self._phase("collect demonstrations"):
            return self._collect(path, wanted.episodes, wanted.noise)

    def _read(self, path: str, count: int | None) -> list[DemonstrationEpisode]:
        """The first `count` episodes of a dataset, or all; raises `UserError` when there are fewer."""
        if not path:
            raise UserError("co-training needs a second dataset: add --cotraining.path FILE")
        tasks = self.simulator.tasks
        if Path(path).is_dir():
            return lerobot_dataset.read(Path(path), [task.instruction for task in tasks], count)
        episodes = read(Path(path), tasks[0].name, self.simulator.action_spec.control)[:count]
        if count is not None and len(episodes) < count:
            raise UserError(f"{path} holds {len(episodes)} demonstrations, {count} are asked for")
        return episodes

    def _seen(self, episodes: list[DemonstrationEpisode]) -> Observation:
        """What the policy would have seen before every action."""
        seen = observations(episodes, tuple(task.instruction for task in self.simulator.tasks))
        require_fit(self.simulator, seen, episodes[0].actions.shape[1])
        return self.connection.observation(seen)

    def _chunks(self, episodes: list[DemonstrationEpisode], seen: Observation) -> dict[str, Any]:
        actions, valid = chunks(episodes, self.policy.horizon)
        return {
            "inputs": self.policy.prepare(seen),
            "actions": torch.from_numpy(actions).to(self.policy.device),
            "valid": torch.from_numpy(valid).to(self.policy.device),
        }

    def _decisions(self) -> ReplayBuffer:
        """The demonstrations as decisions of the policy, with their rewards."""
        if self.config.demonstrations is None:
            raise UserError("the algorithm learns from demonstrations: add --demonstrations.path or .episodes")
        texts = tuple(task.instruction for task in self.simulator.tasks)
        seen = self.connection.observation(observations(self.demonstrations, texts, final=True))
        inputs = {name: column.numpy(force=True) for name, column in self.policy.prepare(seen).items()}
        return demonstration_replay(self.demonstrations, inputs, self.policy.chunk, bool(self.algorithm.config.shaping))

    def _collect(self, path: Path, episodes: int, noise: float) -> list[DemonstrationEpisode]:
        demonstrator, streams, seed = self.config.simulator.demonstrator(), self.streams, self.config.seed

        def demonstrated(worker: RolloutWorker, _: range) -> list[DemonstrationEpisode]:
            return demonstrate(worker.simulator, demonstrator, streams, episodes, noise, seed)

        (found,) = self.worker.apart(self.policy, demonstrated, range(1))
        write(path, found, self.simulator.tasks[0].name, self.simulator.action_spec.control)
        return found

    def _clone(self, policy: Any, data: dict[str, Any], config: Any) -> None:
        algorithm = config.build(policy, self.config.seed)
        assert isinstance(algorithm, ImitationAlgorithm)
        policy.set_statistics(*self.statistics)
        generator = torch.Generator().manual_seed(self.config.seed)
        imitate(
            algorithm,
            data,
            config.steps,
            config.batch_size,
            generator,
            lambda step, metrics: self.progress.update(detail=f"step {step}/{config.steps}", **metrics),
            self.second,
            self.config.cotraining.share if self.config.cotraining else 0.0,
        )

    def _workflow(self, data: dict[str, Any] | None) -> Workflow | None:
        """The loop that the algorithm's family asks for, restored when the run is resumed."""
        config = self.config
        if config.algorithm is None:
            return None
        self.algorithm = config.algorithm.build(self.policy, config.seed)
        self.policy = self.worker.policy = self.algorithm.policy  # what acts from now on may contain what was cloned
        second = config.cotraining
        if self.second is not None and second is not None and second.beta:
            self.algorithm.cotrain(CoTraining(self.policy, self.second, second.beta, second.batch_size, config.seed))
        workflow = families.workflow(
            config, self.algorithm, self.worker, self.generator, data, self._decisions, self.out
        )
        if self.saved:
            self._restore(workflow, self.saved)
        self.scaling.begin(self.algorithm)
        if not self.saved:
            self._save(workflow)
        return workflow

    def _reinforce(self, data: dict[str, Any] | None) -> None:
        """The phase of reinforcement learning, whatever happens to learner ranks, by one plan after the other."""
        trace = self.out / "trace.json" if self.config.logging.trace else None
        plan: Plan | None = None
        while True:
            try:
                changed = self._move(plan) if plan else Metrics()
                if (workflow := self._workflow(data)) is None:
                    return
                with Watch(self.worker, self.algorithm, self.prediction, trace) as watch:
                    plan = self._learn(workflow, watch, changed)
                if plan is None:
                    return
            except LearnerDied as death:
                plan = None
                self._go_back(death)

    def _move(self, plan: Plan) -> Metrics:
        """Go over to `plan` at a border that was saved, as a run does that is resumed with other settings."""
        began = time.monotonic()
        assert self.prediction is not None
        print(f"going over to {describe(plan)} expected", file=sys.stderr)
        self.prediction.follow(plan)
        self.config = placed(self.scaling.config, plan.placement)
        write_atomic(self.out / "config.json", json.dumps(to_dict(self.config), indent=2))
        self.earlier["deaths"] += self.simulator.deaths
        self.processes.close()
        self._start(began)
        if newest := checkpoint.latest(self.out / "checkpoints"):
            self._load(newest)
        return {"time/move": time.monotonic() - began}

    def _go_back(self, death: LearnerDied) -> None:
        """To the last checkpoint, as a run that is resumed does. Raises `death` where that would not help."""
        newest = checkpoint.latest(self.out / "checkpoints")
        self.learner_deaths += 1
        if newest is None or isinstance(death, LearnerRaised) or self.learner_deaths > MAX_LEARNER_DEATHS:
            raise death
        print(f"{str(death).partition(';')[0]}: back to {newest}", file=sys.stderr)
        self._load(newest)
        self.logger.close()
        self.logger = self.loggers.enter_context(self._new_logger())

    def _load(self, newest: Path) -> None:
        self.saved = checkpoint.load(newest)
        self.iteration, self.succeeded = self.saved["iteration"], self.saved["succeeded"]

    def _learn(self, workflow: Workflow, watch: Watch, changed: Metrics) -> Plan | None:
        """Iterate until the budget is spent and learned from, or the development success is reached, or until there is
        a plan to go over to. `changed`: metrics of what happened before."""
        training = self.config.training
        unit, total = budget(self.config)
        workflow.restart(self.tickets)
        fresh, steps = True, 0
        while not self.succeeded and (self._spent() < total or workflow.pending):
            began, before = time.monotonic(), self._spent()
            number = self.iteration + 1
            evaluates = bool(training.evaluate_every) and number % training.evaluate_every == 0
            changes = self.scaling.due()
            plan = None
            if steps and self.prediction is not None:
                plan = self.prediction.better((total - before) / steps, self.start_seconds)
            saves = changes or plan is not None or number % training.checkpoint_every == 0
            metrics = workflow.iterate(border=evaluates or saves or self._spent() >= total)
            self.iteration = number
            seconds = time.monotonic() - began
            steps = self._spent() - before
            metrics[f"time/{unit}_per_second"] = steps / seconds
            metrics |= watch.iteration(seconds, steady=not (fresh or evaluates or saves))
            fresh = evaluates or saves
            if evaluates:
                score = self._episodes("development", self.policy)
                metrics |= {"evaluation/return": score.mean_return, "evaluation/length": score.mean_length}
                if score.success is not None:
                    metrics["evaluation/success"] = score.success
                    wanted = training.stop_at_success
                    self.succeeded = wanted is not None and score.success >= wanted
            self._log(metrics | changed | self.scaling.metrics())
            if saves:
                self._save(workflow)
            changed = self.scaling.change() if changes else Metrics()
            if plan is not None and not self.succeeded and self._spent() < total:
                return plan
            if evaluates or saves:
                workflow.restart(self.tickets)
        self._save(workflow)
        return None

    def _spent(self) -> int:
        """Of the run's budget."""
        return self.algorithm.updates if isinstance(self.algorithm, OfflineAlgorithm) else self.worker.env_steps

    def _log(self, metrics: Metrics) -> None:
        counts = {
            "iteration": self.iteration,
            "env_steps": self.worker.env_steps,
            budget(self.config)[0]: self._spent(),
            "wall_seconds": self._wall_seconds(),
            "simulator/deaths": self._deaths(),
            "simulator/lost_episodes": self.worker.lost_episodes,
        }
        if self.scaling.learners is not None:
            counts["learner/deaths"] = self._learner_deaths()
        self.logger.log(counts | metrics)
        self.progress.update(self._spent(), **metrics)

    def _evaluate(self, name: str, policy: Any = None) -> None:
        """The final kind of evaluation, on the test episodes, unless a resumed run has it already."""
        if any(result.name == name for result in self.evaluations):
            return
        with self._phase("evaluate " + name.replace("_", " ")):
            self.evaluations.append(self._episodes("test", policy or self.policy, name))

    def _episodes(self, stream: str, policy: Any, name: str | None = None) -> EvaluationResult:
        run = partial(run_episodes, deterministic=self.config.evaluation.deterministic)
        episodes = chain.from_iterable(self.worker.apart(policy, run, self.streams.episodes(stream)))
        return EvaluationResult.of(name or stream, sorted(episodes, key=lambda episode: episode.ticket))

    def _save(self, workflow: Workflow) -> None:
        tree = {
            "iteration": self.iteration,
            "succeeded": self.succeeded,
            "env_steps": self.worker.env_steps,
            "lost_episodes": self.worker.lost_episodes,
            "deaths": self._deaths(),
            "learner_deaths": self._learner_deaths(),
            "tickets": self.tickets.state_dict(),
            "phases": dict(self.phases),
            "wall_seconds": self._wall_seconds(),
            "evaluations": [result.to_dict() for result in self.evaluations],
            "policy": self.policy.state_dict(),
            "modules": {name: module.state_dict() for name, module in self.algorithm.modules().items()},
            "optimizers": self.scaling.optimizers(),
            "counters": self.algorithm.counters(),
            "generator": self.generator.get_state(),
            "workflow": workflow.state_dict(),
        }
        checkpoint.save(self.out / "checkpoints" / f"{self.iteration:06d}", tree)

    def _restore(self, workflow: Workflow, saved: dict[str, Any]) -> None:
        self.worker.env_steps = saved["env_steps"]
        self.worker.lost_episodes = saved["lost_episodes"]
        self.tickets.load_state_dict(saved["tickets"])
        try:
            self.policy.load_state_dict(saved["policy"])
            for name, module in self.algorithm.modules().items():
                module.load_state_dict(saved["modules"][name])
            for name, optimizer in self.algorithm.optimizers().items():
                optimizer.load_state_dict(saved["optimizers"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint in {self.out} does not fit this configuration: {error}") from error
        self.algorithm.load_counters(saved["counters"])
        self.generator.set_state(saved["generator"])
        workflow.load_state_dict(saved["workflow"])

    def _counts(self) -> dict[str, Any]:
        return {
            "env_steps": self.worker.env_steps,
            "iterations": self.iteration,
            "wall_seconds": self._wall_seconds(),
            "deaths": self._deaths(),
            "learner_deaths": self._learner_deaths(),
            "lost_episodes": self.worker.lost_episodes,
            "phases": dict(self.phases),
        }

    def _wall_seconds(self) -> float:
        """Of this process and of those it resumes, up to their newest checkpoint."""
        return self.earlier["wall_seconds"] + time.monotonic() - self.started

    def _deaths(self) -> int:
        """Of simulators and rollout workers, likewise."""
        return self.earlier["deaths"] + self.simulator.deaths

    def _learner_deaths(self) -> int:
        return self.earlier["learner_deaths"] + self.learner_deaths

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        self.progress.phase(name)
        try:
            yield
        finally:
            self.phases[name] += time.monotonic() - began

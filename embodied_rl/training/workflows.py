"""The loops (macro level) of the algorithm families, written once against a rollout worker and an algorithm.

A workflow's `iterate` does one iteration and returns its metrics; `border=True` marks the last iteration before every
environment is reset (a checkpoint or an evaluation follows). `state_dict` holds what the loop itself must remember.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from embodied_rl.algorithms.base import ImitationAlgorithm, Metrics, OfflineAlgorithm, OffPolicyAlgorithm
from embodied_rl.algorithms.imitation import join, take
from embodied_rl.data.replay_buffer import ReplayBuffer, WithInterventions
from embodied_rl.errors import UserError
from embodied_rl.pipeline.rollout import Decision, RolloutWorker
from embodied_rl.pipeline.tickets import TicketCounter
from embodied_rl.types import Episode


class Workflow(Protocol):
    @property
    def pending(self) -> int:
        """Batches that were collected and not learned from yet; none after a border."""
        ...

    def restart(self, tickets: TicketCounter) -> None:
        """Begin fresh episodes with tickets from `tickets`: at the start and after a border."""
        ...

    def iterate(self, border: bool) -> Metrics:
        """One iteration."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the loop must remember between iterations; read only at borders."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        ...


def imitate(
    algorithm: ImitationAlgorithm,
    data: dict[str, Any],
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    report: Callable[[int, Metrics], None],
    second: dict[str, Any] | None = None,
    share: float = 0.0,
) -> None:
    """Clone `data` {"inputs" {name: [M,...]}, "actions" [M,H,A], "valid" [M,H]} for `steps` updates, `share` of every
    batch being of the dataset `second`; `report` hears of every hundredth."""
    others = round(share * batch_size) if second is not None else 0

    def draw(chunks: dict[str, Any], count: int) -> dict[str, Any]:
        rows = torch.randint(len(chunks["actions"]), (count,), generator=generator)
        return take(chunks, rows.to(chunks["actions"].device))

    mean = Mean("imitation")
    for step in range(1, steps + 1):
        batch = draw(data, batch_size - others)
        if second is not None and others:
            batch = join(batch, draw(second, others))
        mean.add(algorithm.update(batch, generator))
        if step % 100 == 0 or step == steps:
            mean.check(f"cloning step {step}")
            report(step, mean.result())


class OffPolicyWorkflow:
    """While the simulators execute a chunk, the learner updates from the replay buffer; the number of updates per
    decision is fixed, so the result does not depend on who is faster."""

    pending = 0

    def __init__(
        self,
        worker: RolloutWorker,
        algorithm: OffPolicyAlgorithm,
        decisions: int,
        generator: torch.Generator,
        seed: int,
        demonstrations: Any,
        folder: Path,
    ) -> None:
        """`demonstrations`: what `algorithm.demonstrations` asks for; None in a run without any. `folder`: where a
        replay on disk is kept."""
        self.worker = worker
        self.algorithm = algorithm
        self.decisions = decisions
        self.generator = generator
        self.rng = np.random.default_rng(seed)
        config = algorithm.config
        self.buffer = ReplayBuffer(
            config.replay_capacity,
            worker.simulator.num_envs,
            algorithm.successes_kept,
            folder if config.replay_on_disk else None,
        )
        self.demonstrations = demonstrations
        if worker.intervene is not None and isinstance(demonstrations, ReplayBuffer):
            self.demonstrations = WithInterventions(demonstrations, self.buffer)
        self.potential = np.zeros(worker.simulator.num_envs, np.float32)
        self.due = 0.0
        """Updates owed to the decisions made so far."""
        if config.shaping and not all(task.has_success for task in worker.simulator.tasks):
            raise UserError("algorithm.shaping needs a task with a success signal: set it to 0 or choose another task")

    def restart(self, tickets: TicketCounter) -> None:
        self.worker.restart(tickets)

    def iterate(self, border: bool) -> Metrics:
        mean, episodes = Mean("loss"), list[Episode]()
        for decision in range(self.decisions):
            self.worker.begin(act=self.algorithm.act, exploration=self.algorithm.exploration)
            for _ in range(self._updates_due()):
                mean.add(self._update())
            mean.check(f"update {self.algorithm.updates}")
            done = self.worker.finish()
            self._record(done, border and decision == self.decisions - 1)
            episodes += done.result.episodes
        metrics = episode_metrics(episodes) | mean.result()
        if self.worker.intervene is not None:
            metrics["replay/intervened"] = self.buffer.intervened
        return metrics | {"replay/decisions": len(self.buffer), "replay/successful": self.buffer.successful}

    def _updates_due(self) -> int:
        config = self.algorithm.config
        if self.worker.env_steps < config.learning_starts or not len(self.buffer):
            return 0
        if not self.algorithm.updates:
            self.due += self.algorithm.warmup_updates
        self.due += config.updates_per_decision * self.worker.simulator.num_envs
        whole = int(self.due)
        self.due -= whole
        return whole

    def _update(self) -> dict[str, torch.Tensor]:
        batch = self.algorithm.draw(self.buffer, self.demonstrations, self.rng)
        return self.algorithm.update(batch, self.generator)

    def _record(self, decision: Decision, border: bool) -> None:
        """Store a decision. At a border the running episodes are cut there: truncated, hence bootstrapped."""
        result = decision.result
        rows = np.arange(len(result.valid))
        alive = result.valid.any(axis=1) & ~result.lost
        ended = np.isin(rows, result.final_rows)
        cut = alive & ~ended if border else np.zeros_like(ended)
        last = result.valid.sum(axis=1) - 1
        success = np.zeros(len(rows), bool) if result.success is None else (result.success & result.valid).any(axis=1)

        final = {name: tensor.numpy(force=True).copy() for name, tensor in decision.next_inputs.items()}
        if decision.final_inputs is not None:
            for name, tensor in decision.final_inputs.items():
                final[name][result.final_rows] = tensor.numpy(force=True)
        closed = np.flatnonzero(ended | cut)
        shaped = bool(self.algorithm.config.shaping)
        after = np.where(alive, result.reward[rows, last], self.potential) if shaped else self.potential
        reward = result.reward if not shaped else (result.success & result.valid).astype(np.float32)
        recorded = self.algorithm.recorded(decision.sample)
        if recorded is not decision.sample.actions and decision.intervened.any():
            raise UserError(
                "this algorithm chooses no actions, so a person's tell it nothing: intervene without steering"
            )
        self.buffer.add(
            inputs={name: tensor.numpy(force=True) for name, tensor in decision.inputs.items()},
            actions=recorded.numpy(force=True),
            reward=reward,
            valid=result.valid,
            terminated=result.terminated.any(axis=1),
            truncated=result.truncated.any(axis=1) | cut,
            success=success,
            final_inputs={name: column[closed] for name, column in final.items()},
            final_rows=closed,
            tickets=decision.tickets,
            lost=result.lost,
            potential=self.potential,
            final_potential=after[closed],
            intervened=(decision.intervened & result.valid).any(axis=1),
        )
        self.potential = np.where(ended | cut | result.lost, 0, after).astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict(), "due": self.due, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"])
        self.due = state["due"]
        self.rng.bit_generator.state = state["rng"]


class OfflineWorkflow:
    """Updates from recorded decisions alone; no environment is stepped."""

    pending = 0

    def __init__(
        self, algorithm: OfflineAlgorithm, replay: ReplayBuffer, generator: torch.Generator, seed: int
    ) -> None:
        self.algorithm = algorithm
        self.replay = replay
        self.generator = generator
        self.rng = np.random.default_rng(seed)

    def restart(self, tickets: TicketCounter) -> None:
        """No episodes are run."""

    def iterate(self, border: bool) -> Metrics:
        mean, config = Mean("loss"), self.algorithm.config
        for _ in range(min(config.updates_per_iteration, config.steps - self.algorithm.updates)):
            mean.add(self.algorithm.update(self.algorithm.draw(self.replay, self.rng), self.generator))
        mean.check(f"update {self.algorithm.updates}")
        return mean.result() | {"replay/decisions": len(self.replay)}

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]


class Mean:
    """Averages metrics of several updates; reads tensors only once, at the end."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._values: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        for name, value in metrics.items():
            self._values[name].append(value)

    def check(self, where: str) -> None:
        """Raises `UserError` naming `where` and the metric when the latest values are not all finite."""
        if not self._values or torch.stack([values[-1] for values in self._values.values()]).isfinite().all():
            return
        name, value = next((name, values[-1]) for name, values in self._values.items() if not values[-1].isfinite())
        raise UserError(
            f"{self.prefix}/{name} became {float(value)} at {where}: lower the learning rate or max_grad_norm, or "
            f"resume from an earlier checkpoint"
        )

    def result(self) -> Metrics:
        """The means so far, and start again."""
        means = {name: float(torch.stack(values).double().mean()) for name, values in self._values.items()}
        self._values.clear()
        return {f"{self.prefix}/{name}": value for name, value in means.items()}


def episode_metrics(episodes: Sequence[Episode]) -> Metrics:
    """Means over the episodes that ended in an iteration; nothing when none did."""
    if not episodes:
        return {}
    metrics = {
        "train/return": float(np.mean([episode.episode_return for episode in episodes])),
        "train/length": float(np.mean([episode.length for episode in episodes])),
        "train/episodes": len(episodes),
    }
    if all(episode.success_once is not None for episode in episodes):
        metrics["train/success"] = float(np.mean([bool(episode.success_once) for episode in episodes]))
    return metrics

"""Evaluation: a fixed list of episodes, run once each, reported with n and a 95 % Wilson interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embodied_rl.config import load, override
from embodied_rl.errors import UserError
from embodied_rl.pipeline.rollout import RolloutWorker
from embodied_rl.pipeline.tickets import TicketList
from embodied_rl.specs import Connection, connect
from embodied_rl.training import checkpoint
from embodied_rl.training.streams import Streams
from embodied_rl.types import Episode, Observation


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a proportion (E. B. Wilson, JASA 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return (low if successes else 0.0), (high if successes < n else 1.0)  # exact at the ends in spite of rounding


@dataclass(frozen=True)
class EvaluationResult:
    """What `episodes` episodes gave. `success` counts an episode that succeeded at any step (`success_once`)."""

    name: str
    episodes: int
    successes: int
    success: float | None
    """None when the task defines no success."""
    low: float
    high: float
    mean_return: float
    mean_length: float
    success_at_end: float | None = None
    """Share of the episodes that ended in success; None when the task defines none."""

    @staticmethod
    def of(name: str, episodes: list[Episode]) -> EvaluationResult:
        n = len(episodes)
        if n == 0:
            raise UserError(f"evaluation '{name}' has no episodes: ask for at least one")
        judged = all(episode.success_once is not None for episode in episodes)
        successes = sum(bool(episode.success_once) for episode in episodes)
        low, high = wilson(successes, n) if judged else (0.0, 1.0)
        return EvaluationResult(
            name=name,
            episodes=n,
            successes=successes,
            success=successes / n if judged else None,
            low=low,
            high=high,
            mean_return=float(np.mean([episode.episode_return for episode in episodes])),
            mean_length=float(np.mean([episode.length for episode in episodes])),
            success_at_end=float(np.mean([bool(episode.success_at_end) for episode in episodes])) if judged else None,
        )

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def run_episodes(worker: RolloutWorker, tickets: range, deterministic: bool = True) -> list[Episode]:
    """Run the episodes `tickets` once each and return their records in ticket order.

    An episode lost to a worker's death is run again with the same ticket, so the list is always complete. Abandons
    what `worker` was doing: call `worker.restart` before going on with training.
    """
    worker.restart(TicketList(tickets))
    episodes: list[Episode] = []
    while len(episodes) < len(tickets):
        worker.begin(deterministic)
        episodes += worker.finish().result.episodes
    return sorted(episodes, key=lambda episode: episode.ticket)


Ablation = Literal["images", "instruction"]


@dataclass(frozen=True)
class Ablated(Connection):
    """A connection that withholds something: the images are black, or every row is told the next task's instruction.
    What a policy's success loses by it is what the policy owes to looking or to listening."""

    without: Ablation = "images"

    def observation(self, observation: Observation) -> Observation:
        seen = super().observation(observation)
        if self.without == "images":
            return replace(seen, images={name: np.zeros_like(image) for name, image in seen.images.items()})
        return replace(seen, instruction_id=(seen.instruction_id + 1) % len(seen.instructions))


def evaluate_run(
    run_dir: Path,
    episodes: int,
    seed: int = 0,
    deterministic: bool = True,
    without: Ablation | None = None,
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run on `episodes` test episodes; `seed` 0 gives those of the run itself.
    `without` withholds something that the policy was trained with; `settings`, as on the command line, replace those of
    the run: another variant of the simulator, for example."""
    config = override(load(run_dir / "config.json"), settings)
    newest = checkpoint.latest(run_dir / "checkpoints")
    if newest is None:
        raise UserError(f"{run_dir} holds no checkpoint to evaluate; train it first")
    saved = checkpoint.load(newest)
    streams = Streams(config.seed, config.simulator.num_tasks, 1, episodes, seed, config.simulator.num_states)
    with config.simulator.build(streams) as simulator:
        policy = config.policy.build(simulator.observation_spec, simulator.action_spec)
        if config.algorithm is not None:
            policy = config.algorithm.build(policy, config.seed).policy  # it may be more than what was cloned
        try:
            policy.load_state_dict(saved["policy"])
        except (KeyError, RuntimeError) as error:
            raise UserError(f"checkpoint {newest} does not fit the policy of {run_dir}/config.json: {error}") from error
        connection = connect(
            simulator.observation_spec, simulator.action_spec, policy.observation_spec, policy.action_spec
        )
        if without == "instruction" and len(simulator.tasks) < 2:
            raise UserError(f"{run_dir} was trained on one task: there is no other instruction to swap its own with")
        if without == "images" and not policy.observation_spec.cameras:
            raise UserError(f"the policy of {run_dir} sees no images: there is nothing to withhold")
        if without:
            connection = Ablated(**vars(connection), without=without)
        worker = RolloutWorker(simulator, policy, connection, config.seed)
        result = EvaluationResult.of("test", run_episodes(worker, streams.episodes("test"), deterministic))
    return result.to_dict() | {
        "checkpoint": str(newest),
        "seed": seed,
        "deterministic": deterministic,
        "without": without,
    }

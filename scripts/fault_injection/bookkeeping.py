"""What must hold of a training whatever died in it, read from its files."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
from fault_injection.training import STEPS, Training

TENSORS = ("policy", "modules", "optimizers", "generator")
COUNTERS = ("iteration", "env_steps", "tickets", "counters", "workflow")


def learned(training: Training) -> list[dict[str, Any]]:
    """The batches that made the final weights: of those that were learned from anew after a death, the last ones."""
    batches: dict[int, dict[str, Any]] = {}
    for line in training.learned.read_text().splitlines():
        if line.endswith("}"):
            batch = json.loads(line)
            batches[batch["number"]] = batch
    return [batches[number] for number in sorted(batches)]


def once(training: Training, lost_episodes: int) -> dict[str, bool]:
    """Every segment was learned from exactly once. `lost_episodes`: of simulator processes that died, whose tickets
    begin again."""
    state, batches, rows = training.state(), learned(training), training.rows()
    count = state["workflow"]["version"]
    decisions: Counter[str] = Counter()
    lengths: dict[str, int] = {}
    ended = 0
    for batch in batches:
        decisions.update(batch["decisions"])
        lengths |= batch["ended"]
        ended += len(batch["ended"])
    longer = sum(decisions[ticket] > length for ticket, length in lengths.items())
    shorter = sum(decisions[ticket] < length for ticket, length in lengths.items())
    return {
        "every_batch_once": [batch["number"] for batch in batches] == list(range(count)),
        "no_batch_twice": len({batch["digest"] for batch in batches}) == count == state["counters"]["iterations"],
        "no_episode_twice": ended == len(lengths) and longer <= lost_episodes,
        "no_decision_lost": shorter == 0,
        "every_iteration_logged_once": [row["iteration"] for row in rows] == list(range(1, state["iteration"] + 1)),
    }


def steps(training: Training, dead_simulators: int, rows_each: int) -> dict[str, Any]:
    """The training ended where an undisturbed one ends; a simulator process that dies does not make the step that its
    environments were in."""
    state = training.state()
    missing = STEPS * training.setup.iterations - state["env_steps"]
    learned_from = sum(sum(batch["decisions"].values()) for batch in learned(training))
    dropped = state["env_steps"] - learned_from
    return {
        "same_iterations": state["iteration"] == training.setup.iterations,
        "same_steps": 0 <= missing <= dead_simulators * rows_each,
        "every_step_learned_from": 0 <= dropped <= dead_simulators * rows_each * STEPS,
        "steps_not_made": missing,
        "steps_of_lost_episodes": dropped,
    }


def same(training: Training, undisturbed: Training) -> dict[str, bool]:
    """Whether the newest checkpoints hold the same numbers."""
    mine, theirs = training.state(), undisturbed.state()
    return {
        "same_weights_and_states": all(_equal(mine[name], theirs[name]) for name in TENSORS),
        "same_counters": all(_equal(mine[name], theirs[name]) for name in COUNTERS),
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other

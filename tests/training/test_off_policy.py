"""Soft actor-critic and its relatives through whole runs on a toy task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interruption import interrupted_and_whole
from training_toys import off_policy

from embodied_rl.algorithms.sac import SACConfig
from embodied_rl.config import EvaluationConfig, RunConfig
from embodied_rl.errors import UserError
from embodied_rl.policies.squashed_gaussian import SquashedGaussianMLPConfig
from embodied_rl.training import checkpoint
from embodied_rl.training.evaluation import evaluate_run
from embodied_rl.training.metrics import read_metrics
from embodied_rl.training.run import train

LEARNING: dict[str, Any] = {
    "critic_hidden": (32, 32),
    "batch_size": 32,
    "learning_starts": 30,
    "replay_capacity": 800,
    "gamma_per": "step",
    "updates_per_decision": 0.25,
}


def small(**training: Any) -> RunConfig:
    """Five iterations of 32 steps, checkpoints after the second and the fourth."""
    sizes = {"env_steps": 160, "decisions_per_iteration": 4, "evaluate_every": 0}
    return replace(off_policy(**(sizes | training)), evaluation=EvaluationConfig(episodes=2))


def rlpd(**training: Any) -> RunConfig:
    """Demonstrations in every batch, two-step returns, shaping, chunks of two actions, the replay on disk."""
    config = small(**training)
    more: dict[str, Any] = {"symmetric": True, "n_step": 2, "critics": 4, "target_critics": 2, "critic_norm": "layer"}
    algorithm = SACConfig(shaping=1.0, replay_on_disk=True, **more, **LEARNING)
    policy = SquashedGaussianMLPConfig(chunk=2, hidden=(32, 32))
    return replace(config, recipe="toy_rlpd", policy=policy, imitation=None, algorithm=algorithm)


def crossq(**training: Any) -> RunConfig:
    """Without target networks and without demonstrations."""
    algorithm = SACConfig(critic_norm="batch_renorm", tau=None, **LEARNING)
    return replace(rlpd(**training), recipe="toy_crossq", demonstrations=None, algorithm=algorithm)


def dsrl(**training: Any) -> RunConfig:
    """A cloned flow, steered."""
    return replace(small(**training), recipe="toy_dsrl", algorithm=SACConfig(steer="chunk", **LEARNING))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("recipe", [rlpd, pytest.param(crossq, marks=SLOW), pytest.param(dsrl, marks=SLOW)])
def test_an_interrupted_run_goes_on_exactly(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, rows = interrupted_and_whole(recipe(), tmp_path, monkeypatch)
    assert "loss/critic_loss" in rows[-1]


@SLOW
def test_a_steered_run_keeps_the_clone_and_is_evaluated_as_it_was_trained(tmp_path: Path) -> None:
    config = dsrl()
    result = train(config, tmp_path / "run")
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    first, last = (checkpoint.load(folder)["policy"] for folder in (folders[0], folders[-1]))
    flow = [name for name in last if name.startswith("flow.")]
    assert flow and all(np.array_equal(first[name], last[name]) for name in flow)
    assert any(not np.array_equal(first[name], last[name]) for name in last if name.startswith("actor."))
    again = evaluate_run(tmp_path / "run", config.evaluation.episodes)
    assert again["mean_return"] == pytest.approx(result["evaluations"][1]["mean_return"])


def test_symmetric_batches_need_demonstrations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="learns from demonstrations"):
        train(replace(rlpd(), demonstrations=None), tmp_path / "run")


@SLOW
def test_a_person_may_take_over_in_a_run(tmp_path: Path) -> None:
    def person(observation: Any, proposed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Goes for the target wherever it is to the right."""
        towards = np.clip((observation.state[:, 2:] - observation.state[:, :2]) / 0.2, -1, 1)
        return np.repeat(towards[:, None], 2, 1), np.repeat(towards[:, :1] > 0.5, 2, 1)

    train(rlpd(), tmp_path / "run", intervene=person)
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert 0 < last["replay/intervened"] < last["replay/decisions"]
    with pytest.raises(UserError, match="intervene without steering"):
        train(dsrl(), tmp_path / "steered", intervene=person)

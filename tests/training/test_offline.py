"""Learning from recorded episodes alone, through whole runs on a toy task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interruption import interrupted_and_whole
from reach import LIMIT, Reach
from training_toys import ReachDemonstrator, off_policy

from embodied_rl.algorithms.iql import IQLConfig
from embodied_rl.config import DemonstrationsConfig, EvaluationConfig, RunConfig, TrainingConfig
from embodied_rl.data.demonstrations import DemonstrationEpisode, read, write
from embodied_rl.errors import UserError
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.simulators.base import InitialState
from embodied_rl.training.dry_run import dry_run
from embodied_rl.training.run import train


def record(path: Path, episodes: int) -> Path:
    """Every other episode by a demonstrator, the others at random, which mostly fail."""
    environment, demonstrator, rng = Reach(), ReachDemonstrator(), np.random.default_rng(0)
    found = []
    for seed in range(episodes):
        environment.reset(InitialState(0, seed, 0))
        states, steps = [environment.observe()["state"]], []
        actions = []
        for _ in range(LIMIT):
            wanted = demonstrator.actions(states[-1][None])[0] if seed % 2 else rng.uniform(-1, 1, 2)
            actions.append(np.asarray(wanted, np.float32))
            steps.append(environment.step(actions[-1]))
            states.append(environment.observe()["state"])
            if steps[-1][1] or steps[-1][2]:
                break
        rewards, terminated, truncated, success = (np.array(each) for each in zip(*steps, strict=True))
        found.append(
            DemonstrationEpisode(
                np.stack(states), np.stack(actions), rewards.astype(np.float32), success, terminated, truncated, seed
            )
        )
    write(path, found, "reach", "velocity")
    return path


def offline(path: Path, **settings: Any) -> RunConfig:
    algorithm = IQLConfig(critic_hidden=(32, 32), batch_size=64, gamma_per="step", gamma=0.9, shaping=1.0)
    return replace(
        off_policy(),
        recipe="toy_iql",
        policy=GaussianMLPConfig(chunk=2, hidden=(32, 32), value_hidden=(32,)),
        imitation=None,
        demonstrations=DemonstrationsConfig(episodes=None, path=str(path)),
        algorithm=replace(algorithm, **({"steps": 100, "updates_per_iteration": 20} | settings)),
        training=TrainingConfig(checkpoint_every=2, evaluate_every=2, development_episodes=2),
        evaluation=EvaluationConfig(episodes=2),
    )


def test_failed_episodes_are_part_of_the_dataset(tmp_path: Path) -> None:
    episodes = read(record(tmp_path / "mixed.h5", 20))
    failed = [episode for episode in episodes if not episode.succeeded]
    assert 5 < len(failed) < 15
    assert all(episode.truncated[-1] and not episode.terminated[-1] for episode in failed)
    assert all(episode.terminated[-1] for episode in episodes if episode.succeeded)


def test_an_interrupted_run_goes_on_exactly_and_steps_no_environment(tmp_path: Path, monkeypatch: Any) -> None:
    config = offline(record(tmp_path / "mixed.h5", 20))
    whole, rows = interrupted_and_whole(config, tmp_path, monkeypatch)
    assert whole["env_steps"] == 0 and whole["iterations"] == 5
    assert [row["updates"] for row in rows] == [20, 40, 60, 80, 100]
    assert rows[-1]["replay/decisions"] == sum(len(episode) for episode in read(tmp_path / "mixed.h5"))
    assert "updates</text>" in (tmp_path / "whole" / "report.html").read_text()


@pytest.mark.slow
def test_it_learns_from_mixed_episodes(tmp_path: Path) -> None:
    """Random actions are half of the data: cloning all of it does worse than weighing it."""
    path = record(tmp_path / "mixed.h5", 100)
    success = {}
    for beta in (0.0, 10.0):
        config = offline(path, steps=2000, updates_per_iteration=1000, learning_rate=1e-3, inverse_temperature=beta)
        config = replace(config, evaluation=EvaluationConfig(episodes=50))
        success[beta] = train(config, tmp_path / str(beta))["final_success"]
    assert success[10.0] > success[0.0] + 0.3, success


def test_what_cannot_be_learned_from_is_refused(tmp_path: Path) -> None:
    path = record(tmp_path / "mixed.h5", 4)
    for demonstrations, message in (
        (None, "the algorithm learns from demonstrations: add --demonstrations.path"),
        (DemonstrationsConfig(episodes=None), "none takes all of a dataset: add --demonstrations.path"),
        (DemonstrationsConfig(episodes=5, path=str(path)), "holds 4 demonstrations, 5 are asked for"),
    ):
        with pytest.raises(UserError, match=message):
            train(replace(offline(path), demonstrations=demonstrations), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_folder_is_read_as_a_lerobot_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"info\.json cannot be read"):
        train(offline(tmp_path), tmp_path / "run")


def test_actions_of_another_size_are_refused(tmp_path: Path) -> None:
    (episode,) = read(record(tmp_path / "one.h5", 1))
    write(tmp_path / "wide.h5", [replace(episode, actions=np.tile(episode.actions, 2))], "reach", "velocity")
    with pytest.raises(UserError, match="hold actions of 4 numbers, the simulator takes 2"):
        train(offline(tmp_path / "wide.h5"), tmp_path / "run")


def test_a_dry_run_counts_the_updates(tmp_path: Path) -> None:
    assert "100 of 64 recorded decisions" in dry_run(offline(tmp_path / "any.h5"))

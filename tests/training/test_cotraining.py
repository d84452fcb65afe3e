"""A second dataset in whole runs on a toy task: mixed cloning, co-training, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interruption import interrupted_and_whole
from test_off_policy import small
from training_toys import on_policy

from embodied_rl.algorithms.imitation import ImitationConfig
from embodied_rl.config import CoTrainingConfig, RunConfig, from_dict, override, to_dict
from embodied_rl.data.demonstrations import mixture_statistics, read
from embodied_rl.errors import UserError
from embodied_rl.policies.flow_mlp import FlowMLPConfig
from embodied_rl.specs import ActionSpec, ObservationSpec
from embodied_rl.training import checkpoint
from embodied_rl.training.demonstrations import collect
from embodied_rl.training.metrics import read_metrics
from embodied_rl.training.run import train
from embodied_rl.training.workflows import imitate


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("second") / "robot.h5"
    collect(replace(small(), seed=5), path, 3)
    return path


def cotrained(path: Path, **settings: Any) -> RunConfig:
    return replace(small(), cotraining=CoTrainingConfig(str(path), **settings))


def test_an_interrupted_run_goes_on_exactly(second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = cotrained(second, beta=0.5, batch_size=8)
    _, rows = interrupted_and_whole(config, tmp_path, monkeypatch)
    assert rows[-1]["loss/cotraining_loss"] > 0


def test_statistics_are_those_of_the_mixture_that_is_cloned(second: Path, tmp_path: Path) -> None:
    train(cotrained(second, share=0.25, beta=0.0), tmp_path / "run")
    files, random = (tmp_path / "run" / "demonstrations.h5", second), np.random.default_rng(0)
    states = [np.concatenate([episode.states[:-1] for episode in read(path)]) for path in files]
    drawn = [random.choice(each, n) for each, n in zip(states, (75_000, 25_000), strict=True)]
    mean, std = mixture_statistics(*states, share=0.25)
    np.testing.assert_allclose(mean, np.concatenate(drawn).mean(0), atol=0.01)
    np.testing.assert_allclose(std, np.concatenate(drawn).std(0), atol=0.01)
    saved = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints") or tmp_path)["policy"]
    np.testing.assert_allclose(saved["normaliser.state_mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(saved["normaliser.state_std"], std, rtol=1e-6)


def test_a_share_of_every_cloning_batch_is_of_the_second_dataset() -> None:
    def chunks(value: float, rows: int) -> dict[str, Any]:
        return {
            "inputs": {"state": torch.full((rows, 2), value)},
            "actions": torch.zeros(rows, 2, 1),
            "valid": torch.ones(rows, 2, dtype=torch.bool),
        }

    policy = FlowMLPConfig(horizon=2, chunk=2, hidden=(8,), value_hidden=(8,)).build(
        ObservationSpec(state=2), ActionSpec((-1.0,), (1.0,), (0.0,))
    )
    for share, expected in ((0.0, 0), (0.25, 4), (0.5, 8), (1.0, 16)):
        algorithm, seen = ImitationConfig().build(policy, 0), []
        update = algorithm.update
        algorithm.update = lambda batch, generator, seen=seen, update=update: (
            seen.append(int(batch["inputs"]["state"][:, 0].sum())) or update(batch, generator)
        )
        generator = torch.Generator().manual_seed(0)
        imitate(algorithm, chunks(0.0, 5), 3, 16, generator, lambda *_: None, chunks(1.0, 3), share)
        assert seen == [expected] * 3


def test_it_needs_no_demonstrations_besides(second: Path, tmp_path: Path) -> None:
    config = replace(on_policy(env_steps=100, evaluate_every=0), cotraining=CoTrainingConfig(str(second), beta=0.5))
    train(config, tmp_path / "run")
    assert "loss/cotraining_loss" in read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]


def test_settings_add_it_and_nonsense_is_refused(second: Path, tmp_path: Path) -> None:
    config = override(small(), ["--cotraining.path", str(second), "--cotraining.beta", "0.3"])
    assert config.cotraining == CoTrainingConfig(str(second), beta=0.3)
    assert from_dict(to_dict(config)) == config
    assert override(config, ["--cotraining", "none"]) == small()
    for settings, message in (
        (["--cotraining.share", "1.5"], "share must be between 0 and 1"),
        (["--cotraining.beta=-1"], "needs beta >= 0"),
        (["--cotraining.batch-size=0"], "batch_size >= 1"),
        (["--cotraining.bata", "1"], "did you mean --cotraining.beta"),
    ):
        with pytest.raises(UserError, match=message):
            override(config, settings)
    for settings, message in (
        (["--cotraining.path="], "add --cotraining.path FILE"),
        (["--cotraining.path", "nowhere.h5"], "nowhere.h5 is not a readable"),
        (["--cotraining.episodes", "9"], "holds 3 demonstrations, 9 are asked for"),
    ):
        with pytest.raises(UserError, match=message):
            train(override(config, settings), tmp_path / "run")
        assert not (tmp_path / "run").exists()

"""What states are normalised by without demonstrations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interruption import interrupted_and_whole
from training_toys import off_policy, on_policy

from embodied_rl.config import PipelineConfig, RunConfig
from embodied_rl.errors import UserError
from embodied_rl.training import checkpoint, run, statistics
from embodied_rl.training.run import train


def fitting(episodes: int = 5, **pipeline: Any) -> RunConfig:
    config = on_policy(statistics_episodes=episodes)
    return replace(config, pipeline=PipelineConfig(**pipeline))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The states that were asked for."""
    found: list[np.ndarray] = []
    states = statistics.states

    def watched(*arguments: Any) -> tuple[np.ndarray, int]:
        answer = states(*arguments)
        found.append(answer[0])
        return answer

    monkeypatch.setattr(statistics, "states", watched)
    return found


def policy_of(folder: Path) -> dict[str, Any]:
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest is not None
    return checkpoint.load(newest)["policy"]


@pytest.mark.parametrize("groups", [1, 2])
def test_they_are_those_of_the_first_episodes(seen: list[np.ndarray], tmp_path: Path, groups: int) -> None:
    result = train(fitting(env_groups=groups), tmp_path / "run")
    states = np.concatenate(seen)
    assert 5 <= len(states) <= 5 * 6  # of two steps each, at most twelve
    assert len(np.unique(states, axis=0)) == len(states), "every decision once"
    policy = policy_of(tmp_path / "run")
    np.testing.assert_allclose(policy["normaliser.state_mean"], states.mean(0), rtol=1e-5)
    np.testing.assert_allclose(policy["normaliser.state_std"], states.std(0), rtol=1e-5)
    assert result["phases"]["fit statistics"] > 0


def test_their_steps_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    fit = statistics.fit
    monkeypatch.setattr(run.statistics, "fit", lambda *arguments: counted.append(fit(*arguments)) or counted[0])
    with_them = train(fitting(), tmp_path / "with")["env_steps"]
    without = train(fitting(0), tmp_path / "without")["env_steps"]
    assert counted[0] > 0
    assert abs(with_them - without) < 64  # both end with the iteration that uses the budget up


def test_an_interrupted_run_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_and_whole(fitting(), tmp_path, monkeypatch)


def test_what_has_statistics_or_none_is_refused(tmp_path: Path) -> None:
    config = off_policy(statistics_episodes=5)
    with pytest.raises(UserError, match="demonstrations say what"):
        train(config, tmp_path / "cloned")

    assert not (tmp_path / "cloned").exists()

    class Without:
        """A policy."""

    with pytest.raises(UserError, match="does nothing for Without"):
        statistics.fit(None, Without(), range(3))  # type: ignore[arg-type]

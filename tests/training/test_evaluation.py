from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_toys import ReachConfig, off_policy, on_policy

from embodied_rl.errors import UserError
from embodied_rl.pipeline.rollout import RolloutWorker
from embodied_rl.specs import connect
from embodied_rl.training.evaluation import Ablated, Ablation, EvaluationResult, evaluate_run, run_episodes, wilson
from embodied_rl.training.run import train
from embodied_rl.training.streams import Streams
from embodied_rl.types import Observation


@given(st.integers(1, 500), st.data())
def test_wilson_bounds_solve_the_score_equation(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            z = abs(successes / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert z == pytest.approx(1.959964, abs=1e-4)


def test_wilson_against_published_values() -> None:
    # E. B. Wilson's interval for 81 of 263, in Newcombe, Statistics in Medicine 17 (1998), table I
    assert wilson(81, 263) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert wilson(0, 20) == (0.0, pytest.approx(0.1611, abs=5e-5))


def test_every_episode_is_run_once_and_does_not_depend_on_the_batch() -> None:
    streams = Streams(0, 1, development=3, test=11)
    found = []
    for num_envs in (1, 3, 16):
        with ReachConfig(num_envs=num_envs, workers=1).build(streams) as simulator:
            policy = on_policy().policy.build(simulator.observation_spec, simulator.action_spec)
            for index, parameter in enumerate(policy.parameters()):
                parameter.data.copy_(np_tensor(index, parameter))
            connection = connect(
                simulator.observation_spec, simulator.action_spec, policy.observation_spec, policy.action_spec
            )
            worker = RolloutWorker(simulator, policy, connection, seed=0)
            episodes = run_episodes(worker, streams.episodes("test"), deterministic=False)
            assert [episode.ticket for episode in episodes] == list(streams.episodes("test"))
            found.append([(episode.length, round(episode.episode_return, 4)) for episode in episodes])
    assert found[0] == found[1] == found[2]


def np_tensor(seed: int, like: object) -> object:
    import torch

    draw = np.random.default_rng(seed).normal(0, 0.3, tuple(like.shape)).astype(np.float32)  # type: ignore[attr-defined]
    return torch.from_numpy(draw)


def test_streams_are_disjoint_and_fixed() -> None:
    streams = Streams(7, 2, development=50, test=50)
    seeds = {name: {streams.state(t).seed for t in streams.episodes(name)} for name in ("development", "test")}
    training = {streams.state(streams.first("training") + i).seed for i in range(200)}
    demonstrations = {streams.state(streams.first("demonstrations") + i).seed for i in range(200)}
    groups = [seeds["development"], seeds["test"], training, demonstrations]
    assert sum(map(len, groups)) == len(set().union(*groups))
    again = Streams(8, 2, development=50, test=50)
    assert [again.state(t) for t in again.episodes("test")] == [streams.state(t) for t in streams.episodes("test")]
    assert [streams.state(t).task for t in streams.episodes("test")][:4] == [0, 1, 0, 1]


def test_a_run_is_evaluated_again_with_the_same_result(tmp_path: Path) -> None:
    result = train(off_policy(env_steps=100), tmp_path / "run")
    final = next(each for each in result["evaluations"] if each["name"] == "final")
    again = evaluate_run(tmp_path / "run", episodes=final["episodes"])
    assert {name: again[name] for name in ("successes", "mean_return", "mean_length")} == {
        name: final[name] for name in ("successes", "mean_return", "mean_length")
    }
    assert evaluate_run(tmp_path / "run", episodes=6, seed=1)["mean_return"] != again["mean_return"]
    with pytest.raises(UserError, match="2 workers for 1 environments"):
        evaluate_run(tmp_path / "run", 6, settings=["--simulator.num-envs", "1"])


def test_what_is_withheld_is_not_seen() -> None:
    observation = Observation(
        images={"wrist": np.full((2, 4, 4, 3), 7, np.uint8)},
        image_mask={"wrist": np.ones(2, bool)},
        state=np.ones((2, 3), np.float32),
        instruction_id=np.array([0, 2]),
        task=np.array([0, 2]),
        instructions=("open", "close", "push"),
    )
    blind, deaf = (Ablated([], without=what).observation(observation) for what in ("images", "instruction"))
    assert not blind.images["wrist"].any()
    assert np.array_equal(blind.instruction_id, [0, 2])
    assert np.array_equal(deaf.instruction_id, [1, 0])
    assert deaf.images["wrist"].all()
    assert blind.state is deaf.state is observation.state
    assert observation.images["wrist"].all()
    assert np.array_equal(observation.instruction_id, [0, 2])


@pytest.mark.parametrize(("what", "message"), [("images", "no images"), ("instruction", "one task")])
def test_what_a_policy_never_had_cannot_be_withheld(tmp_path: Path, what: Ablation, message: str) -> None:
    train(off_policy(env_steps=100), tmp_path / "run")
    with pytest.raises(UserError, match=message):
        evaluate_run(tmp_path / "run", 1, without=what)


def test_an_evaluation_without_episodes_is_refused() -> None:
    with pytest.raises(UserError, match="at least one"):
        EvaluationResult.of("final", [])


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        evaluate_run(tmp_path, 1)

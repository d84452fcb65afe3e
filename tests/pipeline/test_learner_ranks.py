"""Processes that learn together learn what one would."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from learner_toys import agree, built, episodes, learn, segment
from training_toys import metrics_of, on_policy

from embodied_rl.algorithms.grpo import GRPOConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import PipelineConfig
from embodied_rl.errors import LearnerDied, UserError
from embodied_rl.pipeline.learner_ranks import LearnerRanks
from embodied_rl.policies.flow_mlp import FlowMLPConfig
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.training import checkpoint
from embodied_rl.training.metrics import read_metrics
from embodied_rl.training.run import train

GAUSSIAN = GaussianMLPConfig(chunk=3, hidden=(11, 7), value_hidden=(5,))
FLOW = FlowMLPConfig(chunk=2, horizon=3, hidden=(9, 6), value_hidden=(5,), time_features=4, method="sde")
OFTEN: dict[str, Any] = {"learning_rate": 3e-2, "clip_low": 0.05, "clip_high": 0.05, "max_grad_norm": 0.05}
"""So that ratios and gradients are clipped."""
CASES = {
    "ppo": (
        GAUSSIAN,
        PPOConfig(epochs=1, minibatches=5, critic_warmup=1, entropy_coefficient=0.01, granularity="action", **OFTEN),
        segment,
        3,
    ),
    "ppo, stale, of a flow, in parts": (
        FLOW,
        PPOConfig(epochs=2, minibatches=5, microbatch=2, critic_warmup=0, staleness=1, kl_coefficient=0.1, **OFTEN),
        segment,
        1,
    ),
    "grpo, in parts": (GAUSSIAN, GRPOConfig(group_size=4, epochs=2, minibatches=5, microbatch=1, **OFTEN), episodes, 1),
    "fewer rows than ranks": (GAUSSIAN, GRPOConfig(group_size=4, epochs=1, minibatches=40, **OFTEN), episodes, 1),
}
SHARDINGS: list[Literal["none", "fsdp2"]] = ["none", "fsdp2"]


@pytest.fixture(scope="module")
def ranks() -> Iterator[LearnerRanks]:
    with LearnerRanks(2, torch.device("cpu")) as started:
        yield started


@pytest.fixture(scope="module")
def four() -> Iterator[LearnerRanks]:
    with LearnerRanks(4, torch.device("cpu")) as started:
        yield started


def batches_of(case: str, begin: int = 0) -> list[Any]:
    """What the case learns from; the first version of its policy collected all."""
    policy, algorithm, collect, count = CASES[case]
    actor = built(policy, algorithm).policy
    return [collect(actor, seed, 0 if algorithm.staleness else seed) for seed in range(begin, begin + count)]


def check(case: str, ranks: LearnerRanks, sharding: Literal["none", "fsdp2"]) -> None:
    policy, algorithm, *_ = CASES[case]
    batches = batches_of(case)
    alone = learn(policy, algorithm, batches)
    metrics = alone[1]
    assert sum(each["updates"] for each in metrics) >= 10
    assert metrics[-1]["clip_fraction"] > 0 and metrics[-1]["grad_norm"] > algorithm.max_grad_norm
    agree(alone, learn(policy, algorithm, batches, ranks, PipelineConfig(learners=2, sharding=sharding)))


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_learn_what_one_process_does(
    case: str, sharding: Literal["none", "fsdp2"], ranks: LearnerRanks
) -> None:
    check(case, ranks, sharding)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("case", CASES)
def test_four_ranks_learn_what_one_process_does(
    case: str, sharding: Literal["none", "fsdp2"], four: LearnerRanks
) -> None:
    check(case, four, sharding)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_what_ranks_load_they_save(sharding: Literal["none", "fsdp2"], ranks: LearnerRanks) -> None:
    policy, algorithm, *_ = CASES["ppo"]
    batches = batches_of("ppo")
    saved, _ = learn(policy, algorithm, batches)
    still = dataclasses.replace(algorithm, target_kl=1e-9)  # the policy has moved too far to learn from these again
    pipeline = PipelineConfig(learners=2, sharding=sharding)
    found, metrics = learn(policy, still, [dataclasses.replace(batches[0], version=3)], ranks, pipeline, saved)
    assert metrics[0]["updates"] == 0
    for part in ("policy", "optimizers"):
        torch.testing.assert_close(found[part], saved[part], rtol=0, atol=0)


@pytest.mark.slow
def test_a_checkpoint_goes_from_one_to_two_to_four_ranks_and_back(
    ranks: LearnerRanks, four: LearnerRanks, tmp_path: Path
) -> None:
    policy, algorithm, *_ = CASES["ppo"]
    sharded = PipelineConfig(learners=2, sharding="fsdp2")
    alone = together = learn(policy, algorithm, batches_of("ppo"))
    for index, where in enumerate([ranks, four, None], 1):
        saved = checkpoint.load(checkpoint.save(tmp_path / "checkpoints" / f"{index}", together[0]))
        batches = batches_of("ppo", 3 * index)
        together = learn(policy, algorithm, batches, where, sharded, saved)
        alone = learn(policy, algorithm, batches, saved=alone[0])
        agree(alone, together)


def kill(monkeypatch: pytest.MonkeyPatch, *batches: int) -> None:
    """A rank, when it is to learn from these, counting from 0."""
    improve, seen = LearnerRanks._improve, itertools.count()

    def killing(self: LearnerRanks, *batch: Any) -> Any:
        if next(seen) in batches:
            os.kill(self.pids[1], signal.SIGKILL)
        return improve(self, *batch)

    monkeypatch.setattr(LearnerRanks, "_improve", killing)


@pytest.mark.slow
def test_a_run_goes_back_to_its_last_checkpoint_when_a_rank_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_policy()
    train(config, tmp_path / "alone")
    kill(monkeypatch, 3)
    shared = dataclasses.replace(config, pipeline=PipelineConfig(learners=2, sharding="fsdp2"))
    assert train(shared, tmp_path / "shared")["learner_deaths"] == 1
    for mine, theirs in zip(losses(tmp_path / "alone"), losses(tmp_path / "shared"), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-3, abs=1e-4)


def test_a_learner_in_a_process_of_its_own_learns_the_same_beside_collecting(tmp_path: Path) -> None:
    config = on_policy()
    config = dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, staleness=1))
    train(config, tmp_path / "beside")
    train(dataclasses.replace(config, pipeline=PipelineConfig(learner_process=True)), tmp_path / "apart")
    assert (tmp_path / "apart" / "logs" / "learner-0.log").exists()
    assert losses(tmp_path / "apart") == losses(tmp_path / "beside")
    ends = [checkpoint.load(newest(tmp_path / name)) for name in ("beside", "apart")]
    for part in ("policy", "optimizers", "tickets", "counters"):
        torch.testing.assert_close(ends[0][part], ends[1][part], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_ranks_that_are_killed_change_nothing_that_is_learned(
    staleness: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_policy()
    algorithm = dataclasses.replace(config.algorithm, staleness=staleness)
    config = dataclasses.replace(config, algorithm=algorithm, pipeline=PipelineConfig(learners=2))
    whole = train(config, tmp_path / "whole")
    kill(monkeypatch, 0, 4, 6)  # the first batch, and the second after a checkpoint twice
    killed = train(config, tmp_path / "killed")
    assert killed["learner_deaths"] == 3 and whole["learner_deaths"] == 0
    assert killed["evaluations"] == whole["evaluations"] and killed["env_steps"] == whole["env_steps"]
    runs = [metrics_of(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("whole", "killed")]
    told = [[row.pop("learner/deaths") for row in found] for found in runs]
    assert runs[0] == runs[1] and len(runs[0]) > 4
    assert told[0] == [0] * len(runs[0]) and told[1] == sorted(told[1]) and told[1][-1] == 3
    ends = [checkpoint.load(folder) for name in ("whole", "killed") if (folder := newest(tmp_path / name))]
    for part in ("policy", "optimizers", "tickets", "counters"):
        torch.testing.assert_close(ends[0][part], ends[1][part], rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_whose_ranks_die_again_and_again_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill(monkeypatch, *range(1, 100))
    config = dataclasses.replace(on_policy(), pipeline=PipelineConfig(learners=2))
    with pytest.raises(LearnerDied, match=r"learner rank 1 of 2 ended \(signal SIGKILL\); resume the run"):
        train(config, tmp_path / "run")
    saved = checkpoint.load(newest(tmp_path / "run"))
    assert (saved["iteration"], saved["learner_deaths"]) == (0, 0)


def newest(out: Path) -> Path:
    found = checkpoint.latest(out / "checkpoints")
    assert found
    return found


def losses(out: Path) -> list[dict[str, float]]:
    """Of every iteration."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name.startswith(("loss/", "train/"))} for line in lines]


def test_learners_are_for_policy_gradients_and_without_co_training(tmp_path: Path) -> None:
    from training_toys import off_policy

    with pytest.raises(UserError, match=r"pipeline\.learners, .* do nothing for FlowActorCritic"):
        train(dataclasses.replace(off_policy(), pipeline=PipelineConfig(learners=2)), tmp_path / "run")
    with pytest.raises(UserError, match="sharding fsdp2 splits weights over learners"):
        PipelineConfig(sharding="fsdp2")

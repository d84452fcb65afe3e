"""Processes that learn together learn what one would."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from learner_toys import agree, built, episodes, learn, segment
from training_toys import on_policy

from embodied_rl.algorithms.grpo import GRPOConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import PipelineConfig
from embodied_rl.errors import LearnerDied, UserError
from embodied_rl.pipeline.learner_ranks import LearnerRanks
from embodied_rl.policies.flow_mlp import FlowMLPConfig
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.training import checkpoint
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


def test_a_run_ends_when_a_rank_is_killed_and_goes_on_with_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_policy()
    train(config, tmp_path / "alone")
    improve = LearnerRanks._improve
    killed = []

    def killing(self: LearnerRanks, *batch: Any) -> Any:
        if len(killed) == 3:
            os.kill(self.pids[1], signal.SIGKILL)
        killed.append(time.monotonic())
        return improve(self, *batch)

    monkeypatch.setattr(LearnerRanks, "_improve", killing)
    shared = dataclasses.replace(config, pipeline=PipelineConfig(learners=2, sharding="fsdp2"))
    with pytest.raises(LearnerDied, match=r"learner rank 1 of 2 ended \(signal SIGKILL\); resume the run"):
        train(shared, tmp_path / "shared")
    assert time.monotonic() - killed[-1] < 30
    train(config, tmp_path / "shared", resume=True)
    for mine, theirs in zip(losses(tmp_path / "alone"), losses(tmp_path / "shared"), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-3, abs=1e-4)


def losses(out: Path) -> list[dict[str, float]]:
    """Of every iteration."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name.startswith(("loss/", "train/"))} for line in lines]


def test_learners_are_for_policy_gradients_and_without_co_training(tmp_path: Path) -> None:
    from training_toys import off_policy

    with pytest.raises(UserError, match=r"pipeline\.learners and \.precision do nothing for FlowActorCritic"):
        train(dataclasses.replace(off_policy(), pipeline=PipelineConfig(learners=2)), tmp_path / "run")
    with pytest.raises(UserError, match="sharding fsdp2 splits weights over learners"):
        PipelineConfig(sharding="fsdp2")

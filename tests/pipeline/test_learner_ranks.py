"""Processes that learn together learn what one would."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from learner_toys import built, episodes, learn, segment

from embodied_rl.algorithms.grpo import GRPOConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import PipelineConfig
from embodied_rl.pipeline.learner_ranks import LearnerRanks
from embodied_rl.policies.flow_mlp import FlowMLPConfig
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig

GAUSSIAN = GaussianMLPConfig(chunk=3, hidden=(11, 7), value_hidden=(5,))
FLOW = FlowMLPConfig(chunk=2, horizon=3, hidden=(9, 6), value_hidden=(5,), time_features=4, method="sde")
OFTEN = {"learning_rate": 3e-2, "clip_low": 0.05, "clip_high": 0.05, "max_grad_norm": 0.05}
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


@pytest.fixture(scope="module")
def ranks() -> Iterator[LearnerRanks]:
    with LearnerRanks(2, torch.device("cpu")) as started:
        yield started


def agree(case: str, ranks: LearnerRanks, pipeline: PipelineConfig) -> None:
    """The same losses, weights and states as here."""
    policy, algorithm, collect, count = CASES[case]
    actor = built(policy, algorithm).policy
    batches = [collect(actor, seed, version=0 if algorithm.staleness else seed) for seed in range(count)]
    weights, metrics, states = learn(policy, algorithm, batches)
    assert sum(each["updates"] for each in metrics) >= 10
    assert metrics[-1]["clip_fraction"] > 0 and metrics[-1]["grad_norm"] > algorithm.max_grad_norm
    found, their_metrics, their_states = learn(policy, algorithm, batches, ranks, pipeline)
    torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(metrics, their_metrics, strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5, abs=1e-5)
    torch.testing.assert_close(their_states, states, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_learn_what_one_process_does(case: str, sharding: str, ranks: LearnerRanks) -> None:
    agree(case, ranks, PipelineConfig(learners=2, sharding=sharding))  # type: ignore[arg-type]

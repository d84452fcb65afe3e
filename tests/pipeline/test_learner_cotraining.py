"""Processes that learn together imitate a second dataset as one would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from learner_toys import agree, built, inputs_of, learn, segment

from embodied_rl.algorithms.cotraining import CoTraining
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import PipelineConfig
from embodied_rl.pipeline.learner_ranks import LearnerRanks
from embodied_rl.policies.flow_mlp import FlowMLPConfig

FLOW = FlowMLPConfig(chunk=2, horizon=3, hidden=(9, 6), value_hidden=(5,), time_features=4, method="sde")


@dataclass(frozen=True)
class CoTrained:
    """PPO beside a dataset of 11 chunks, the last of which have invalid steps."""

    microbatch: int | None
    batch_size: int
    beta: float = 0.7

    def build(self, policy: Any, seed: int) -> Any:
        config = PPOConfig(epochs=1, minibatches=5, critic_warmup=1, learning_rate=3e-2, microbatch=self.microbatch)
        generator = torch.Generator().manual_seed(8)
        actions = torch.rand(11, policy.horizon, policy.action_spec.dim, generator=generator)
        valid = torch.arange(11)[:, None] + torch.arange(policy.horizon) < 11
        data = {"inputs": inputs_of(policy, 9, 11), "actions": actions, "valid": valid}
        algorithm = config.build(policy, seed)
        algorithm.cotrain(CoTraining(policy, data, self.beta, self.batch_size, seed))
        return algorithm


@pytest.mark.parametrize(("rows", "batch", "ranks"), [(None, 6, 2), (2, 8, 2), (2, 5, 2), (1, 7, 4), (3, 3, 3)])
def test_the_parts_of_all_ranks_are_those_of_one_process(rows: int | None, batch: int, ranks: int) -> None:
    cotraining = built(FLOW, CoTrained(None, batch)).cotraining
    alone = [float(loss.detach()) for loss in cotraining.losses(4, rows)]
    each = [[float(loss.detach()) for loss in cotraining.losses(4, rows, rank, ranks)] for rank in range(ranks)]
    assert len({len(losses) for losses in each}) == 1, "all take part equally often"
    dealt = [losses[turn] for turn in range(len(each[0])) for losses in each]
    assert dealt == alone + [0.0] * (len(dealt) - len(alone))


@pytest.fixture(scope="module")
def ranks() -> Iterator[LearnerRanks]:
    with LearnerRanks(2, torch.device("cpu")) as started:
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
@pytest.mark.parametrize(("microbatch", "batch"), [(None, 6), (2, 8), (2, 5)])
def test_two_ranks_imitate_as_one_process_does(
    microbatch: int | None, batch: int, sharding: Literal["none", "fsdp2"], ranks: LearnerRanks
) -> None:
    algorithm = CoTrained(microbatch, batch)
    actor = built(FLOW, algorithm).policy
    batches = [segment(actor, seed, seed) for seed in range(3)]
    alone = learn(FLOW, algorithm, batches)
    assert alone[1][-1]["cotraining_loss"] > 0
    agree(alone, learn(FLOW, algorithm, batches, ranks, PipelineConfig(learners=2, sharding=sharding)))
    without = learn(FLOW, CoTrained(microbatch, batch, beta=0.0), batches)
    assert without[1][-1]["policy_loss"] != alone[1][-1]["policy_loss"], "it makes a difference"

"""Vision-language-action models in ranks: layers that are gathered one at a time, adapters, low precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from learner_toys import SPECS, agree, built, inputs_of, learn, segment

from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import PipelineConfig
from embodied_rl.errors import UserError
from embodied_rl.pipeline.learner_ranks import LearnerRanks
from embodied_rl.pipeline.learner_sharing import called_layers
from embodied_rl.policies.tiny_vla import TinyVLAConfig
from embodied_rl.specs import CameraSpec

pytestmark = pytest.mark.slow
SEES = replace(SPECS, observation=replace(SPECS.observation, cameras={"front": CameraSpec(32, 32)}))
TINY = TinyVLAConfig(prompt_length=8, horizon=2, chunk=2, value_trains_prefix=True)
PPO = PPOConfig(learning_rate=1e-3, epochs=1, minibatches=2, microbatch=4, critic_warmup=0, max_grad_norm=0.1)
SEEING = replace(TINY, frozen=("vision",))
KINDS = {
    "without convolutions": SEEING,
    "recomputed": replace(SEEING, gradient_checkpointing=True),
    "adapters": replace(TINY, lora_rank=2),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[LearnerRanks]:
    with LearnerRanks(2, torch.device("cpu")) as started:
        yield started


def batches_of(policy: Any) -> list[Any]:
    return [segment(built(policy, PPO, SEES).policy, 0, 0, steps=5, envs=3)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_learn_what_one_process_does(kind: str, ranks: LearnerRanks) -> None:
    policy = KINDS[kind]
    batches = batches_of(policy)
    alone = learn(policy, PPO, batches, specs=SEES)
    sharded = PipelineConfig(learners=2, sharding="fsdp2")
    agree(alone, learn(policy, PPO, batches, ranks, sharded, specs=SEES))


def test_layers_that_the_network_reaches_into_are_gathered_with_the_rest() -> None:
    policy = built(TINY, PPO, SEES).policy
    inputs = inputs_of(policy, 0, 1)
    names = {module: name for name, module in policy.named_modules()}
    layers = [names[layer] for layer in called_layers(policy, inputs, policy.act(inputs).trace)]
    assert sum("vision" in name for name in layers) == 2
    assert sum("expert" in name for name in layers) == 4
    assert sum("language" in name for name in layers) == 3  # of the last, the prefix needs keys and values alone


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_products_in_half_precision_change_little_and_weights_stay_as_they_are(
    sharding: Any, ranks: LearnerRanks
) -> None:
    batches = batches_of(SEEING)
    exact, metrics = learn(SEEING, PPO, batches, specs=SEES)
    half = PipelineConfig(learners=2, sharding=sharding, precision="bfloat16")
    found, half_metrics = learn(SEEING, PPO, batches, ranks, half, specs=SEES)
    assert {each.dtype for each in found["policy"].values()} == {each.dtype for each in exact["policy"].values()}
    assert half_metrics[0]["value_loss"] != metrics[0]["value_loss"]
    assert half_metrics[0]["value_loss"] == pytest.approx(metrics[0]["value_loss"], rel=2e-2)
    assert half_metrics[0]["grad_norm"] == pytest.approx(metrics[0]["grad_norm"], rel=0.1)


def test_trained_convolutions_are_refused_where_weights_are_split(ranks: LearnerRanks) -> None:
    with pytest.raises(UserError, match="does not train convolutions"):
        learn(TINY, PPO, batches_of(TINY), ranks, PipelineConfig(learners=2, sharding="fsdp2"), specs=SEES)

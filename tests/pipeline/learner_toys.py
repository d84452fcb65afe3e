"""Batches of random decisions, of which parts are invalid, for learners that must agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from embodied_rl.config import PipelineConfig
from embodied_rl.pipeline.learner_ranks import LearnerRanks
from embodied_rl.policies.gaussian_mlp import GaussianMLP, GaussianMLPConfig
from embodied_rl.simulators.worker import Specs
from embodied_rl.specs import ActionSpec, ObservationSpec
from embodied_rl.types import Episode, EpisodeBatch, Observation, Score, Trajectory

SPECS = Specs(ObservationSpec(state=5), ActionSpec(low=(-1.0,) * 2, high=(1.0,) * 2, hold=(0.0,) * 2), ())


@dataclass(frozen=True)
class ImpatientConfig(GaussianMLPConfig):
    """A policy that rank 1 cannot score by."""

    def build(self, observation_spec: ObservationSpec, action_spec: ActionSpec) -> GaussianMLP:
        return Impatient(self, observation_spec, action_spec)


class Impatient(GaussianMLP):
    def evaluate_actions(self, inputs: dict[str, Tensor], trace: dict[str, Tensor]) -> Score:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise RuntimeError("no more patience")
        return super().evaluate_actions(inputs, trace)


def built(policy: Any, algorithm: Any, specs: Specs = SPECS) -> Any:
    """The algorithm on its policy, with every weight away from its first value: gates of zero let no gradient through,
    and Adam makes steps of gradients that are rounding alone."""
    torch.manual_seed(0)
    made = policy.build(specs.observation, specs.action)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return algorithm.build(made, 0)


def inputs_of(policy: Any, seed: int, rows: int) -> dict[str, Tensor]:
    """Random states and images, and an instruction."""
    rng, spec = np.random.default_rng(seed), policy.observation_spec
    return policy.prepare(
        Observation(
            images={
                name: rng.integers(0, 256, (rows, view.height, view.width, 3), np.uint8)
                for name, view in spec.cameras.items()
            },
            image_mask={name: np.ones(rows, bool) for name in spec.cameras},
            state=rng.standard_normal((rows, spec.state), np.float32),
            instruction_id=np.zeros(rows, np.int64),
            task=np.zeros(rows, np.int64),
            instructions=("reach the cube",),
        )
    )


def segment(policy: Any, seed: int, version: int, steps: int = 7, envs: int = 5) -> Trajectory:
    """Episodes that end within chunks, and some decisions that nothing was executed of."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    inputs = inputs_of(policy, seed, steps * envs)
    sample = policy.act(inputs)
    shape = steps, envs, policy.chunk
    executed = torch.randint(policy.chunk + 1, (steps, envs, 1), generator=generator)
    valid = torch.arange(policy.chunk) < executed
    ends = torch.rand(shape, generator=generator)
    return Trajectory(
        inputs={name: each.unflatten(0, (steps, envs)) for name, each in inputs.items()},
        trace={name: each.unflatten(0, (steps, envs)) for name, each in sample.trace.items()},
        actions=sample.actions.unflatten(0, (steps, envs)),
        log_prob=sample.log_prob.unflatten(0, (steps, envs)),
        value=torch.randn(steps, envs, generator=generator),
        last_value=torch.randn(envs, generator=generator),
        final_value=torch.randn(steps, envs, generator=generator),
        reward=torch.randn(shape, generator=generator),
        terminated=(ends < 0.1) & valid,
        truncated=(ends > 0.9) & valid,
        valid=valid,
        tickets=torch.arange(envs).expand(steps, envs),
        version=version,
    )


def episodes(policy: Any, seed: int, version: int) -> EpisodeBatch:
    """Two groups of four episodes of several lengths."""
    whole = segment(policy, seed, version, steps=4, envs=8)
    keep = whole.valid.flatten(0, 1).any(1)

    def kept(x: Tensor) -> Tensor:
        return x.flatten(0, 1)[keep]

    generator = torch.Generator().manual_seed(seed)
    returns = torch.randn(8, generator=generator).tolist()
    return EpisodeBatch(
        inputs={name: kept(each) for name, each in whole.inputs.items()},
        trace={name: kept(each) for name, each in whole.trace.items()},
        log_prob=kept(whole.log_prob),
        reward=kept(whole.reward),
        valid=kept(whole.valid),
        tickets=kept(whole.tickets),
        version=version,
        episodes=[
            Episode(ticket, 0, ticket, 4, gain, gain > 0, gain > 0, False) for ticket, gain in enumerate(returns)
        ],
    )


def learn(
    policy: Any,
    algorithm: Any,
    batches: list[Any],
    ranks: LearnerRanks | None = None,
    pipeline: PipelineConfig | None = None,
    saved: dict[str, Any] | None = None,
    specs: Specs = SPECS,
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """(what a checkpoint holds, metrics of every batch) of learning from `batches`, here or in `ranks`, from the start
    or from a checkpoint."""
    learner = built(policy, algorithm, specs)
    generator = torch.Generator().manual_seed(3)
    if saved is not None:
        learner.policy.load_state_dict(saved["policy"])
        for name, optimizer in learner.optimizers().items():
            optimizer.load_state_dict(saved["optimizers"][name])
        learner.load_counters(saved["counters"])
        generator.set_state(saved["generator"])
    if ranks is not None:
        ranks.build(learner, policy, specs, 0, pipeline or PipelineConfig(learners=2))
        ranks.take_over(learner)
    metrics = [learner.learn(batch, generator) for batch in batches]
    states = {name: each.state_dict() for name, each in learner.optimizers().items()}
    tree = {
        "policy": dict(learner.policy.state_dict()),
        "optimizers": ranks.optimizers() if ranks is not None else states,
        "counters": learner.counters(),
        "generator": generator.get_state(),
    }
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree), metrics


def agree(one: tuple[dict[str, Any], Any], other: tuple[dict[str, Any], Any]) -> None:
    """Two results of `learn`, to the rounding of sums in another order."""
    (mine, metrics), (theirs, their_metrics) = one, other
    torch.testing.assert_close(theirs["policy"], mine["policy"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs["optimizers"], mine["optimizers"], rtol=1e-4, atol=1e-6)
    assert theirs["counters"] == mine["counters"] and torch.equal(theirs["generator"], mine["generator"])
    for found, expected in zip(their_metrics, metrics, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)

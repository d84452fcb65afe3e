"""What cannot be meant is refused with the reason, before anything runs."""

from collections.abc import Callable

import pytest
import torch

from embodied_rl.algorithms.flow_actor_critic import FlowActorCriticConfig
from embodied_rl.algorithms.grpo import GRPOConfig
from embodied_rl.algorithms.iql import IQLConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.algorithms.sac import SACConfig
from embodied_rl.errors import UserError
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.policies.squashed_gaussian import SquashedGaussianMLPConfig
from embodied_rl.specs import ActionSpec, ObservationSpec

SPECS = ObservationSpec(state=2), ActionSpec((-1.0,), (1.0,), (0.0,))

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a group of one": (lambda: GRPOConfig(group_size=1), "group_size must be at least 2"),
    "half of an odd batch": (lambda: SACConfig(batch_size=7, symmetric=True), "make it even"),
    "PPO without a value head": (
        lambda: PPOConfig().build(SquashedGaussianMLPConfig().build(*SPECS), 0),
        "needs a value head, which SquashedGaussianMLP has not: use grpo",
    ),
    "gamma of PPO": (lambda: PPOConfig(gamma=1.01), "0 < gamma <= 1"),
    "gamma of REINFORCE++": (lambda: GRPOConfig(advantage="reinforce++", gamma=0.0), "gamma"),
    "gamma of SAC": (lambda: SACConfig(gamma=0.0), "gamma must be above 0 and at most 1"),
    "gamma of IQL": (lambda: IQLConfig(gamma=2.0), "gamma must be above 0 and at most 1"),
    "gamma of the flow actor-critic": (lambda: FlowActorCriticConfig(gamma=-1.0), "gamma must be above 0"),
    "a replay smaller than a batch": (
        lambda: SACConfig(batch_size=64, replay_capacity=63),
        "replay_capacity 63 is below batch_size 64",
    ),
    "a discount of chunks that was not chosen": (
        lambda: SACConfig().build(SquashedGaussianMLPConfig(chunk=2).build(*SPECS), 0),
        "a chunk has 2 actions: choose gamma_per, 'decision' or 'step'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_meant_is_refused(what: str) -> None:
    build, reason = REFUSED[what]
    with pytest.raises(UserError, match=reason):
        build()


def test_a_batch_that_does_not_divide_is_split_as_evenly_as_it_can_be() -> None:
    algorithm = PPOConfig(minibatches=4, epochs=2).build(GaussianMLPConfig(hidden=(4,)).build(*SPECS), 0)
    parts = list(algorithm._minibatches(10, torch.Generator()))
    assert [len(part) for part in parts] == [3, 3, 2, 2] * 2
    assert sorted(torch.cat(parts[:4]).tolist()) == list(range(10))

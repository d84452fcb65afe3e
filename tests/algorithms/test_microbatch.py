"""A minibatch in parts is the minibatch."""

import dataclasses

import pytest
import torch
from algorithm_toys import ToyGaussian
from test_ppo import parameters, segment

from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.errors import UserError


def learn(config):
    """(parameters, metrics) in float64 after two iterations on chunks of which parts are invalid."""
    policy = ToyGaussian()
    trajectories = [segment(policy, seed) for seed in range(2)]
    algorithm = config.build(policy.double(), 0)
    metrics = {}
    for trajectory in trajectories:
        changes = {
            field.name: value.double()
            for field in dataclasses.fields(trajectory)
            if torch.is_tensor(value := getattr(trajectory, field.name)) and value.is_floating_point()
        }
        changes |= {
            "inputs": {name: value.double() for name, value in trajectory.inputs.items()},
            "trace": {name: value.double() for name, value in trajectory.trace.items()},
            "tickets": torch.arange(trajectory.valid.shape[1]).expand(len(trajectory.valid), -1),
        }
        metrics = algorithm.learn(dataclasses.replace(trajectory, **changes), torch.Generator().manual_seed(0))
    return parameters(policy), metrics


@pytest.mark.parametrize("mean_over", ["terms", "rows", "episodes"])
@pytest.mark.parametrize("granularity", ["chunk", "action", "token"])
def test_gradients_of_parts_add_up_to_those_of_the_whole(granularity, mean_over):
    whole = PPOConfig(
        granularity=granularity,
        mean_over=mean_over,
        entropy_coefficient=0.1,
        kl_coefficient=0.1,
        staleness=1,
        epochs=2,
        minibatches=2,
        critic_warmup=0,
    )
    expected, metrics = learn(whole)
    found, metrics_of_parts = learn(dataclasses.replace(whole, microbatch=3))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    for name, value in metrics.items():
        assert metrics_of_parts[name] == pytest.approx(value, rel=1e-5), name


def test_parts_are_no_larger_than_asked(monkeypatch):
    policy = ToyGaussian()
    sizes = []
    score = policy.evaluate_actions
    monkeypatch.setattr(policy, "evaluate_actions", lambda i, t: sizes.append(len(i["state"])) or score(i, t))
    PPOConfig(microbatch=4, minibatches=1, epochs=1, staleness=1, critic_warmup=0).build(policy, 0).learn(
        segment(policy), torch.Generator()
    )
    assert max(sizes) == 4 and min(sizes) >= 1


def test_an_empty_part_is_refused():
    with pytest.raises(UserError, match="microbatch must be at least 1"):
        PPOConfig(microbatch=0)


def test_the_second_decay_reaches_both_optimizers():
    algorithm = PPOConfig(adam_beta2=0.95).build(ToyGaussian(), 0)
    assert {optimizer.defaults["betas"] for optimizer in algorithm.optimizers().values()} == {(0.9, 0.95)}

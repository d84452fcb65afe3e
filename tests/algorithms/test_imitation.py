import math

import pytest
import torch
from algorithm_toys import ToyFlow, ToyGaussian

from embodied_rl.algorithms.imitation import ImitationConfig, mean_imitation_loss
from embodied_rl.errors import UserError


def batch(rows=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(rows, 3, generator=generator)
    return {
        "inputs": {"state": state},
        "actions": (state[:, :2, None] * torch.tensor([0.5, -0.5])),
        "valid": torch.rand(rows, 2, generator=generator) < 0.7,
    }


def test_it_clones_the_demonstrations():
    policy = ToyGaussian()
    algorithm = ImitationConfig(learning_rate=5e-2, steps=200).build(policy, 0)
    generator = torch.Generator().manual_seed(0)
    losses = [algorithm.update(batch(seed=i), generator)["loss"].item() for i in range(200)]
    assert losses[0] > 0.1 and losses[-1] < 1e-4
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_rows_without_a_valid_step_do_not_count():
    policy, data = ToyGaussian(), batch()
    data["valid"][::2] = False
    half = {
        "inputs": {"state": data["inputs"]["state"][1::2]},
        "actions": data["actions"][1::2],
        "valid": data["valid"][1::2],
    }
    torch.testing.assert_close(mean_imitation_loss(policy, data), mean_imitation_loss(policy, half))
    data["valid"][:] = False
    assert mean_imitation_loss(policy, data) == 0


def test_cosine_schedule_reaches_zero():
    algorithm = ImitationConfig(learning_rate=2.0, steps=4).build(ToyGaussian(), 0)
    rates = []
    for updates in (0, 1, 2, 4, 9):
        algorithm.load_counters({"updates": updates})
        rates.append(algorithm.learning_rate())
    assert rates == pytest.approx([2, 1 + math.sqrt(0.5), 1, 0, 0])
    algorithm = ImitationConfig(learning_rate=2.0, steps=4, schedule="constant").build(ToyGaussian(), 0)
    algorithm.load_counters({"updates": 3})
    assert algorithm.learning_rate() == 2


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="at least 1"):
        ImitationConfig(steps=0)


def test_an_update_is_a_function_of_its_generator():
    """Also for policies that draw noise in their loss, whatever the state of the global generator."""
    data = batch()
    results = []
    for global_seed in (1, 2):
        policy = ToyFlow(state=3, chunk=2, dim=2, width=16)
        algorithm = ImitationConfig().build(policy, 0)
        torch.manual_seed(global_seed)
        generator = torch.Generator().manual_seed(5)
        results.append([algorithm.update(data, generator)["loss"].item() for _ in range(3)])
    assert results[0] == results[1]
    assert len(set(results[0])) == 3

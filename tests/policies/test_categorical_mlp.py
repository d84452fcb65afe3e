"""The policy of discrete choices."""

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

from embodied_rl.errors import SpecError
from embodied_rl.policies import check
from embodied_rl.policies.categorical_mlp import CategoricalMLPConfig
from embodied_rl.randomness import RowNoise
from embodied_rl.registry import policies
from embodied_rl.specs import ActionSpec, ObservationSpec

OBSERVATION = ObservationSpec(state=5)
CHOICES = 4
ACTION = ActionSpec((0.0,), (CHOICES - 1.0,), (0.0,), control="discrete", choices=CHOICES)
CONFIG = CategoricalMLPConfig(hidden=(16,), value_hidden=(8,))


def build():
    torch.manual_seed(0)
    policy = CONFIG.build(OBSERVATION, ACTION)
    policy.set_statistics(np.linspace(-1, 1, 5), np.linspace(0.5, 2, 5))
    torch.nn.init.normal_(policy.logits[-1].weight)  # so that the choices are not all alike
    return policy


def test_keeps_the_contract():
    check(build(), fresh=build)
    assert policies.load("categorical_mlp") is CategoricalMLPConfig


def test_chooses_as_often_as_it_says_and_scores_as_torch_does():
    policy, rows = build(), 20_000
    inputs = {"state": torch.randn(1, 5).expand(rows, 5)}
    reference = Categorical(logits=policy.logits(policy.features(inputs)))
    sample = policy.act(inputs, noise=RowNoise(0, np.arange(rows), np.zeros(rows)))
    choice = sample.actions[:, 0, 0].long()
    often = choice.bincount(minlength=CHOICES) / rows
    torch.testing.assert_close(often, reference.probs[0], rtol=0, atol=0.015)
    score = policy.evaluate_actions(inputs, sample.trace)
    for log_prob in (sample.log_prob, score.log_prob):
        torch.testing.assert_close(log_prob[:, 0], reference.log_prob(choice))
    torch.testing.assert_close(score.entropy[:, 0], reference.entropy())
    likeliest = policy.act(inputs, deterministic=True).actions
    assert (likeliest == reference.probs[0].argmax()).all()


def test_cloning_raises_the_probability_of_the_recorded_choice():
    policy = build()
    inputs = {"state": torch.randn(6, 5)}
    actions = torch.arange(6).remainder(CHOICES).float()[:, None, None]
    valid = torch.ones(6, 1, dtype=torch.bool)
    valid[5] = False
    loss = policy.imitation_loss(inputs, actions, valid)
    reference = Categorical(logits=policy.logits(policy.features(inputs)))
    torch.testing.assert_close(loss[:5], -reference.log_prob(actions[:, 0, 0].long())[:5])
    assert loss[5] == 0


def test_continuous_actions_are_refused():
    with pytest.raises(SpecError, match="takes continuous actions"):
        CONFIG.build(OBSERVATION, ActionSpec((-1.0,), (1.0,), (0.0,)))

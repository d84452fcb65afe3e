"""The small policy that acts in tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

from embodied_rl.errors import UserError
from embodied_rl.policies import check
from embodied_rl.policies.token_mlp import TokenMLPConfig, cosines
from embodied_rl.randomness import RowNoise
from embodied_rl.registry import policies
from embodied_rl.specs import ActionSpec, ObservationSpec

ACTION = ActionSpec((-1.0, 0.0), (1.0, 0.1), (0.0, 0.0))
CONFIG = TokenMLPConfig(horizon=3, chunk=2, bins=5, temperature=0.7, hidden=(16,), value_hidden=(8,))


def build(config: TokenMLPConfig = CONFIG):
    torch.manual_seed(0)
    policy = config.build(ObservationSpec(state=5), ACTION)
    policy.set_statistics(np.linspace(-1, 1, 5), np.linspace(0.5, 2, 5))
    torch.nn.init.normal_(policy.network[-1].weight)  # so that the bins are not all alike
    return policy


def test_keeps_the_contract():
    check(build(), fresh=build)
    assert policies.load("token_mlp") is TokenMLPConfig


def test_draws_as_often_as_it_says_and_scores_as_torch_does():
    policy, rows = build(), 5_000
    inputs = {"state": torch.randn(1, 5).expand(rows, 5)}
    executed = policy.logits(inputs)[:, :4]  # 2 of 3 actions, 2 dimensions
    reference = Categorical(logits=executed / CONFIG.temperature)
    sample = policy.act(inputs, noise=RowNoise(0, np.arange(rows), np.zeros(rows)))
    tokens = sample.trace["tokens"]
    often = torch.nn.functional.one_hot(tokens, 5).double().mean(0)
    torch.testing.assert_close(often, reference.probs[0].double(), rtol=0, atol=0.03)
    score = policy.evaluate_actions(inputs, sample.trace)
    for log_prob in (sample.log_prob, score.log_prob):
        torch.testing.assert_close(log_prob, reference.log_prob(tokens))
    torch.testing.assert_close(score.entropy, reference.entropy())
    assert score.term_step.tolist() == [0, 0, 1, 1]
    likeliest = policy.act(inputs, deterministic=True).actions
    assert (likeliest == policy.actions(executed.argmax(-1))).all()


def test_a_recorded_trace_is_scored_by_its_own_temperature():
    policy, other = build(), build(replace(CONFIG, temperature=2.0))
    inputs = {"state": torch.randn(6, 5)}
    sample = policy.act(inputs)
    torch.testing.assert_close(other.evaluate_actions(inputs, sample.trace).log_prob, sample.log_prob)


def test_bins_reach_from_bound_to_bound_and_stand_for_what_is_nearest():
    policy = build()
    grid = policy.actions(torch.arange(5).repeat_interleave(2)[None])
    torch.testing.assert_close(grid[0, :, 0], torch.linspace(-1, 1, 5))
    torch.testing.assert_close(grid[0, :, 1], torch.linspace(0, 0.1, 5))
    assert (policy.tokens(grid) == torch.arange(5).repeat_interleave(2)).all()
    near = torch.tensor([[[0.24, 0.026], [0.26, 0.036], [-7.0, 0.3]]])
    assert policy.tokens(near).tolist() == [[2, 1, 3, 1, 0, 4]]


def test_actions_of_any_origin_are_scored_as_their_tokens():
    policy = build()
    inputs = {"state": torch.randn(6, 5)}
    sample = policy.act(inputs)
    again = policy.evaluate_actions(inputs, policy.trace(sample.actions))
    torch.testing.assert_close(again.log_prob, sample.log_prob)


def test_cloning_is_the_mean_cross_entropy_of_the_valid_steps():
    policy = build()
    inputs = {"state": torch.randn(4, 5)}
    actions = torch.rand(4, 3, 2) * torch.tensor([2.0, 0.1]) - torch.tensor([1.0, 0.0])
    valid = torch.arange(3) < torch.tensor([3, 2, 1, 0])[:, None]
    loss = policy.imitation_loss(inputs, actions, valid)
    log_prob = Categorical(logits=policy.logits(inputs)).log_prob(policy.tokens(actions)).unflatten(1, (3, 2))
    for row, steps in enumerate(valid.sum(1).tolist()):
        expected = -log_prob[row, :steps].mean() if steps else torch.tensor(0.0)
        torch.testing.assert_close(loss[row], expected)


@pytest.mark.parametrize("wrong", [{"bins": 1}, {"temperature": 0.0}, {"chunk": 4}, {"chunk": 0}, {"frequencies": 2}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(UserError, match="token_mlp: needs"):
        replace(CONFIG, **wrong)


@pytest.mark.parametrize("frequencies", [1, 3, 4])
def test_frequencies_keep_the_contract_and_move_whole_chunks(frequencies):
    config = replace(CONFIG, horizon=4, chunk=4, bins=201, frequencies=frequencies)
    check(build(config), fresh=lambda: build(config))
    policy = build(config)
    smooth = 0.4 + 0.3 * np.cos(np.pi * (frequencies - 1) / 4 * (np.arange(4) + 0.5))  # no higher frequency in it
    actions = torch.from_numpy(np.stack([smooth, 0.1 * smooth], 1)[None]).float()
    tokens = policy.tokens(actions)
    assert tokens.shape == (1, frequencies * 2)
    torch.testing.assert_close(
        policy.actions(tokens) / torch.tensor([1.0, 0.1]), actions / torch.tensor([1.0, 0.1]), rtol=0, atol=0.02
    )
    tokens[0, 0] += 10  # of the mean: a twentieth of the range
    moved = policy.actions(tokens) - policy.actions(policy.tokens(actions))
    torch.testing.assert_close(moved[0, :, 0], torch.full((4,), 0.1), rtol=0, atol=1e-5)


def test_frequencies_are_cosine_transforms():
    from scipy.fft import dct

    torch.testing.assert_close(cosines(6).double().numpy(), dct(np.eye(6), norm="ortho", axis=0), rtol=0, atol=1e-6)


def test_a_chunk_that_ends_early_is_cloned_as_if_its_last_action_were_held():
    config = replace(CONFIG, horizon=3, chunk=3, frequencies=2)
    policy, inputs = build(config), {"state": torch.randn(3, 5)}
    actions = torch.rand(3, 3, 2) * torch.tensor([2.0, 0.1]) - torch.tensor([1.0, 0.0])
    valid = torch.arange(3) < torch.tensor([3, 1, 0])[:, None]
    held = actions.clone()
    held[1] = actions[1, :1]
    expected = Categorical(logits=policy.logits(inputs)).log_prob(policy.tokens(held)).mean(1).neg()
    expected[2] = 0
    torch.testing.assert_close(policy.imitation_loss(inputs, actions, valid), expected)

"""Groups of whole episodes: statistics against slow versions, and what must not matter."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from algorithm_toys import ToyGaussian
from hypothesis import given
from hypothesis import settings as limit
from hypothesis import strategies as st
from torch import nn

from embodied_rl.algorithms.grpo import DAPOConfig, GRPOConfig, ReinforcePlusPlusConfig
from embodied_rl.algorithms.policy_gradient import episode_weights
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.errors import UserError
from embodied_rl.types import Episode, EpisodeBatch, Score

seeds = st.integers(0, 2**32 - 1)
K, DIM, G, GROUPS = 3, 2, 4, 3


class NoValue(ToyGaussian):
    """Without a value head."""

    def __init__(self):
        super().__init__()
        self.value_head = nn.Identity()

    def value(self, inputs):
        raise TypeError("no value head")


class Recorded(nn.Module):
    """Scores are what the inputs say; its only parameter is there to be trained."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.device = torch.device("cpu")

    def parameter_groups(self):
        return {"policy": [self.shift], "value": []}

    def evaluate_actions(self, inputs, trace):
        log_prob = inputs["log_prob"] + self.shift
        steps = torch.arange(log_prob.shape[1] // DIM).repeat_interleave(DIM)
        return Score(log_prob, torch.zeros_like(log_prob), steps)


def random_batch(rng, groups=GROUPS, size=G, decisions=4, chunk=K):
    """Episodes that end anywhere in a chunk, their decisions in time, mixed as rows of a simulator mix them."""
    rows, episodes = [], []
    for ticket in rng.permutation(groups * size).tolist():
        length = int(rng.integers(1, decisions * chunk + 1))
        rewards = rng.normal(size=length)
        for begin in range(0, length, chunk):
            executed = min(chunk, length - begin)
            reward = np.full(chunk, np.nan)
            reward[:executed] = rewards[begin : begin + executed]
            rows.append((begin, ticket, reward, np.arange(chunk) < executed))
        won = bool(rng.random() < 0.5)
        episodes.append(Episode(ticket, 0, 0, length, float(rewards.sum()), won, won, False))
    rows = [rows[i] for i in rng.permutation(len(rows))]
    rows.sort(key=lambda row: row[0])
    old = rng.normal(-1, 1, (len(rows), chunk * DIM))
    return EpisodeBatch(
        inputs={"log_prob": torch.as_tensor(old + rng.normal(0, 0.3, old.shape))},
        trace={},
        log_prob=torch.as_tensor(old),
        reward=torch.as_tensor(np.stack([row[2] for row in rows])),
        valid=torch.as_tensor(np.stack([row[3] for row in rows])),
        tickets=torch.tensor([row[1] for row in rows]),
        version=0,
        episodes=episodes,
    )


def grpo(config):
    return config.build(Recorded(), 0)


def settings(**changes):
    return GRPOConfig(**({"group_size": G, "groups_per_iteration": GROUPS} | changes))


def slow_advantages(batch, config):
    """{(ticket, decision): advantage}, with loops and dictionaries."""
    score, groups = {}, {}
    for episode in batch.episodes:
        value = episode.episode_return if config.score == "return" else float(episode.success_once)
        if config.max_length is not None:
            over = episode.length - (config.max_length - config.overlong_buffer)
            value -= config.overlong_penalty * max(over / config.overlong_buffer, 0)
        score[episode.ticket] = value
        groups.setdefault(episode.ticket // config.group_size, []).append(value)
    result, seen = {}, {}
    for ticket, valid, reward in zip(batch.tickets.tolist(), batch.valid, batch.reward, strict=True):
        paid = float(reward[valid].sum()) if config.score == "return" else 0.0
        seen.setdefault(ticket, []).append(paid)
    for ticket, paid in seen.items():
        group = np.array(groups[ticket // config.group_size])
        paid[-1] += score[ticket] - sum(paid)
        for t in range(len(paid)):
            if config.advantage == "reinforce++":
                value = sum(config.gamma ** (u - t) * paid[u] for u in range(t, len(paid)))
            else:
                value = score[ticket] - group.mean()
                if config.advantage == "grpo" and config.normalize_std:
                    value /= group.std(ddof=1) + 1e-6
            result[ticket, t] = value
    if config.advantage != "grpo":
        values = np.array(list(result.values()))
        mean, std = values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0
        result = {key: (value - mean) / (std + 1e-8) for key, value in result.items()}
    return result


def by_decision(batch, advantages):
    count, found = {}, {}
    for ticket, advantage in zip(batch.tickets.tolist(), advantages.tolist(), strict=True):
        found[ticket, count.setdefault(ticket, 0)] = advantage
        count[ticket] += 1
    return found


KINDS = [
    {},
    {"normalize_std": False},
    {"score": "success"},
    {"max_length": 10, "overlong_buffer": 4, "overlong_penalty": 0.5},
    {"advantage": "reinforce++", "gamma": 0.9},
    {"advantage": "reinforce++", "gamma": 0.9, "score": "success", "max_length": 9},
    {"advantage": "reinforce++_baseline"},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@limit(max_examples=20)
@given(seed=seeds)
def test_advantages_agree_with_their_definition(kind, seed):
    batch, config = random_batch(np.random.default_rng(seed)), settings(**kind)
    found = by_decision(batch, grpo(config).advantages(batch))
    expected = slow_advantages(batch, config)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@limit(max_examples=20)
@given(seed=seeds)
def test_the_order_of_environments_does_not_change_advantages(kind, seed):
    rng = np.random.default_rng(seed)
    batch, algorithm = random_batch(rng), grpo(settings(**kind))
    shuffled = replace(batch, episodes=[batch.episodes[i] for i in rng.permutation(len(batch.episodes))])
    one = by_decision(batch, algorithm.advantages(batch))
    # other rows: episodes one after the other
    order = batch.tickets.argsort(stable=True)
    for name in ("reward", "valid", "tickets"):
        setattr(shuffled, name, getattr(batch, name)[order])
    two = by_decision(shuffled, algorithm.advantages(shuffled))
    np.testing.assert_allclose([two[key] for key in one], list(one.values()), rtol=1e-9, atol=1e-9)


@limit(max_examples=20)
@given(seed=seeds, group=st.integers(0, GROUPS - 1))
def test_groups_never_mix(seed, group):
    rng = np.random.default_rng(seed)
    batch, algorithm = random_batch(rng), grpo(settings())
    before = algorithm.advantages(batch)
    for episode in batch.episodes:
        if episode.ticket // G != group:
            episode.episode_return += float(rng.normal(0, 100))
    mine = batch.tickets // G == group
    assert torch.equal(algorithm.advantages(batch)[mine], before[mine])
    alone = replace(batch, episodes=[each for each in batch.episodes if each.ticket // G == group])
    for name in ("reward", "valid", "tickets"):
        setattr(alone, name, getattr(batch, name)[mine])
    torch.testing.assert_close(algorithm.advantages(alone), before[mine], rtol=1e-12, atol=1e-12)


def loss_of(batch, config):
    """(loss, its gradient by the recorded log-probs)."""
    algorithm = grpo(config)
    log_prob = batch.inputs["log_prob"].clone().requires_grad_()
    rows = {
        "log_prob": batch.log_prob,
        "valid": batch.valid,
        "advantages": algorithm.advantages(batch),
        "weight": episode_weights(batch.valid, batch.tickets),
    }
    score = algorithm.policy.evaluate_actions({"log_prob": log_prob}, {})
    loss, _ = algorithm.policy_loss(rows, score)
    loss.backward()
    return loss.detach(), log_prob.grad


@pytest.mark.parametrize("granularity", ["token", "action", "chunk"])
@pytest.mark.parametrize("mean_over", ["terms", "rows", "episodes"])
@limit(max_examples=20)
@given(seed=seeds, garbage=st.sampled_from([math.nan, math.inf, 1e30]))
def test_actions_that_were_not_executed_have_no_gradient(granularity, mean_over, seed, garbage):
    batch = random_batch(np.random.default_rng(seed))
    config = settings(granularity=granularity, mean_over=mean_over)
    unused = ~batch.valid.repeat_interleave(DIM, 1)
    clean = loss_of(batch, config)
    for scores in (batch.log_prob, batch.inputs["log_prob"]):
        scores[unused] = garbage
    dirty = loss_of(batch, config)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert (dirty[1][unused] == 0).all() and (dirty[1][~unused] != 0).any()


@pytest.mark.parametrize("mean_over", ["terms", "episodes"])
@limit(max_examples=20)
@given(seed=seeds)
def test_a_chunk_is_its_single_steps(mean_over, seed):
    """Per action, with the return of whole episodes, wherever in a chunk they end."""
    batch = random_batch(np.random.default_rng(seed))
    executed = batch.valid.flatten()

    def single(x):
        return x.reshape(len(executed), -1)[executed]

    steps = replace(
        batch,
        inputs={"log_prob": single(batch.inputs["log_prob"])},
        log_prob=single(batch.log_prob),
        reward=single(batch.reward),
        valid=single(batch.valid),
        tickets=single(batch.tickets.repeat_interleave(K)).squeeze(1),
    )
    config = settings(granularity="action", mean_over=mean_over)
    (chunks, chunk_gradient), (singles, gradient) = loss_of(batch, config), loss_of(steps, config)
    torch.testing.assert_close(chunks, singles, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(single(chunk_gradient), gradient, rtol=1e-5, atol=1e-8)


@limit(max_examples=20)
@given(seed=seeds)
def test_long_and_short_episodes_weigh_the_same_over_episodes(seed):
    batch = random_batch(np.random.default_rng(seed))
    weight = episode_weights(batch.valid, batch.tickets)
    for ticket in batch.tickets.unique():
        mine = batch.tickets == ticket
        assert float(weight[mine].sum()) == pytest.approx(1, rel=1e-5)
        steps = batch.valid[mine].sum(1)
        torch.testing.assert_close(weight[mine] * steps.sum(), steps.float())


def test_groups_that_say_nothing_are_found():
    returns = [1.0, 1.0, 0.1 + 0.2, 0.3, 0.0, 1.0]
    episodes = [Episode(t, 0, 0, 5, r, None, None, False) for t, r in enumerate(returns)]

    def informative(**changes):
        return grpo(settings(group_size=2, **changes)).informative(episodes).tolist()[::2]

    assert informative() == [True, True, True]
    assert informative(drop_uniform=True) == [False, False, True]
    assert informative(keep_mean=(0.2, 0.9)) == [False, True, True]
    assert informative(keep_mean=(0.2, 0.9), drop_uniform=True) == [False, False, True]
    with pytest.raises(UserError, match="defines success"):
        informative(score="success")


def pushed(policy, seed, target, groups=8, size=8):
    """Episodes of one decision: the nearer the actions are to `target`, the larger the return."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(groups, policy.observation_spec.state, generator=generator).repeat_interleave(size, 0)
    torch.manual_seed(seed)
    mean = policy.mean(state)
    x = (mean + torch.randn(mean.shape) * policy.log_std.exp()).detach()
    reward = -(x.reshape(len(x), policy.chunk, -1) - target).square().sum(-1)
    log_prob = policy.evaluate_actions({"state": state}, {"x": x}).log_prob.detach()
    episodes = [Episode(t, 0, 0, 2, float(r.sum()), None, None, False) for t, r in enumerate(reward)]
    tickets, valid = torch.arange(len(x)), torch.ones(reward.shape, dtype=torch.bool)
    return EpisodeBatch({"state": state}, {"x": x}, log_prob, reward, valid, tickets, 0, episodes)


@pytest.mark.parametrize(
    "config",
    [
        GRPOConfig(granularity="action"),
        DAPOConfig(granularity="token"),
        ReinforcePlusPlusConfig(),
        ReinforcePlusPlusConfig(group_size=8, advantage="reinforce++_baseline"),
    ],
    ids=lambda config: f"{type(config).__name__}-{config.granularity}-{config.advantage}",
)
def test_it_finds_the_rewarded_action_without_a_value_head(config):
    target = torch.tensor([0.8, -0.4])
    policy = NoValue()
    algorithm = replace(config, learning_rate=4e-2).build(policy, 0)
    generator = torch.Generator().manual_seed(0)
    history = [algorithm.learn(pushed(policy, i, target), generator) for i in range(12)]
    assert history[-1]["score"] > 0.5 * history[0]["score"]
    assert (policy.mean.bias.detach().reshape(2, 2).mean(0) - target).abs().max() < 0.25
    assert history[0]["decisions"] == 64 and history[0]["groups"] == 64 / config.group_size


def test_nothing_informative_changes_nothing():
    batch = random_batch(np.random.default_rng(0))
    for name in ("log_prob", "reward", "valid", "tickets"):
        setattr(batch, name, getattr(batch, name)[:0])
    batch.inputs["log_prob"] = batch.inputs["log_prob"][:0]
    for advantage in ("grpo", "reinforce++", "reinforce++_baseline"):
        algorithm = grpo(settings(advantage=advantage))
        metrics = algorithm.learn(batch, torch.Generator())
        assert metrics["updates"] == 0 and metrics["groups"] == GROUPS
        assert algorithm.policy.shift == 0


def test_the_reference_is_the_policy_at_the_start_and_holds_the_policy_back():
    def drift(coefficient):
        policy = NoValue()
        start = policy.mean.bias.detach().clone()
        algorithm = GRPOConfig(learning_rate=2e-2, kl_coefficient=coefficient).build(policy, 0)
        generator, target = torch.Generator().manual_seed(0), torch.tensor([0.8, -0.4])
        metrics = [algorithm.learn(pushed(policy, i, target), generator) for i in range(8)]
        return (policy.mean.bias.detach() - start).norm(), metrics, algorithm, start

    free, metrics, algorithm, _ = drift(0.0)
    assert "kl" not in metrics[0] and algorithm.modules() == {}
    held, metrics, algorithm, start = drift(10.0)
    assert held < 0.5 * free and 0 < metrics[-1]["kl"] < 0.1
    assert torch.equal(algorithm.modules()["reference"].get_parameter("mean.bias"), start)
    assert not any(parameter.requires_grad for parameter in algorithm.modules()["reference"].parameters())


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"group_size": 1}, "at least 2"),
        ({"groups_per_iteration": 0}, "groups_per_iteration"),
        ({"further_groups": 3}, "drop_uniform"),
        ({"keep_mean": (0.9, 0.1)}, "keep_mean"),
        ({"gamma": 1.5}, "gamma"),
        ({"clip_low": 1.0}, "clip_low"),
        ({"kl_coefficient": -1.0}, "kl_coefficient"),
        ({"target_kl": 0.0}, "target_kl"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, word):
    with pytest.raises(UserError, match=word):
        GRPOConfig(**wrong)


def test_ppo_without_a_value_head_is_refused():
    with pytest.raises(UserError, match="value head"):
        PPOConfig().build(NoValue(), 0)

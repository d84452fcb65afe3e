"""Groups, REINFORCE++, DAPO and the decoupled loss, number by number against the fixtures' libraries.

Where RLinf differs it is a defect, which is not reproduced: see docs/algorithms.md.
"""

import math

import pytest
import torch
from cases import arrays, load
from test_algorithms import close, leaf

from embodied_rl.algorithms.advantages import (
    group_advantages,
    group_statistics,
    normalize,
    overlong_penalty,
    returns_to_go,
)
from embodied_rl.algorithms.losses import (
    aggregate,
    importance_weight,
    interpolate,
    kl_estimate,
    policy_loss,
    value_loss,
)


def population(x, mask):
    """What `normalize` gives with an unbiased std, with the population's instead."""
    return normalize(x, mask) * math.sqrt(mask.sum() / (mask.sum() - 1))


@pytest.mark.parametrize("file", arrays("grpo_reinpp_verl"))
def test_group_advantages_and_reinforce_plus_plus_of_verl(file):
    d = load(file)
    mask, group = d["mask"].bool(), d["group"]
    score = torch.where(mask, d["token_rewards"], 0.0).sum(1)
    close(group_advantages(score, group)[:, None] * mask, d["grpo"])
    close(group_advantages(score, group, by_std=False)[:, None] * mask, d["grpo_nostd"])
    baseline = group_advantages(score, group, by_std=False)[:, None].expand_as(mask)
    close(normalize(baseline, mask) * mask, d["reinpp_baseline"])
    returns = returns_to_go(torch.where(mask, d["token_rewards_kl"], 0.0), d["gamma"])
    close(returns * mask, d["reinpp_returns"] * mask)
    close(normalize(returns, mask) * mask, d["reinpp"])


@pytest.mark.parametrize("file", arrays("grpo_rlinf*"))
def test_group_advantages_of_rlinf(file):
    d = load(file)
    rewards, dones, mask = d["rewards"], d["dones"], d["loss_mask"]
    if d["advantages"].shape[-1] == 1:
        rewards, dones, mask = rewards.sum(-1, keepdim=True), dones.any(-1, keepdim=True), mask.any(-1, keepdim=True)
    steps, rows, width = rewards.shape
    reward = rewards.transpose(1, 2).reshape(-1, rows)
    done = dones.transpose(1, 2).reshape(-1, rows)[-len(reward) :]
    first = torch.cat([torch.zeros(1, rows, dtype=torch.int64), done.long().cumsum(0)])[:-1] == 0
    score = torch.where(first, reward, 0.0).sum(0)
    advantages = group_advantages(score, torch.arange(rows) // d["group_size"])
    close(advantages[:, None].expand(steps, rows, width) * mask, d["advantages"])


@pytest.mark.parametrize("file", arrays("reinpp_openrlhf*"))
def test_reinforce_plus_plus_of_openrlhf(file):
    d = load(file)
    mask, score = d["mask"].bool(), d["scores"]
    if "baseline" in file.stem:
        group = torch.arange(len(score)) // d["group_size"]
        score = group_advantages(score, group, by_std=False)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    reward = torch.zeros(mask.shape).scatter(1, last[:, None], score[:, None])
    returns = returns_to_go(reward, d["gamma"])
    close(returns * mask, d["returns"] * mask)
    close(population(returns, mask) * mask, d["advantages"] * mask)


@pytest.mark.parametrize("file", arrays("reinpp_rlinf_fullmask"))
def test_reinforce_plus_plus_of_rlinf(file):
    d = load(file)
    mask = d["loss_mask"].bool()
    reward = torch.zeros(mask.shape)
    reward[-1] = d["scores"]
    close(population(returns_to_go(reward.T, 1.0).T, mask), d["advantages"])
    reward = reward - d["kl_beta"] * kl_estimate(d["logprob"], d["ref_logprob"], "k3")
    close(population(returns_to_go(reward.T, 1.0).T, mask), d["advantages_kl"])


@pytest.mark.parametrize("file", arrays("dapo_dynamic_filter"))
def test_the_filters_of_groups(file):
    d = load(file)
    rewards = d["rewards"].double()
    mean, std = group_statistics(rewards.flatten(), torch.arange(len(rewards)).repeat_interleave(rewards.shape[1]))
    mean, std = mean.view_as(rewards)[:, 0], std.view_as(rewards)[:, 0]
    assert torch.equal(std > 1e-6, d["keep_std"].bool())
    assert torch.equal((d["lower"] <= mean) & (mean <= d["upper"]), d["keep_rlinf_bounds"].bool())


@pytest.mark.parametrize("file", arrays("dapo_overlong"))
def test_the_penalty_of_overlong_episodes(file):
    d = load(file)
    close(overlong_penalty(d["length"].float(), d["max_len"], d["buffer"], d["penalty"]), d["overlong_reward"])


@pytest.mark.parametrize("file", arrays("dapo_verl*"))
def test_the_losses_of_dapo_of_verl(file):
    d = load(file)
    log_prob, value, mask = leaf(d["logprob"]), leaf(d["values"]), d["mask"].bool()
    rows, tokens = mask.shape

    def mean(x):
        total = torch.where(mask, x, 0.0).sum()
        return {
            "token_mean": lambda: aggregate(x, mask),
            "seq_mean_token_mean": lambda: aggregate(x, mask, "rows"),
            "seq_mean_token_sum": lambda: total / rows,
            "seq_mean_token_sum_norm": lambda: total / tokens,
        }[file.stem.removeprefix("dapo_verl_")]()

    clips = d["clip_low"], d["clip_high"], d["dual_clip"]
    losses, clipped = policy_loss(log_prob, d["old_logprob"], d["advantages"], mask, *clips)
    actor = mean(losses)
    critic = mean(value_loss(value, d["old_values"], d["returns"], d["value_clip"]))
    (actor + critic).backward()
    close(actor.detach(), d["policy_loss"])
    close(critic.detach(), d["value_loss"])
    close(aggregate(clipped.float(), mask), d["clipfrac"])
    close(log_prob.grad, d["grad_logprob"])
    close(value.grad, d["grad_values"])


def decoupled(d, log_prob, proximal):
    mask = d["mask"].bool()
    clips = d["clip_low"], d["clip_high"], d["dual_clip"]
    return policy_loss(log_prob, proximal, d["advantages"], mask, *clips)[0], mask


@pytest.mark.parametrize("file", arrays("async_ppo_areal*"))
def test_the_decoupled_loss_of_areal(file):
    """Our loss has its kinds "none" (no limit) and "mask"; the others only differ in the weights."""
    d, kind = load(file), file.stem.rpartition("_")[2]
    log_prob, proximal, behavior = leaf(d["logprob"]), d["proximal_logprob"], d["behaviour_logprob"]
    losses, mask = decoupled(d, log_prob, proximal)
    if kind == "mask":
        weight = importance_weight(proximal, behavior, mask, d["upper"])
    elif kind == "clamp":
        weight = importance_weight(proximal, behavior, mask, math.inf).clamp(d["lower"], d["upper"])
    elif kind == "seqmask":
        mean = (torch.where(mask, proximal - behavior, 0.0).sum(1) / mask.sum(1).clamp(min=1)).exp()[:, None]
        weight = torch.where((d["lower"] <= mean) & (mean <= d["upper"]), mean, 0.0)
    else:
        weight = torch.ones_like(losses)
    loss = aggregate(losses * weight, mask)
    loss.backward()
    close(loss.detach(), d["loss"])
    close(log_prob.grad, d["grad_logprob"])


@pytest.mark.parametrize("file", arrays("async_ppo_*"))
def test_interpolated_log_probs_of_areal_and_rlinf(file):
    d = load(file)
    lag = d["current_version"] - 1 - d["versions"]
    behavior, log_prob = d["behaviour_logprob"], leaf(d["logprob"])
    parts = [interpolate(behavior, d["logprob"], int(steps)) for steps in lag.clamp(min=0).unique()]
    index = torch.searchsorted(lag.clamp(min=0).unique(), lag.clamp(min=0))
    mixed = torch.stack(parts).gather(0, index[None])[0]
    proximal = torch.where((d["versions"] < 0) | (lag < 0), behavior, mixed)
    if "prox_loglinear" in d:
        close(proximal, d["prox_loglinear"])
        return
    losses, mask = decoupled(d, log_prob, proximal)
    loss = rlinf(d, losses, proximal, mask)
    loss.backward()
    close(loss.detach(), d["loss_versions"])
    close(log_prob.grad, d["grad_logprob_versions"])


def rlinf(d, losses, proximal, mask):
    """RLinf's mean is over what is not dropped."""
    limit = math.inf if math.isnan(d["threshold"]) else d["threshold"]
    weight = importance_weight(proximal, d["behaviour_logprob"], mask, limit)
    return aggregate(losses * weight, weight > 0)


@pytest.mark.parametrize("file", arrays("async_ppo_rlinf*"))
def test_the_decoupled_loss_of_rlinf(file):
    d = load(file)
    log_prob, proximal = leaf(d["logprob"]), d["proximal_logprob"]
    losses, mask = decoupled(d, log_prob, proximal)
    loss = rlinf(d, losses, proximal, mask)
    loss.backward()
    close(loss.detach(), d["loss"])
    close(log_prob.grad, d["grad_logprob"])

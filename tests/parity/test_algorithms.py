"""Advantages, losses and critics, number by number against the libraries named in the fixtures' README."""

import math
from typing import Any

import pytest
import torch
from cases import arrays, load

from embodied_rl.algorithms.advantages import gae, gae_tokens, normalize
from embodied_rl.algorithms.critic import CriticEnsemble, polyak
from embodied_rl.algorithms.losses import aggregate, kl_estimate, policy_loss, segment_sums, value_loss


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual), torch.as_tensor(expected), rtol=1e-4, atol=1e-5, check_dtype=False
    )


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


@pytest.mark.parametrize("file", arrays("gae_sb3_cleanrl"))
def test_gae_of_stable_baselines3_and_cleanrl(file):
    d = load(file)
    advantages, returns = gae(
        d["rewards"],
        d["values"],
        d["last_values"],
        d["terminated"],
        d["truncated"],
        d["final_values"],
        torch.full_like(d["rewards"], d["gamma"]),
        d["lam"],
    )
    for library in ("", "_cleanrl"):
        close(advantages, d["advantages" + library])
        close(returns, d["returns" + library])


@pytest.mark.parametrize("file", arrays("gae_rlinf_*_level"))
def test_gae_of_rlinf(file):
    d = load(file)
    reward, done, mask, value = d["rewards"], d["dones"], d["loss_mask"], d["values"]
    if "chunk_level" in file.stem:
        reward = reward.sum(-1, keepdim=True)
        done, mask = done.any(-1, keepdim=True), mask.any(-1, keepdim=True)
    steps, rows, width = reward.shape

    def in_time(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).reshape(-1, rows)

    n = steps * width
    done, value = in_time(done)[-n:], in_time(value)[: n + 1]
    reward = in_time(reward)
    never = torch.zeros_like(done)
    discount = torch.full_like(reward, d["gamma"])
    advantages, returns = gae(reward, value[:-1], value[-1], done, never, torch.zeros_like(reward), discount, d["lam"])

    def back(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(steps, width, rows).transpose(1, 2)

    close(back(advantages), d["advantages_raw"])
    close(back(returns), d["returns"])
    close(normalize(back(advantages), mask, eps=1e-5), d["advantages"])


@pytest.mark.parametrize("file", arrays("gae_token_verl"))
def test_gae_over_tokens_of_verl(file):
    d = load(file)
    mask = d["mask"].bool()
    advantages, returns = gae_tokens(d["rewards"], d["values"], mask, d["gamma"], d["lam"])
    close(returns, d["returns"])
    close(normalize(advantages, mask), d["advantages_whitened"])


@pytest.mark.parametrize("file", arrays("ppo_cleanrl_*"))
def test_ppo_of_cleanrl(file):
    d = load(file)
    log_prob, value = leaf(d["logprob"]), leaf(d["values"])
    advantages = normalize(d["advantages"]) if "norm1" in file.stem else d["advantages"]
    mask = torch.ones_like(log_prob, dtype=torch.bool)
    losses, _ = policy_loss(log_prob, d["old_logprob"], advantages, mask, d["clip"], d["clip"])
    critic = value_loss(value, d["old_values"], d["returns"], d["clip"] if "vclip1" in file.stem else None).mean()
    loss = aggregate(losses, mask) - d["ent_coef"] * d["entropy"].mean() + d["vf_coef"] * critic
    loss.backward()
    close(aggregate(losses, mask).detach(), d["pg_loss"])
    close(critic.detach(), d["v_loss"])
    close(loss.detach(), d["loss"])
    close(kl_estimate(d["old_logprob"], d["logprob"], "k3").mean(), d["approx_kl"])
    close(log_prob.grad, d["grad_logprob"])
    close(value.grad, d["grad_values"])


@pytest.mark.parametrize("file", arrays("ppo_rlinf_c[!h]*"))
def test_ppo_of_rlinf(file):
    d = load(file)
    log_prob, value, mask = leaf(d["logprob"]), leaf(d["values"]), d["loss_mask"]
    dual_clip = None if math.isnan(d["dual_clip"]) else d["dual_clip"]
    losses, clipped = policy_loss(
        log_prob, d["old_logprob"], d["advantages"], mask, d["clip_low"], d["clip_high"], dual_clip
    )
    actor = aggregate(losses, mask)
    critic = aggregate(value_loss(value, d["old_values"], d["returns"], d["value_clip"], d["huber_delta"]), mask)
    (actor + critic).backward()
    close(actor.detach(), d["policy_loss"])
    close(critic.detach(), d["value_loss"])
    close(aggregate(clipped.float(), mask), d["clip_fraction"])
    close(aggregate(kl_estimate(d["old_logprob"], d["logprob"], "k1"), mask), d["approx_kl"])
    close(log_prob.grad, d["grad_logprob"])
    close(value.grad, d["grad_values"])


@pytest.mark.parametrize("file", arrays("ppo_rlinf_chunk_*_level"))
def test_granularities_of_rlinf(file):
    d, granularity = load(file), file.stem.split("_")[3]
    log_prob, advantages, mask = leaf(d["logprob"]), d["advantages"], d["loss_mask"]
    chunk, dim = d["num_chunks"], d["action_dim"]
    terms = torch.ones_like(d["logprob"], dtype=torch.bool)
    term_step = torch.arange(chunk).repeat_interleave(dim)
    new, _ = segment_sums(log_prob, terms, term_step, chunk, granularity)
    old, _ = segment_sums(d["old_logprob"], terms, term_step, chunk, granularity)
    denominator = mask.sum()  # RLinf divides by actions, also where each action has several ratios
    if granularity == "token":
        advantages, mask = (x.repeat_interleave(dim, 1) for x in (advantages, mask))
    losses, _ = policy_loss(new, old, advantages, mask, d["clip_low"], d["clip_high"], d["dual_clip"])
    loss = torch.where(mask, losses, 0.0).sum() / denominator
    loss.backward()
    close(loss.detach(), d["policy_loss"])
    close(log_prob.grad, d["grad_logprob"])


@pytest.mark.parametrize("file", arrays("ppo_openrlhf_token[01]"))
def test_ppo_of_openrlhf(file):
    d, over = load(file), "terms" if file.stem.endswith("1") else "rows"
    log_prob, mask = leaf(d["logprob"]), d["mask"].bool()
    losses, clipped = policy_loss(
        log_prob, d["old_logprob"], d["advantages"], mask, d["clip_low"], d["clip_high"], d["dual_clip"]
    )
    loss = aggregate(losses, mask, over)
    loss.backward()
    close(loss.detach(), d["policy_loss"])
    close(log_prob.grad, d["grad_logprob"])
    close(
        aggregate(value_loss(d["values"], d["old_values"], d["returns"], d["value_clip"]), mask, over), d["value_loss"]
    )
    close(aggregate(clipped.float(), mask), d["clipfrac"])
    close(aggregate(kl_estimate(d["old_logprob"], d["logprob"], "k1"), mask), d["kl"])


@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("file", arrays("kl_estimators"))
def test_kl_estimators_of_verl(file, kind):
    d = load(file)
    close(kl_estimate(d["logprob"], d["ref_logprob"], kind), d[kind])


def rlpd_ensemble(d: dict[str, Any], prefix: str) -> tuple[CriticEnsemble, list[str]]:
    """Our critic with rlpd's parameters, and rlpd's names in the order of ours."""
    layers = [f"MLP_0/{kind}_{i}" for i in range(2) for kind in ("Dense", "LayerNorm")]
    parameters = [
        f"VmapStateActionValue_0/{layer}/{name}"
        for layer in [*layers, "Dense_0"]
        for name in (("scale", "bias") if "LayerNorm" in layer else ("kernel", "bias"))
    ]
    members, inputs, width = d[f"{prefix}/{parameters[0]}"].shape
    critic = CriticEnsemble(inputs, (width, width), members, seed=0)
    with torch.no_grad():
        for ours, name in zip(critic.parameters(), parameters, strict=True):
            ours.copy_(d[f"{prefix}/{name}"].reshape(ours.shape))
    return critic, parameters


@pytest.mark.parametrize("file", arrays("rlpd_critic"))
def test_critic_ensemble_of_rlpd(file):
    d = load(file)
    critic, parameters = rlpd_ensemble(d, "params")
    target, _ = rlpd_ensemble(d, "target_params")
    next_q = target(torch.cat([d["next_obs"], d["next_actions"]], 1))[d["subset"].long()]
    q = critic(torch.cat([d["obs"], d["actions"]], 1))
    close(next_q.detach(), d["q_next_subset"])
    close(q.detach(), d["q"])
    loss = (q - d["target"]).square().mean()
    loss.backward()
    close(loss.detach(), d["critic_loss"])
    for ours, name in zip(critic.parameters(), parameters, strict=True):
        assert ours.grad is not None
        close(ours.grad.flatten(), d[f"grad/{name}"].flatten())
    mixed = (1 - d["tau"]) * d[f"target_params/{parameters[0]}"] + d["tau"] * d[f"params/{parameters[0]}"]
    polyak(target, critic, d["tau"])
    close(next(target.parameters()).detach(), mixed)

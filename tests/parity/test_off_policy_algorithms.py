"""Soft actor-critic, CrossQ, RLPD and IQL, number by number against the libraries named in the cases' README."""

from typing import Any

import pytest
import torch
from cases import arrays, load

from embodied_rl.algorithms.batch_renorm import BatchRenorm, batch_statistics
from embodied_rl.algorithms.critic import CriticEnsemble, polyak
from embodied_rl.algorithms.iql import IQLConfig
from embodied_rl.algorithms.losses import advantage_weight
from embodied_rl.algorithms.off_policy import interleave, n_step_return
from embodied_rl.algorithms.sac import SAC, SACConfig, Temperature
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.policies.squashed_gaussian import SquashedGaussianMLPConfig
from embodied_rl.specs import ActionSpec, ObservationSpec
from embodied_rl.types import Score

Case = dict[str, Any]


def close(actual: Any, expected: Any, rtol: float = 1e-4) -> None:
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(actual.squeeze(), expected.squeeze(), rtol=rtol, atol=1e-5, check_dtype=False)


def sac(d: Case, policy: Any = None, **settings: Any) -> SAC:
    """The algorithm with a case's constants."""
    if policy is None:
        policy = squashed(d, width=8)
    hidden = (8,)
    return SACConfig(critic_hidden=hidden, gamma=d["gamma"], **settings).build(policy, 0)


def squashed(d: Case, width: int) -> Any:
    size, dim = d["obs"].shape[1], d["actions"].shape[1]
    spec = ActionSpec((-1.0,) * dim, (1.0,) * dim, (0.0,) * dim)
    return SquashedGaussianMLPConfig(hidden=(width, width)).build(ObservationSpec(state=size), spec)


def copy_into(parameters: Any, values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value.reshape(parameter.shape))


def cleanrl_policy(d: Case) -> Any:
    policy = squashed(d, d["actor.fc1.bias"].numel())
    names = [f"actor.{layer}.{kind}" for layer in ("fc1", "fc2", "fc_mean", "fc_logstd") for kind in ("weight", "bias")]
    copy_into(policy.actor.parameters(), [d[name] for name in names])
    return policy


def cleanrl_critics(d: Case, first: str, second: str) -> CriticEnsemble:
    layers = [[torch.stack([d[f"{q}.fc{i}.{kind}"] for q in (first, second)]) for kind in ("weight", "bias")]
              for i in (1, 2, 3)]  # fmt: skip
    width = layers[0][1].shape[1]
    critic = CriticEnsemble(layers[0][0].shape[2], (width, width), 2, 0, "none")
    copy_into(critic.parameters(), [x for weight, bias in layers for x in (weight.transpose(1, 2), bias)])
    return critic


@pytest.mark.parametrize("file", arrays("sac_cleanrl"))
def test_sac_of_cleanrl(file):
    """CleanRL's density is that of the scaled action, ours of the one in [-1, 1]: a constant apart."""
    d = load(file)
    scale, bias = d["actor.action_scale"], d["actor.action_bias"]
    constant = scale.log().sum()
    policy = cleanrl_policy(d)
    algorithm = sac(d, policy)
    alpha = d["log_alpha"].exp()

    def propose(obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latent, log_prob = policy.propose(policy.features({"state": obs}), noise.unsqueeze(1))
        return latent.squeeze(1) * scale + bias, log_prob - constant

    next_actions, next_log_prob = propose(d["next_obs"], d["eps_next"])
    close(next_actions, d["next_actions"])
    close(next_log_prob, d["next_logprob"])
    critic, target = cleanrl_critics(d, "q1", "q2"), cleanrl_critics(d, "t1", "t2")
    next_q = target(torch.cat([d["next_obs"], next_actions], 1))
    y = algorithm.target_value(d["rewards"], (1 - d["dones"]) * d["gamma"], next_q, next_log_prob, alpha)
    close(y, d["target_q"])
    losses = (critic(torch.cat([d["obs"], d["actions"]], 1)) - y).square().mean(1)
    close(losses, torch.tensor([d["q1_loss"], d["q2_loss"]]))
    gradients = torch.autograd.grad(losses.sum(), list(critic.parameters()))
    names = [f"grad_q1.fc{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")]
    for gradient, name in zip(gradients, names, strict=True):
        close(gradient[0].T if name.endswith("weight") else gradient[0], d[name])

    actions, log_prob = propose(d["obs"], d["eps_actor"])
    close(actions, d["pi"])
    close(log_prob, d["logprob_pi"])
    loss = algorithm.actor_loss(critic(torch.cat([d["obs"], actions], 1)), log_prob, alpha)
    close(loss, d["actor_loss"])
    gradients = torch.autograd.grad(loss, list(policy.actor.parameters()))
    names = [f"grad_actor.{layer}.{kind}" for layer in ("fc1", "fc2", "fc_mean", "fc_logstd")
             for kind in ("weight", "bias")]  # fmt: skip
    for gradient, name in zip(gradients, names, strict=True):
        close(gradient, d[name])

    temperature = Temperature(alpha.item())
    _, log_prob = propose(d["obs"], d["eps_alpha"])
    loss = temperature.loss(log_prob, d["target_entropy"])
    close(loss, d["alpha_loss"])
    close(torch.autograd.grad(loss, temperature.log_alpha)[0], d["grad_log_alpha"])


def sbx_critic(d: Case) -> tuple[CriticEnsemble, list[str]]:
    """Our critics with sbx's parameters and running statistics, and sbx's names in the order of ours."""
    layers = ["BatchRenorm_0", "Dense_0", "BatchRenorm_1", "Dense_1", "BatchRenorm_2", "Dense_2"]
    names = [
        f"VmapCritic_0/{layer}/{name}"
        for layer in layers
        for name in (("scale", "bias") if "Renorm" in layer else ("kernel", "bias"))
    ]
    members, inputs, width = d["params/VmapCritic_0/Dense_0/kernel"].shape
    critic = CriticEnsemble(inputs, (width, width), members, 0, "batch_renorm")
    copy_into(critic.parameters(), [d[f"params/{name}"] for name in names])
    for i, norm in enumerate(renorms(critic)):
        before = f"stats_before/VmapCritic_0/BatchRenorm_{i}"
        norm.warmup = d["warmup_steps"]
        copy_into((norm.mean, norm.variance), [d[f"{before}/mean"], d[f"{before}/var"]])
        norm.steps.fill_(int(d[f"{before}/steps"][0]))
    return critic, names


def renorms(critic: CriticEnsemble) -> list[BatchRenorm]:
    return [layer for layer in critic.layers if isinstance(layer, BatchRenorm)]


@pytest.mark.parametrize("file", arrays("crossq_sbx_*"))
def test_crossq_of_sbx(file):
    d = load(file)
    critic, names = sbx_critic(d)
    done, following = (torch.cat([d[f"{when}obs"], d[f"{when}actions"]], 1) for when in ("", "next_"))
    close(critic(done).detach(), d["q_eval"], rtol=1e-3)
    with batch_statistics(critic):
        q, next_q = critic(torch.cat([done, following])).chunk(2, dim=1)
    close(q.detach(), d["q_current"], rtol=1e-3)
    close(next_q.detach(), d["q_next"], rtol=1e-3)
    for i, norm in enumerate(renorms(critic)):
        after = f"stats_after/VmapCritic_0/BatchRenorm_{i}"
        close(norm.mean, d[f"{after}/mean"])
        close(norm.variance, d[f"{after}/var"])
        assert norm.steps == d[f"{after}/steps"][0]
    algorithm = sac(d, critic_norm="batch_renorm", tau=None)
    discount = (1 - d["dones"]) * d["gamma"]
    y = algorithm.target_value(d["rewards"], discount, next_q.detach(), d["next_logprob"], torch.tensor(d["alpha"]))
    close(y, d["target"])
    loss = 0.5 * (q - y).square().mean(1).sum()
    close(loss.detach(), d["loss"])
    for gradient, name in zip(torch.autograd.grad(loss, list(critic.parameters())), names, strict=True):
        close(gradient, d[f"grad/{name}"])


def rlpd_ensemble(d: Case, prefix: str) -> tuple[CriticEnsemble, list[str]]:
    """Our critics with rlpd's parameters, and rlpd's names in the order of ours."""
    layers = [f"MLP_0/{kind}_{i}" for i in range(2) for kind in ("Dense", "LayerNorm")]
    names = [
        f"VmapStateActionValue_0/{layer}/{name}"
        for layer in [*layers, "Dense_0"]
        for name in (("scale", "bias") if "LayerNorm" in layer else ("kernel", "bias"))
    ]
    members, inputs, width = d[f"{prefix}/{names[0]}"].shape
    critic = CriticEnsemble(inputs, (width, width), members, seed=0)
    copy_into(critic.parameters(), [d[f"{prefix}/{name}"] for name in names])
    return critic, names


@pytest.mark.parametrize("file", arrays("rlpd_critic"))
def test_rlpd(file, monkeypatch):
    d = load(file)
    critic, names = rlpd_ensemble(d, "params")
    target, _ = rlpd_ensemble(d, "target_params")
    next_q = target(torch.cat([d["next_obs"], d["next_actions"]], 1))
    subset = d["subset"].long()
    close(next_q[subset].detach(), d["q_next_subset"])
    algorithm = sac(d, critics=len(next_q), target_critics=len(subset), actor_q="mean")
    alpha = torch.tensor(d["alpha"])
    with monkeypatch.context() as patch:
        rest = [i for i in range(len(next_q)) if i not in subset]
        patch.setattr(torch, "randperm", lambda count, **_: torch.tensor([*subset.tolist(), *rest]))
        y = algorithm.target_value(d["rewards"], d["gamma"] * d["masks"], next_q, d["next_logprob"], alpha)
    close(y, d["target"])
    q = critic(torch.cat([d["obs"], d["actions"]], 1))
    close(q.detach(), d["q"])
    loss = (q - y).square().mean()
    close(loss.detach(), d["critic_loss"])
    for gradient, name in zip(torch.autograd.grad(loss, list(critic.parameters())), names, strict=True):
        close(gradient, d[f"grad/{name}"])
    q = critic(torch.cat([d["obs"], d["actor_actions"]], 1)).detach()
    close(q.mean(0), d["actor_q_mean"])
    close(algorithm.actor_loss(q, d["actor_logprob"], alpha), d["actor_loss"])
    name = names[-1]
    mixed = (1 - d["tau"]) * d[f"target_params/{name}"] + d["tau"] * d[f"params/{name}"]
    polyak(target, critic, d["tau"])
    close(list(target.parameters())[-1].detach(), mixed)
    close(mixed, d["new_target_first"])


@pytest.mark.parametrize("file", arrays("rlpd_symmetric_batch"))
def test_symmetric_batch_of_rlpd(file):
    d = load(file)
    both = [{"obs": d[f"{whose}_obs"], "rew": d[f"{whose}_rew"]} for whose in ("offline", "online")]
    combined = interleave(*both)
    assert torch.equal(combined["obs"], d["combined_obs"]) and torch.equal(combined["rew"], d["combined_rew"])


@pytest.mark.parametrize("file", arrays("iql_corl_*"))
def test_iql_of_corl(file, monkeypatch):
    """The networks and the density give a case's numbers; everything else is ours."""
    d = load(file)
    v, q1, log_prob = (d[name].requires_grad_() for name in ("v", "q1", "logprob"))
    settings = {"expectile": d["tau"], "inverse_temperature": d["beta"], "max_weight": d["exp_adv_max"]}
    policy = GaussianMLPConfig(hidden=(8,), value_hidden=(8,)).build(
        ObservationSpec(state=1), ActionSpec((-1.0,), (1.0,), (0.0,))
    )
    algorithm = IQLConfig(gamma=d["discount"], **settings).build(policy, 0)
    values = {"now": v, "then": d["next_v"]}
    monkeypatch.setattr(policy, "features", lambda inputs: torch.full((len(v), 1), float(inputs["at"] == "then")))
    monkeypatch.setattr(algorithm, "value", lambda x: values["then" if x[0, 0] else "now"][None])
    monkeypatch.setattr(algorithm, "critic", lambda _: torch.stack([q1, d["q2"]]))
    monkeypatch.setattr(algorithm, "target", lambda _: d["target_q"][None])
    monkeypatch.setattr(
        policy, "evaluate_actions", lambda *_: Score(log_prob[:, None], log_prob, torch.zeros(1).long())
    )
    valid = torch.ones(len(v), 1, dtype=torch.bool)
    reward, discount = n_step_return(d["rewards"].view(-1, 1, 1), valid[..., None], d["discount"], "decision")
    batch = {"inputs": {"at": "now"}, "next_inputs": {"at": "then"}, "actions": torch.zeros(len(v), 1, 1)}
    batch |= {"valid": valid, "reward": reward, "discount": discount * (1 - d["dones"])}
    losses, advantages, _ = algorithm.critic_losses(batch)
    close(losses["value_loss"], d["v_loss"])
    close(losses["critic_loss"], d["q_loss"])
    close(reward + batch["discount"] * d["next_v"], d["q_target"])
    for loss, of, name in (("value_loss", v, "grad_v"), ("critic_loss", q1, "grad_q1")):
        close(torch.autograd.grad(losses[loss], of)[0], d[name])
    weight = advantage_weight(advantages, d["beta"], d["exp_adv_max"])
    close(weight, d["exp_adv"])
    loss = algorithm.actor_loss(batch, weight)
    close(loss, d["policy_loss"])
    close(torch.autograd.grad(loss, log_prob)[0], d["grad_logprob"])

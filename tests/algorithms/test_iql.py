"""Implicit Q-learning against slow definitions, and what its settings promise."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from algorithm_toys import ToyFlow
from hypothesis import given
from hypothesis import strategies as st

from embodied_rl.algorithms.imitation import mean_imitation_loss
from embodied_rl.algorithms.iql import IQL, IQLConfig
from embodied_rl.algorithms.losses import advantage_weight, expectile_loss
from embodied_rl.errors import UserError
from embodied_rl.policies.flow_mlp import FlowMLPConfig
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.policies.squashed_gaussian import SquashedGaussianCNNConfig, SquashedGaussianMLPConfig
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec

B, S, K, A = 16, 3, 2, 2
ACTION = ActionSpec((-1.0, 0.0), (1.0, 4.0), (0.0, 0.0))
POLICIES: dict[str, Any] = {
    "gaussian": GaussianMLPConfig(chunk=K, horizon=3, hidden=(8,), value_hidden=(8,)),
    "squashed": SquashedGaussianMLPConfig(chunk=K, hidden=(8, 8)),
    "flow": FlowMLPConfig(horizon=3, chunk=K, hidden=(8,), value_hidden=(8,)),
    "pixels": SquashedGaussianCNNConfig(chunk=K, hidden=(8,), channels=(4, 4), image_features=4),
}
kinds = pytest.mark.parametrize("kind", POLICIES)


def toy(kind: str = "gaussian", seed: int = 0, **more: Any) -> IQL:
    torch.manual_seed(seed)
    cameras = {"front": CameraSpec(8, 8)} if kind == "pixels" else {}
    policy = POLICIES[kind].build(ObservationSpec(state=S, cameras=cameras), ACTION)
    defaults: dict[str, Any] = {"critic_hidden": (16, 16), "gamma": 0.9, "gamma_per": "step", "steps": 10}
    return IQLConfig(**(defaults | more)).build(policy, seed)


def decisions(seed: int = 0, kind: str = "gaussian") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def inputs() -> dict[str, torch.Tensor]:
        found = {"state": torch.randn(B, S, generator=generator)}
        if kind == "pixels":
            found["image.front"] = torch.randint(256, (B, 8, 8, 3), generator=generator, dtype=torch.uint8)
        return found

    valid = torch.arange(K) < torch.randint(1, K + 1, (B, 1), generator=generator)
    discount = torch.where(torch.rand(B, generator=generator) < 0.3, 0.0, 0.9 ** valid.sum(1))
    return {
        "inputs": inputs(),
        "next_inputs": inputs(),
        "actions": torch.tensor([0.0, 2.0]) + torch.randn(B, K, A, generator=generator).clamp(-1, 1),
        "valid": valid,
        "reward": torch.randn(B, generator=generator),
        "discount": discount,
    }


def update(algorithm: IQL, batch: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    return algorithm.update(batch, torch.Generator().manual_seed(seed))


def parameters(module: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20), st.floats(0.05, 0.95))
def test_the_expectile_loss_is_least_for_the_expectile(targets, expectile):
    """At the minimum, what is above pulls as much as what is below: a bisection finds it."""
    x = np.array(targets)
    low, high = x.min(), x.max()
    for _ in range(80):
        middle = (low + high) / 2
        pull = expectile * np.maximum(x - middle, 0).sum() - (1 - expectile) * np.maximum(middle - x, 0).sum()
        low, high = (middle, high) if pull > 0 else (low, middle)
    at = torch.tensor(low, dtype=torch.float64, requires_grad=True)
    loss = expectile_loss(torch.from_numpy(x) - at, expectile).sum()
    assert abs(torch.autograd.grad(loss, at)[0].item()) < 1e-9
    assert expectile_loss(torch.tensor([-2.0, 2.0]), 0.5).tolist() == [2.0, 2.0]


def test_weights_of_advantages_grow_up_to_their_limit():
    weights = advantage_weight(torch.tensor([-1.0, 0.0, 1.0, 99.0], requires_grad=True), 2.0, 50.0)
    torch.testing.assert_close(weights, torch.tensor([math.exp(-2), 1, math.exp(2), 50]))
    assert not weights.requires_grad


def slow_losses(algorithm: IQL, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Row by row, in float64."""
    config, policy = algorithm.config, algorithm.policy
    networks = {name: copy.deepcopy(module).double() for name, module in algorithm.modules().items()}
    center, half = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0])
    value_losses, critic_losses, weights = [], [], []
    for b in range(B):
        now, then = (policy.features({"state": batch[name]["state"][[b]]}) for name in ("inputs", "next_inputs"))
        executed = ((batch["actions"][b] - center) / half).clamp(-1, 1) * batch["valid"][b][:, None]
        chosen = torch.cat([now, executed.flatten()[None]], 1).double()
        v, next_v = (networks["value"](x.double())[0, 0] for x in (now, then))
        y = batch["reward"][b] + batch["discount"][b] * next_v
        better = networks["target"](chosen).min() if config.advantage == "q" else y
        u = better - v
        value_losses.append((config.expectile if u > 0 else 1 - config.expectile) * u**2)
        if config.advantage == "q":
            critic_losses.append(((networks["critic"](chosen)[:, 0] - y) ** 2).mean())
        weights.append(min(math.exp(config.inverse_temperature * u.item()), config.max_weight))
    found = {"value_loss": torch.stack(value_losses).mean(), "weights": torch.tensor(weights)}
    return found | ({"critic_loss": torch.stack(critic_losses).mean()} if critic_losses else {})


@pytest.mark.parametrize("advantage", ["q", "return"])
def test_losses_follow_their_formula(advantage):
    algorithm, batch = toy(advantage=advantage, inverse_temperature=5.0, max_weight=2.0), decisions()
    with torch.no_grad():
        for parameter in algorithm.modules()["target" if advantage == "q" else "value"].parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    expected, before = slow_losses(algorithm, batch), copy.deepcopy(algorithm.policy)
    old = {name: parameters(module) for name, module in algorithm.modules().items()}
    metrics = update(algorithm, batch)
    weights = expected.pop("weights").float()
    assert 0 < (weights < 2).sum() < B, "both sides of the limit are tested"
    for name, loss in expected.items():
        torch.testing.assert_close(metrics[name], loss.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["advantage_weight"], weights.mean(), rtol=1e-4, atol=1e-6)

    mean, std = before._mean(before.features(batch["inputs"]))[:, :K], before.log_std[:K].exp()
    x = before.action_scale.to_network(batch["actions"])
    log_prob = torch.distributions.Normal(mean, std).log_prob(x) * batch["valid"][..., None]
    torch.testing.assert_close(metrics["actor_loss"], -(weights * log_prob.sum((1, 2))).mean().detach())
    if advantage == "q":
        mixed = 0.995 * old["target"] + 0.005 * parameters(algorithm.critic)
        torch.testing.assert_close(parameters(algorithm.target), mixed)
        assert not torch.equal(parameters(algorithm.critic), old["critic"])
    assert ("critic_loss" in metrics) == (advantage == "q") == ("critic" in algorithm.modules())


def test_the_trace_of_an_action_gives_the_density_of_that_action():
    """Of an action that was drawn, what drawing it gave; in particular at a bound it is finite."""
    for kind in ("gaussian", "squashed"):
        policy = toy(kind).policy
        inputs = {"state": torch.randn(5, S)}
        torch.manual_seed(1)
        sample = policy.act(inputs)
        inside = ((sample.actions > torch.tensor(ACTION.low)) & (sample.actions < torch.tensor(ACTION.high))).flatten(1)
        again = policy.evaluate_actions(inputs, policy.trace(sample.actions)).log_prob
        torch.testing.assert_close(again[inside], sample.log_prob[inside], rtol=1e-3, atol=1e-3)
        bound = torch.tensor(ACTION.high).expand(5, K, A)
        assert policy.evaluate_actions(inputs, policy.trace(bound)).log_prob.isfinite().all()


@kinds
def test_every_kind_of_policy_is_trained_and_nothing_that_was_not_executed_matters(kind):
    one, two = toy(kind), toy(kind)
    batch, other = decisions(kind=kind), decisions(kind=kind)
    other["actions"] = torch.where(other["valid"][..., None], other["actions"], 0.77)
    over = other["discount"] == 0
    other["next_inputs"]["state"] = torch.where(over[:, None], 3.0, other["next_inputs"]["state"])
    before = parameters(one.policy)
    first, second = update(one, batch), update(two, other)
    assert first.keys() == second.keys() and not any(each.requires_grad for each in first.values())
    for name, each in first.items():
        assert torch.equal(each, second[name]), name
    assert torch.equal(parameters(one.policy), parameters(two.policy))
    assert not torch.equal(before, parameters(one.policy))
    assert all(parameter.grad is None for parameter in one.policy.parameters())
    if kind == "pixels":
        assert not torch.equal(parameters(one.policy.encoders), parameters(toy(kind).policy.encoders))


@kinds
def test_the_policy_moves_neither_critic_nor_value(kind):
    fast, still = toy(kind, learning_rate=0.1), toy(kind, learning_rate=0.0)
    for algorithm in (fast, still):
        update(algorithm, decisions(kind=kind))
    for name, module in fast.modules().items():
        assert torch.equal(parameters(module), parameters(still.modules()[name]))


def test_without_a_temperature_it_clones():
    algorithm, batch = toy("flow", inverse_temperature=0.0), decisions()
    torch.manual_seed(int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(0))))
    padded = torch.cat([batch["actions"], torch.zeros(B, 1, A)], 1)
    valid = torch.cat([batch["valid"], torch.zeros(B, 1, dtype=torch.bool)], 1)
    expected = mean_imitation_loss(algorithm.policy, {"inputs": batch["inputs"], "actions": padded, "valid": valid})
    torch.testing.assert_close(update(algorithm, batch)["actor_loss"], expected.detach())


def test_the_learning_rate_of_the_policy_follows_its_schedule():
    rates = {}
    for schedule in ("cosine", "constant"):
        algorithm = toy(learning_rate=1.0, schedule=schedule, steps=2)
        rates[schedule] = []
        for seed in range(3):
            update(algorithm, decisions(seed))
            rates[schedule].append(algorithm.actor_optimizer.param_groups[0]["lr"])
    assert rates["cosine"] == pytest.approx([1, 0.5, 0]) and rates["constant"] == [1, 1, 1]


class Bandit:
    """One state; the reward is high near 0.5, where few of the recorded actions are."""

    successful = 0

    def sample(self, batch: int, generator: np.random.Generator, decisions: int = 1) -> dict[str, Any]:
        actions = generator.normal(0, 0.5, (batch, 1, 1)).clip(-1, 1).astype(np.float32)
        state = np.ones((batch, 2), np.float32)
        zero = np.zeros(batch, np.float32)
        return {
            "inputs": {"state": state},
            "next_inputs": {"state": state},
            "actions": actions,
            "valid": np.ones((batch, decisions, 1), bool),
            "reward": np.broadcast_to(-((actions - 0.5) ** 2), (batch, decisions, 1)).copy(),
            "terminated": np.ones(batch, bool),
            "potential": zero,
            "next_potential": zero,
        }


@pytest.mark.parametrize("advantage", ["q", "return"])
@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_the_policy_prefers_what_was_better(kind, advantage):
    """What was done is spread around 0, the best of it is 0.5."""
    spec = ActionSpec((-1.0,), (1.0,), (0.0,))
    if kind == "gaussian":
        policy: Any = GaussianMLPConfig(hidden=(16,), value_hidden=(4,)).build(ObservationSpec(state=2), spec)
    else:
        policy = ToyFlow(state=2, chunk=1, dim=1, width=16)
    settings: dict[str, Any] = {"learning_rate": 2e-2, "critic_learning_rate": 2e-2, "inverse_temperature": 20.0}
    algorithm = IQLConfig(steps=150, critic_hidden=(16,), tau=0.05, advantage=advantage, **settings).build(policy, 0)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for _ in range(150):
        algorithm.update(algorithm.draw(Bandit(), rng), generator)
    torch.manual_seed(0)
    actions = policy.act({"state": torch.ones(512, 2)}, deterministic=kind == "gaussian").actions
    assert (actions.mean() - 0.5).abs() < 0.15, actions.mean()


def test_a_restored_algorithm_goes_on_exactly():
    one, two = toy("flow"), toy("flow", seed=1)
    for seed in range(3):
        update(one, decisions(seed), seed)
    two.policy.load_state_dict(one.policy.state_dict())
    for name, module in two.modules().items():
        module.load_state_dict(one.modules()[name].state_dict())
    for name, optimizer in two.optimizers().items():
        optimizer.load_state_dict(copy.deepcopy(one.optimizers()[name].state_dict()))
    two.load_counters(one.counters())
    torch.manual_seed(99)
    for algorithm in (one, two):
        for seed in range(3, 5):
            update(algorithm, decisions(seed), seed)
    for name, module in {"policy": one.policy, **one.modules()}.items():
        assert torch.equal(parameters(module), parameters({"policy": two.policy, **two.modules()}[name]))


WRONG: list[dict[str, Any]] = [
    {"expectile": 1.0},
    {"tau": 0.0},
    {"critics": 0},
    {"n_step": 0},
    {"inverse_temperature": -1.0},
    {"max_weight": 0.0},
    {"gamma": 1.1},
    {"batch_size": 0},
    {"steps": 0},
    {"updates_per_iteration": 0},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        IQLConfig(**wrong)


def test_chunks_want_their_discount_chosen():
    with pytest.raises(UserError, match="gamma_per"):
        IQLConfig().build(toy().policy, 0)


def test_the_rewards_of_several_decisions_enter_a_target():
    batches = [toy(n_step=n, gamma_per="decision").draw(Bandit(), np.random.default_rng(0)) for n in (1, 3)]
    torch.testing.assert_close(batches[1]["reward"], (1 + 0.9 + 0.9**2) * batches[0]["reward"])

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from algorithm_toys import ToyFlow

from embodied_rl.algorithms.critic import CriticEnsemble
from embodied_rl.algorithms.flow_actor_critic import FlowActorCriticConfig
from embodied_rl.errors import UserError
from embodied_rl.policies.flow_mlp import FlowMLPConfig
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ActionSpec, ObservationSpec

B, S, K, A = 32, 3, 2, 2


def toy(**settings):
    policy = ToyFlow(state=S, chunk=K, dim=A, width=16)
    settings = {"critic_hidden": (16, 16), "critic_warmup_updates": 0} | settings
    return FlowActorCriticConfig(**({"q_warmup_updates": 0} | settings)).build(policy, seed=0)


def replay(seed=0, rows=B):
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        return rng.normal(size=shape).astype(np.float32)

    valid = np.arange(K) < rng.integers(1, K + 1, rows)[:, None]
    return {
        "inputs": {"state": numbers(rows, S)},
        "next_inputs": {"state": numbers(rows, S)},
        "actions": numbers(rows, K, A) * 0.5,
        "valid": valid[:, None],
        "reward": numbers(rows, 1, K),
        "terminated": rng.random(rows) < 0.3,
        "potential": numbers(rows),
        "next_potential": numbers(rows),
    }


def anchor(seed=1, rows=16):
    data = replay(seed, rows)
    return {"inputs": data["inputs"], "actions": data["actions"], "valid": data["valid"][:, 0]}


def parameters(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("gamma_per", ["decision", "step"])
def test_batch_shapes_rewards_and_discounts(gamma_per):
    algorithm, data = toy(gamma=0.9, gamma_per=gamma_per, reward_scale=2.0, shaping=0.5), replay()
    result = algorithm.batch(data)
    for b in range(B):
        steps = int(data["valid"][b].sum())
        per_step = gamma_per == "step"
        reward = sum(data["reward"][b, 0, k] * (0.9**k if per_step else 1) for k in range(steps))
        discount = 0.0 if data["terminated"][b] else 0.9**steps if per_step else 0.9
        shaping = discount * data["next_potential"][b] - data["potential"][b]
        assert result["discount"][b].item() == pytest.approx(discount)
        assert result["reward"][b].item() == pytest.approx(2 * reward + 0.5 * shaping, rel=1e-4, abs=1e-5)
    assert result["anchor"] is None


def test_shaping_does_not_change_what_an_episode_is_worth():
    """Over a terminated episode the discounted shaping rewards telescope to -potential(start)."""
    algorithm = toy(gamma=0.9, shaping=1.0)
    data = replay(rows=5)
    data["terminated"] = np.arange(5) == 4
    data["potential"][1:] = data["next_potential"][:-1]
    plain, shaped = toy(gamma=0.9).batch(data)["reward"], algorithm.batch(data)["reward"]
    weights = 0.9 ** torch.arange(5)
    assert ((shaped - plain) * weights).sum().item() == pytest.approx(-data["potential"][0], rel=1e-4, abs=1e-5)


def test_critic_target_and_loss_follow_their_formula():
    algorithm = toy(actor_every=2)
    batch = algorithm.batch(replay())
    with torch.no_grad():
        for parameter in algorithm.target.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    critic, target = copy.deepcopy(algorithm.critic), copy.deepcopy(algorithm.target)
    generator = torch.Generator().manual_seed(4)
    metrics = algorithm.update(batch, generator)

    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(4)))
    torch.manual_seed(seed)
    with torch.no_grad():
        next_actions = algorithm.policy.sample(batch["next_inputs"]).clamp(-1, 1).flatten(1)
        next_q = target(torch.cat([batch["next_inputs"]["state"], next_actions], 1))
        y = batch["reward"] + batch["discount"] * torch.minimum(next_q[0], next_q[1])
        executed = (batch["actions"].clamp(-1, 1) * batch["valid"][..., None]).flatten(1)
        q = critic(torch.cat([batch["inputs"]["state"], executed], 1))
    torch.testing.assert_close(metrics["target"], y.mean())
    torch.testing.assert_close(metrics["critic_loss"], ((q - y) ** 2).mean(1).sum())
    expected = 0.99 * parameters(target) + 0.01 * parameters(algorithm.critic)
    torch.testing.assert_close(parameters(algorithm.target), expected)


def test_nothing_after_a_termination_and_no_unexecuted_action_matters():
    algorithms = [toy(critic_warmup_updates=9) for _ in range(2)]
    one, two = replay(), replay()
    two["actions"][~two["valid"][:, 0]] = 0.77
    two["reward"][~two["valid"]] = 5.0
    two["next_inputs"]["state"][two["terminated"]] = 3.0
    two["next_potential"][two["terminated"]] = 3.0
    results = []
    for algorithm, data in zip(algorithms, (one, two), strict=True):
        metrics = algorithm.update(algorithm.batch(data), torch.Generator().manual_seed(0))
        results.append(metrics)
    for name in ("critic_loss", "q", "target"):
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=0)
    assert torch.equal(parameters(algorithms[0].critic), parameters(algorithms[1].critic))


def test_the_actor_waits_for_the_critic_and_takes_turns():
    algorithm, generator = toy(critic_warmup_updates=3, actor_every=2), torch.Generator().manual_seed(0)
    moved = []
    for update in range(8):
        before, announced = parameters(algorithm.policy), algorithm.next_update_trains_actor
        batch = algorithm.batch(replay(update), anchor(update) if announced else None)
        metrics = algorithm.update(batch, generator)
        assert ("actor_loss" in metrics) == announced
        assert not any(metric.requires_grad for metric in metrics.values())
        moved.append(not torch.equal(before, parameters(algorithm.policy)))
        assert moved[-1] == announced
    assert moved == [False, False, False, True, False, True, False, True]
    for module in (algorithm.policy, algorithm.critic, algorithm.target):
        assert all(parameter.grad is None for parameter in module.parameters())


def test_the_actor_leaves_the_critic_alone():
    with_actor, without = toy(actor_every=1), toy(actor_every=1, critic_warmup_updates=5)
    for algorithm in (with_actor, without):
        algorithm.update(algorithm.batch(replay(), anchor()), torch.Generator().manual_seed(0))
    assert torch.equal(parameters(with_actor.critic), parameters(without.critic))
    assert not torch.equal(parameters(with_actor.policy), parameters(without.policy))


def test_short_anchor_chunks_are_padded_to_the_horizon():
    algorithm = toy()
    data = anchor()
    data["actions"], data["valid"] = data["actions"][:, :1], data["valid"][:, :1]
    padded = algorithm.batch(replay(), data)["anchor"]
    assert padded["actions"].shape == (16, K, A) and padded["valid"].shape == (16, K)
    assert not padded["valid"][:, 1].any() and padded["valid"][:, 0].all()


def test_actions_are_scaled_from_their_bounds():
    policy = ToyFlow(state=S, chunk=K, dim=A, width=16)
    spec = policy.action_spec
    policy.action_spec = type(spec)(low=(0.0, -math.inf), high=(10.0, math.inf), hold=spec.hold)
    algorithm = FlowActorCriticConfig(critic_hidden=(8,)).build(policy, 0)
    actions = torch.tensor([[[10.0, 7.0], [-3.0, -7.0]]])
    seen = algorithm._critic_input(torch.zeros(1, S), actions, torch.tensor([[True, True]]))
    assert seen[0, S:].tolist() == [1.0, 7.0, -1.0, -7.0]


@pytest.mark.parametrize("wrong", [{"actor_every": 0}, {"tau": 0.0}, {"gamma": 1.1}, {"anchor_minimum": 0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        FlowActorCriticConfig(**wrong)


def test_critics_of_an_ensemble_are_independent_networks():
    critic = CriticEnsemble(5, (8, 7), ensemble=3, seed=0)
    x = torch.randn(4, 5)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    together = critic(x)
    assert together.shape == (3, 4)
    layers: list[Any] = list(critic.layers)
    first, norm, _, second, norm2, _, last = layers
    for e in range(3):
        h = x
        for linear, layer_norm in ((first, norm), (second, norm2)):
            h = h @ linear.weight[e] + linear.bias[e]
            size = h.shape[1:]
            h = torch.nn.functional.layer_norm(h, size, layer_norm.scale[e, 0], layer_norm.shift[e, 0], 1e-6).relu()
        torch.testing.assert_close(together[e], (h @ last.weight[e] + last.bias[e])[:, 0])
    assert torch.equal(parameters(CriticEnsemble(5, (8,), 2, 3)), parameters(CriticEnsemble(5, (8,), 2, 3)))
    assert not torch.equal(parameters(CriticEnsemble(5, (8,), 2, 3)), parameters(CriticEnsemble(5, (8,), 2, 4)))


def test_a_restored_algorithm_goes_on_exactly():
    def run(algorithm, updates):
        for update in updates:
            generator = torch.Generator().manual_seed(update)
            algorithm.update(algorithm.batch(replay(update), anchor(update)), generator)

    one = toy(critic_warmup_updates=2)
    run(one, range(5))
    two = toy(critic_warmup_updates=2)
    two.policy.load_state_dict(one.policy.state_dict())
    for name, module in two.modules().items():
        module.load_state_dict(one.modules()[name].state_dict())
    for name, optimizer in two.optimizers().items():
        optimizer.load_state_dict(copy.deepcopy(one.optimizers()[name].state_dict()))
    two.load_counters(one.counters())
    torch.manual_seed(99)
    run(two, range(5, 9))
    torch.manual_seed(11)
    run(one, range(5, 9))
    for a, b in ((one.policy, two.policy), (one.critic, two.critic), (one.target, two.target)):
        assert torch.equal(parameters(a), parameters(b))


@pytest.mark.parametrize("q_weight", [0.0, 0.2])
def test_the_critic_improves_on_what_is_cloned(q_weight):
    """A bandit: the data spread around 0, the reward is highest at 0.5. Cloning the better half of the data ends near
    that half's mean distance from 0.5; the critic halves it."""
    rng = np.random.default_rng(0)
    rates = {"critic_learning_rate": 3e-3, "learning_rate": 3e-3}
    algorithm = toy(**rates, critic_warmup_updates=100, q_weight=q_weight)
    generator = torch.Generator().manual_seed(0)
    cloned = []
    for _ in range(500):
        actions = rng.normal(0, 0.5, (64, K, A)).clip(-1, 1).astype(np.float32)
        distance = ((actions - 0.5) ** 2).mean((1, 2))
        data = replay(rows=64) | {
            "actions": actions,
            "valid": np.ones((64, 1, K), bool),
            "terminated": np.ones(64, bool),
        }
        data["reward"] = np.stack([-distance, 0 * distance], 1)[:, None]
        good = distance < np.median(distance)
        cloned.append(distance[good].mean())
        inputs = {"state": data["inputs"]["state"][good]}
        successes = {"inputs": inputs, "actions": actions[good], "valid": data["valid"][good, 0]}
        algorithm.update(algorithm.batch(data, successes), generator)
    torch.manual_seed(0)
    with torch.no_grad():
        chosen = algorithm.policy.sample({"state": torch.randn(512, S)})
    ratio = (chosen - 0.5).square().mean().item() / np.mean(cloned)
    assert ratio < 0.5 if q_weight else ratio > 0.7, ratio


def test_training_executes_the_proposal_that_the_critics_value_most():
    spec = ActionSpec((-1.0,) * A, (1.0,) * A, (0.0,) * A)
    policy = FlowMLPConfig(horizon=K, chunk=K, hidden=(8,)).build(ObservationSpec(state=S), spec)
    algorithm = FlowActorCriticConfig(candidates=5, critic_hidden=(8,)).build(policy, 0)
    inputs = {"state": torch.randn(4, S)}

    def noise():
        return RowNoise(0, np.arange(4), np.zeros(4, np.int64))

    plain = algorithm.act(inputs, noise()).actions
    assert torch.equal(plain, policy.act(inputs, True, noise()).actions), "untrained critics choose nothing"
    algorithm.updates = 1
    chosen = algorithm.act(inputs, noise()).actions
    assert not torch.equal(chosen, plain)
    for row in range(4):
        one = {"state": inputs["state"][row : row + 1].repeat(5, 1)}
        mine = RowNoise(0, np.array([row]), np.zeros(1, np.int64))
        proposals = policy.act(one, True, mine.copies(5)).actions
        torch.testing.assert_close(proposals[0], plain[row])
        with torch.no_grad():
            q = algorithm.critic(algorithm._critic_input(policy.features(one), proposals)).amin(0)
        torch.testing.assert_close(chosen[row], proposals[q.argmax()])


def test_the_weight_of_q_rises_with_the_actor_updates():
    algorithm = toy(critic_warmup_updates=10, actor_every=2, q_warmup_updates=4, q_weight=0.2)
    weights = []
    for algorithm.updates in (11, 13, 15, 17, 19):
        weights.append(algorithm.q_weight())
    assert weights == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2])

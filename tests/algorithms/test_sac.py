"""Soft actor-critic against slow definitions, and what its settings promise."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rl.algorithms.augmentation import random_shift
from embodied_rl.algorithms.batch_renorm import BatchRenorm, batch_statistics
from embodied_rl.algorithms.off_policy import n_step_return
from embodied_rl.algorithms.sac import SAC, SACConfig
from embodied_rl.errors import UserError
from embodied_rl.policies import check
from embodied_rl.policies.flow_mlp import FlowMLPConfig
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.policies.squashed_gaussian import SquashedGaussianCNNConfig, SquashedGaussianMLPConfig
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec

B, S, K, A = 16, 3, 2, 2
ACTION = ActionSpec((-1.0, 0.0), (1.0, 4.0), (0.0, 0.0))
RLPD: dict[str, Any] = {"critics": 5, "target_critics": 2, "critic_norm": "layer", "actor_q": "mean", "actor_every": 2}
CROSSQ: dict[str, Any] = {
    "critic_norm": "batch_renorm",
    "actor_norm": "batch_renorm",
    "tau": None,
    "adam_beta1": 0.5,
}
DSRL: dict[str, Any] = {"steer": "chunk"}
PIXELS: dict[str, Any] = {"random_shift": 2}
KINDS = {"sac": {}, "rlpd": RLPD, "crossq": CROSSQ, "dsrl": DSRL, "pixels": PIXELS}
kinds = pytest.mark.parametrize("kind", KINDS)


def toy(kind: str = "sac", seed: int = 0, **more: Any) -> SAC:
    torch.manual_seed(seed)
    if kind == "dsrl":
        policy: Any = FlowMLPConfig(horizon=3, chunk=K, hidden=(8,), value_hidden=(8,)).build(
            ObservationSpec(state=S), ACTION
        )
    elif kind == "pixels":
        small = SquashedGaussianCNNConfig(chunk=K, hidden=(8,), channels=(4, 4), image_features=4)
        policy = small.build(ObservationSpec(state=S, cameras={"front": CameraSpec(8, 8)}), ACTION)
    else:
        policy = SquashedGaussianMLPConfig(chunk=K, hidden=(8, 8)).build(ObservationSpec(state=S), ACTION)
    defaults: dict[str, Any] = {"critic_hidden": (16, 16), "batch_size": B, "gamma": 0.9, "gamma_per": "step"}
    return SACConfig(**(defaults | KINDS[kind] | more)).build(policy, seed)


class ToyReplay:
    """Made-up decisions; `mark` is in every reward."""

    successful = 0

    def __init__(self, kind: str = "sac", mark: float = 0.0) -> None:
        self.kind, self.mark = kind, mark

    def sample(self, batch: int, generator: np.random.Generator, decisions: int = 1) -> dict[str, Any]:
        def numbers(*shape: int) -> np.ndarray:
            return generator.normal(size=shape).astype(np.float32)

        def inputs() -> dict[str, np.ndarray]:
            image = generator.integers(0, 256, (batch, 8, 8, 3)).astype(np.uint8)
            return {"state": numbers(batch, S)} | ({"image.front": image} if self.kind == "pixels" else {})

        low, high = np.array(ACTION.low), np.array(ACTION.high)
        actions = (low + (high - low) * generator.random((batch, K, A))).astype(np.float32)
        valid = np.ones((batch, decisions, K), bool)
        valid[:, -1] = np.arange(K) < generator.integers(1, K + 1, batch)[:, None]
        return {
            "inputs": inputs(),
            "next_inputs": inputs(),
            "actions": generator.uniform(-1, 1, (batch, 1, 6)).astype(np.float32) if self.kind == "dsrl" else actions,
            "valid": valid,
            "reward": numbers(batch, decisions, K) + self.mark,
            "terminated": generator.random(batch) < 0.3,
            "potential": numbers(batch),
            "next_potential": numbers(batch),
        }

    def sample_successful(self, batch: int, generator: np.random.Generator) -> dict[str, Any]:
        raise NotImplementedError


def learn(algorithm: SAC, kind: str, updates: range) -> list[dict[str, torch.Tensor]]:
    metrics = []
    for update in updates:
        batch = algorithm.draw(ToyReplay(kind), None, np.random.default_rng(update))
        metrics.append(algorithm.update(batch, torch.Generator().manual_seed(update)))
    return metrics


def parameters(*modules: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()])


# -- returns ----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    executed=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    gamma=st.floats(0.5, 1.0),
    per_step=st.booleans(),
    seed=st.integers(0, 99),
)
def test_n_step_returns_follow_their_definition(executed, gamma, per_step, seed):
    """A chain of decisions that each executed some of 3 steps; none after the first that executed nothing."""
    executed = [max(executed[0], 1), *executed[1:]]
    first_missing = next((i for i, steps in enumerate(executed) if steps == 0), len(executed))
    executed = executed[:first_missing] + [0] * (len(executed) - first_missing)
    reward = np.random.default_rng(seed).normal(size=(len(executed), 3))
    expected, discount = 0.0, 1.0
    for rewards, steps in zip(reward, executed, strict=True):
        for k in range(steps):
            expected += discount * (gamma**k if per_step else 1.0) * rewards[k]
        discount *= (gamma**steps if per_step else gamma) if steps else 1.0
    valid = torch.arange(3) < torch.tensor(executed)[:, None]
    poisoned = torch.where(valid, torch.from_numpy(reward), torch.nan)
    result = n_step_return(poisoned[None], valid[None], gamma, "step" if per_step else "decision")
    assert [float(x) for x in result] == pytest.approx([expected, discount])


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 12), chunk=st.sampled_from([1, 2, 3, 4, 6]), gamma=st.floats(0.5, 1.0))
def test_a_chunk_is_worth_as_much_as_its_single_steps(steps, chunk, gamma):
    """An episode that ends anywhere, cut into chunks or not at all."""
    reward = torch.sin(torch.arange(12.0, dtype=torch.float64))
    valid = torch.arange(12) < steps
    results = [n_step_return(reward.view(1, -1, k), valid.view(1, -1, k), gamma, "step") for k in (1, chunk)]
    torch.testing.assert_close(results[0], results[1])


# -- updates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backup", [True, False])
@pytest.mark.parametrize("members", [None, 1, 2])
def test_target_and_loss_follow_their_formula(backup, members):
    algorithm = toy("rlpd", target_critics=members, entropy_backup=backup, n_step=2, initial_temperature=0.3)
    assert algorithm.target is not None
    with torch.no_grad():
        for parameter in algorithm.target.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    batch = algorithm.draw(ToyReplay(), None, np.random.default_rng(3))
    critic, target, policy = (copy.deepcopy(each) for each in (algorithm.critic, algorithm.target, algorithm.policy))
    metrics = algorithm.update(batch, torch.Generator().manual_seed(4))

    torch.manual_seed(int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(4))))
    state, next_state = batch["inputs"]["state"], batch["next_inputs"]["state"]
    mean, std = policy.actor(next_state)
    x = mean + std * torch.randn_like(mean)
    u = x.tanh()
    density = torch.distributions.Normal(mean, std).log_prob(x) - torch.log(1 - u**2)
    next_q = target(torch.cat([next_state, u.flatten(1)], 1))
    chosen = range(5) if members is None else torch.randperm(5)[:members].tolist()
    center, half = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0])
    y = torch.stack([
        batch["reward"][b]
        + batch["discount"][b] * (min(next_q[e, b] for e in chosen) - (0.3 * density[b].sum() if backup else 0.0))
        for b in range(B)
    ])  # fmt: skip
    done = (batch["actions"] - center) / half * batch["valid"][..., None]
    q = critic(torch.cat([state, done.flatten(1)], 1))
    torch.testing.assert_close(metrics["target"], y.mean().detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["critic_loss"], ((q - y) ** 2).mean(1).sum().detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        parameters(algorithm.target), 0.995 * parameters(target) + 0.005 * parameters(algorithm.critic)
    )


@kinds
def test_each_optimizer_moves_its_own_and_leaves_no_gradient(kind):
    algorithm = toy(kind, actor_every=2)
    encoder = algorithm.policy.parameter_groups().get("encoder", [])
    before = [p.clone() for p in encoder]
    for update, trains in enumerate((False, True)):
        actor, critic = parameters(algorithm.policy.actor), parameters(algorithm.critic)
        temperature = algorithm.temperature().item()
        (metrics,) = learn(algorithm, kind, range(update, update + 1))
        assert torch.equal(actor, parameters(algorithm.policy.actor)) != trains
        assert (algorithm.temperature().item() != temperature) == trains == ("actor_loss" in metrics)
        assert not torch.equal(critic, parameters(algorithm.critic))
        assert not any(value.requires_grad for value in metrics.values())
    assert all(not torch.equal(p, old) for p, old in zip(encoder, before, strict=True))
    networks = [algorithm.policy, *algorithm.modules().values()]
    assert all(p.grad is None for network in networks for p in network.parameters())


def test_the_critics_learn_the_same_with_and_without_an_actor():
    """The actor's gradient through the critics, running statistics included, leaves nothing in them."""
    for kind in ("rlpd", "crossq"):
        one, two = toy(kind, actor_every=1), toy(kind, actor_every=5)
        for algorithm in (one, two):
            learn(algorithm, kind, range(1))
        assert torch.equal(parameters(one.critic), parameters(two.critic))
        for a, b in zip(one.critic.buffers(), two.critic.buffers(), strict=True):
            assert torch.equal(a, b)


@kinds
def test_a_restored_algorithm_goes_on_exactly(kind):
    one, two = toy(kind), toy(kind, seed=1)
    learn(one, kind, range(3))
    two.policy.load_state_dict(one.policy.state_dict())
    assert one.modules().keys() == two.modules().keys()
    for name, module in two.modules().items():
        module.load_state_dict(one.modules()[name].state_dict())
    for name, optimizer in two.optimizers().items():
        optimizer.load_state_dict(copy.deepcopy(one.optimizers()[name].state_dict()))
    two.load_counters(one.counters())
    for algorithm in (one, two):
        torch.manual_seed(id(algorithm) % 1000)
        learn(algorithm, kind, range(3, 6))
    assert torch.equal(parameters(one.policy), parameters(two.policy))
    for a, b in zip(one.modules().values(), two.modules().values(), strict=True):
        assert torch.equal(parameters(a), parameters(b))


def test_nothing_after_a_termination_and_no_unexecuted_action_matters():
    replay = ToyReplay().sample(B, np.random.default_rng(0))
    other = copy.deepcopy(replay)
    other["actions"][~other["valid"][:, 0]] = 0.77
    other["reward"][~other["valid"]] = 5.0
    other["next_inputs"]["state"][other["terminated"]] = 3.0
    other["next_potential"][other["terminated"]] = 3.0

    class Fixed(ToyReplay):
        def __init__(self, data: dict[str, Any]) -> None:
            self.data = data

        def sample(self, *_: Any) -> dict[str, Any]:
            return self.data

    algorithms = [toy(shaping=1.0) for _ in range(2)]
    for algorithm, data in zip(algorithms, (replay, other), strict=True):
        batch = algorithm.draw(Fixed(data), None, np.random.default_rng(0))
        algorithm.update(batch, torch.Generator().manual_seed(0))
    assert torch.equal(parameters(algorithms[0].critic), parameters(algorithms[1].critic))


def test_the_temperature_follows_the_entropy():
    for target, sign in ((100.0, 1), (-100.0, -1)):
        algorithm = toy(target_entropy=target)
        learn(algorithm, "sac", range(5))
        assert sign * math.log(algorithm.temperature().item()) > 0
    fixed = toy(target_entropy=100.0, temperature_learning_rate=0.0)
    learn(fixed, "sac", range(3))
    assert fixed.temperature().item() == 1.0


@pytest.mark.parametrize("warmup", [0, 10])
def test_a_unit_that_is_the_same_in_the_whole_batch_has_a_finite_gradient(warmup):
    norm, x = BatchRenorm(3, warmup=warmup), torch.randn(8, 3)
    x[:, 1] = 0.5
    x.requires_grad_()
    with batch_statistics(norm):
        norm(x).square().sum().backward()
    assert x.grad.isfinite().all() and norm.scale.grad.isfinite().all()
    assert x.grad[:, 0].abs().sum() > 0


def test_a_normalised_actor_learns_from_the_statistics_of_the_batch_and_acts_by_the_running_ones():
    algorithm = toy("crossq")
    body, generator = algorithm.policy.actor.body, torch.Generator().manual_seed(0)
    shapes = [tuple(layer.mean.shape) for layer in body if hasattr(layer, "warmup")]
    assert shapes == [(1, S), (1, 8), (1, 8)]
    batch = algorithm.draw(ToyReplay(), None, np.random.default_rng(0))
    state = batch["inputs"]["state"]
    algorithm.update(batch, generator)
    torch.testing.assert_close(body[0].mean[0], 0.01 * state.mean(0))
    torch.testing.assert_close(body[0].variance[0], 0.99 + 0.01 * state.var(0, correction=0))
    before = copy.deepcopy(body.state_dict())
    inputs = {"state": torch.randn(6, S)}
    whole, part = (
        algorithm.policy.act(each, deterministic=True).actions for each in (inputs, {"state": inputs["state"][:2]})
    )
    torch.testing.assert_close(whole[:2], part)
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())
    check(algorithm.policy)


@settings(max_examples=20, deadline=None)
@given(half=st.integers(1, 8), seed=st.integers(0, 50), n_step=st.integers(1, 3))
def test_half_of_a_symmetric_batch_is_demonstrations(half, seed, n_step):
    algorithm = toy(symmetric=True, batch_size=2 * half, n_step=n_step)
    assert algorithm.demonstrations == "decisions"
    batch = algorithm.draw(ToyReplay(), ToyReplay(mark=1000.0), np.random.default_rng(seed))
    assert len(batch["reward"]) == len(batch["inputs"]["state"]) == 2 * half
    assert (batch["reward"][0::2] > 300).all() and (batch["reward"][1::2] < 300).all()


def test_it_acts_at_random_until_its_first_update():
    algorithm = toy()
    inputs, tickets = {"state": torch.zeros(400, S)}, np.arange(400)

    def actions() -> torch.Tensor:
        return algorithm.act(inputs, RowNoise(0, tickets, np.zeros(400, np.int64))).actions

    spread = actions()
    assert torch.allclose(spread.amin((0, 1)), torch.tensor(ACTION.low), atol=0.05)
    assert torch.allclose(spread.amax((0, 1)), torch.tensor(ACTION.high), atol=0.05)
    algorithm.updates = 1
    own = algorithm.policy.act(inputs, noise=RowNoise(0, tickets, np.zeros(400, np.int64))).actions
    assert torch.equal(actions(), own) and own.std() < spread.std()


@pytest.mark.parametrize("kind", ["sac", "crossq"])
def test_it_approaches_the_best_action(kind):
    """A bandit whose reward falls with the distance from (0.5, 1); the untrained policy is at (0, 2)."""
    rates = {"learning_rate": 1e-3, "critic_learning_rate": 3e-3, "temperature_learning_rate": 1e-2}
    algorithm = toy(kind, **rates, critic_hidden=(64, 64), batch_size=64, initial_temperature=0.1)
    best, rng = torch.tensor([0.5, 1.0]), np.random.default_rng(0)
    for update in range(200):
        batch = algorithm.draw(ToyReplay(), None, rng)
        batch["valid"][:] = True
        reward = -(batch["actions"] - best).square().sum((1, 2))
        algorithm.update(batch | {"reward": reward, "discount": 0 * reward}, torch.Generator().manual_seed(update))
    chosen = algorithm.policy.act({"state": torch.randn(64, S)}, deterministic=True).actions
    assert (chosen - best).abs().mean() < 0.4


# -- steering ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steer", "width"), [("chunk", 6), ("step", 2)])
def test_steering_leaves_the_flow_alone(steer, width):
    algorithm = toy("dsrl", steer=steer)
    flow = algorithm.policy.flow
    before = parameters(flow)
    inputs, noise = {"state": torch.randn(5, S)}, RowNoise(0, np.arange(5), np.zeros(5, np.int64))
    sample = algorithm.act(inputs, noise)
    u = algorithm.recorded(sample)
    assert u.shape == (5, 1, width) and u.abs().max() <= 1
    start = (1.5 * u).reshape(5, -1, 2).expand(5, 3, 2)
    torch.testing.assert_close(sample.actions, flow.sample(inputs, start)[:, :K].detach())
    if steer == "chunk":
        learn(algorithm, "dsrl", range(3))
    assert torch.equal(before, parameters(flow))


# -- images -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(pixels=st.integers(1, 4), height=st.integers(3, 9), width=st.integers(3, 9), seed=st.integers(0, 99))
def test_images_are_shifted_as_if_cut_out_of_a_padded_one(pixels, height, width, seed):
    torch.manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width, 3), dtype=torch.uint8)
    inputs = {"image.front": image, "state": torch.randn(3, 2), "image_mask.front": torch.ones(3, dtype=torch.bool)}
    shifted = random_shift(inputs, pixels)
    assert shifted["state"] is inputs["state"] and shifted["image_mask.front"] is inputs["image_mask.front"]
    for before, after in zip(image.numpy(), shifted["image.front"].numpy(), strict=True):
        padded = np.pad(before, ((pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
        offsets = range(2 * pixels + 1)
        assert any(np.array_equal(after, padded[y : y + height, x : x + width]) for y in offsets for x in offsets)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gamma": 1.5}, "gamma must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"replay_capacity": 100}, "replay_capacity 100 is below batch_size 256"),
        ({"updates_per_decision": 0.0}, "updates_per_decision"),
        ({"critics": 0}, "critics must be"),
        ({"target_critics": 3}, "1 to critics = 2"),
        ({"tau": 0.0}, "tau must be"),
        ({"critic_norm": "batch_renorm"}, "set tau to none"),
        ({"initial_temperature": 0.0}, "initial_temperature must be"),
        ({"symmetric": True, "batch_size": 7}, "make it even"),
        ({"symmetric": True, "steer": "step"}, "not both"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        SACConfig(**wrong)


def test_policies_that_do_not_fit_are_refused():
    gaussian = GaussianMLPConfig().build(ObservationSpec(state=S), ACTION)
    with pytest.raises(UserError, match="use squashed_gaussian_mlp"):
        SACConfig().build(gaussian, 0)
    with pytest.raises(UserError, match="steer needs a flow policy"):
        SACConfig(steer="chunk").build(gaussian, 0)
    chunked = SquashedGaussianMLPConfig(chunk=2).build(ObservationSpec(state=S), ACTION)
    with pytest.raises(UserError, match="2 actions: choose gamma_per"):
        SACConfig().build(chunked, 0)


@pytest.mark.gpu
@kinds
def test_an_update_waits_for_no_device(kind):
    algorithm = toy(kind, actor_every=1)
    policy = algorithm.policy.to("cuda")
    algorithm = SAC(algorithm.config, policy, 0)
    batches = [algorithm.draw(ToyReplay(kind), None, np.random.default_rng(i)) for i in range(3)]
    for i, batch in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if i else "default")  # the first one makes the optimizers' state
        try:
            algorithm.update(batch, torch.Generator().manual_seed(i))
        finally:
            torch.cuda.set_sync_debug_mode("default")

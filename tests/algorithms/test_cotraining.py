"""Reinforcement learning plus imitation of a second dataset, in one step of the optimizer."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from algorithm_toys import ToyFlow, ToyGaussian
from test_ppo import segment

from embodied_rl.algorithms import cotraining
from embodied_rl.algorithms.cotraining import CoTraining
from embodied_rl.algorithms.flow_actor_critic import FlowActorCriticConfig
from embodied_rl.algorithms.grpo import GRPOConfig
from embodied_rl.algorithms.imitation import ImitationConfig, mean_imitation_loss
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.algorithms.sac import SACConfig
from embodied_rl.errors import UserError
from embodied_rl.policies.categorical_mlp import CategoricalMLPConfig
from embodied_rl.policies.check import synthesise
from embodied_rl.policies.flow_mlp import FlowMLPConfig
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.policies.squashed_gaussian import SquashedGaussianMLPConfig
from embodied_rl.specs import ActionSpec, ObservationSpec

SEEN, ACTION = ObservationSpec(state=3), ActionSpec((-1.0, -1.0), (1.0, 1.0), (0.0, 0.0))
BETA = 0.3


def gaussian():
    return GaussianMLPConfig(chunk=2, hidden=(8,)).build(SEEN, ACTION).double()


def flow():
    return FlowMLPConfig(horizon=3, chunk=2, hidden=(8,), value_hidden=(8,), joint=True).build(SEEN, ACTION).double()


def choices():
    spec = ActionSpec((0.0,), (4.0,), (0.0,), control="discrete", choices=5)
    return CategoricalMLPConfig(hidden=(8,)).build(SEEN, spec).double()


def tokens():
    sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))
    from openvla_toys import parallel  # pyright: ignore[reportMissingImports]

    policy = parallel().double()
    policy.value_head.float()  # as it always is
    return policy


def squashed():
    return SquashedGaussianMLPConfig(chunk=2, hidden=(8,)).build(SEEN, ACTION).double()


def toy_flow():
    return ToyFlow(state=3, chunk=2, dim=2, width=8).double()


def dataset(policy, rows=7, seed=1):
    """Chunks of which some steps, and one whole row, are invalid."""
    generator = torch.Generator().manual_seed(seed)
    inputs = policy.prepare(synthesise(policy.observation_spec, rows, seed))
    dtype = next(policy.parameters()).dtype
    low, high = torch.tensor(policy.action_spec.low), torch.tensor(policy.action_spec.high)
    actions = low + (high - low) * torch.rand(rows, policy.horizon, len(low), generator=generator, dtype=dtype)
    valid = torch.rand(rows, policy.horizon, generator=generator) < 0.7
    valid[0] = False
    return {"inputs": cast(inputs, dtype), "actions": actions, "valid": valid}


def cast(inputs, dtype):
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def decisions(policy, rows=10):
    """Rows for `PolicyGradient.improve`."""
    dtype = next(policy.parameters()).dtype
    inputs = cast(policy.prepare(synthesise(policy.observation_spec, rows, 0)), dtype)
    torch.manual_seed(0)
    sample = policy.act(inputs)
    valid = torch.ones(rows, policy.chunk, dtype=torch.bool)
    valid[::3, -1] = False
    return {
        "inputs": inputs,
        "trace": sample.trace,
        "log_prob": sample.log_prob,
        "valid": valid,
        "advantages": torch.randn(rows, dtype=dtype),
        "value": policy.value(inputs).detach(),
        "returns": torch.randn(rows, dtype=dtype),
        "weight": torch.rand(rows, dtype=dtype),
    }


def replayed(policy, rows=12):
    """A batch for the off-policy algorithms."""
    generator = torch.Generator().manual_seed(3)
    dtype = next(policy.parameters()).dtype

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return {
        "inputs": {"state": numbers(rows, 3)},
        "next_inputs": {"state": numbers(rows, 3)},
        "actions": numbers(rows, 2, 2).clamp(-1, 1),
        "valid": torch.ones(rows, 2, dtype=torch.bool),
        "reward": numbers(rows),
        "discount": torch.full((rows,), 0.9, dtype=dtype),
        "anchor": dataset(policy, seed=5),
    }


ONCE = {"epochs": 1, "minibatches": 1, "max_grad_norm": 1e9}
OFF = {"gamma_per": "step", "critic_hidden": (8,), "max_grad_norm": 1e9}
CASES = {
    "grpo, Gaussian": (GRPOConfig(**ONCE), gaussian),
    "grpo, Gaussian, in parts": (GRPOConfig(**ONCE, microbatch=4), gaussian),
    "grpo, flow": (GRPOConfig(**ONCE), flow),
    "grpo, flow, in parts": (GRPOConfig(**ONCE, microbatch=4), flow),
    "grpo, choices, in parts": (GRPOConfig(**ONCE, microbatch=4), choices),
    "sac": (SACConfig(**OFF), squashed),
    "flow actor-critic": (
        FlowActorCriticConfig(**OFF, actor_every=1, critic_warmup_updates=0, q_warmup_updates=0),
        toy_flow,
    ),
}
TOKENS = GRPOConfig(**ONCE, microbatch=4, granularity="token"), tokens


def improve(algorithm, generator):
    """One update (of one minibatch, on-policy)."""
    if isinstance(algorithm.config, PPOConfig | GRPOConfig):
        algorithm.improve(decisions(algorithm.policy), algorithm.iterations, generator)
    else:
        algorithm.update(replayed(algorithm.policy), generator)


def gradient(config, policy, second=None):
    """Of the actor in one update, before the optimizer's step, by parameter."""
    algorithm = config.build(policy, 0)
    if isinstance(config, SACConfig | FlowActorCriticConfig):
        algorithm.critic.double()
        algorithm.target.double()
        policy = algorithm.policy
    found = {}
    names = {parameter: name for name, parameter in policy.named_parameters()}

    def remember(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in names and parameter.grad is not None:
                    found[names[parameter]] = parameter.grad.clone()

    for optimizer in algorithm.optimizers().values():
        optimizer.register_step_pre_hook(remember)
    if second:
        algorithm.cotrain(second)
    improve(algorithm, torch.Generator().manual_seed(0))
    return found


def imitation_gradient(policy, parts):
    """By its definition: over the rows of all parts that have a valid step, the mean of the policy's own loss under the
    random numbers of that part."""
    losses = []
    for state, part in parts:
        torch.set_rng_state(state)
        losses.append(policy.imitation_loss(**part)[part["valid"].any(1)])
    names, parameters = zip(*[(n, p) for n, p in policy.named_parameters() if p.requires_grad], strict=True)
    found = torch.autograd.grad(torch.cat(losses).mean(), parameters, allow_unused=True)
    return {name: x for name, x in zip(names, found, strict=True) if x is not None}


@pytest.mark.parametrize("case", [*CASES, pytest.param("tokens, in parts", marks=pytest.mark.slow)])
def test_the_gradient_is_that_of_the_algorithm_plus_beta_times_that_of_imitation(case, monkeypatch):
    config, build = CASES.get(case) or TOKENS
    torch.manual_seed(0)
    start = build()
    policy, parts = copy.deepcopy(start), []
    expected = gradient(config, copy.deepcopy(start))

    def recorded(policy, part):
        parts.append((torch.get_rng_state(), part))
        return mean_imitation_loss(policy, part)

    monkeypatch.setattr(cotraining, "mean_imitation_loss", recorded)
    found = gradient(config, policy, CoTraining(policy, dataset(policy), BETA, batch_size=9, seed=4))
    assert [len(part["valid"]) for _, part in parts] == ([9] if "parts" not in case else [4, 4, 1])
    added = imitation_gradient(start, parts)
    assert any(bool((added[name] != 0).any()) for name in expected if name in added)
    for name in found:
        whole = expected.get(name, 0.0) + BETA * added.get(name, torch.zeros(()))
        torch.testing.assert_close(found[name], whole, rtol=1e-6, atol=1e-7 * whole.abs().max().item())


SEVERAL = {
    "ppo": (PPOConfig(epochs=2, minibatches=3, microbatch=4, critic_warmup=0, kl_coefficient=0.1), gaussian),
    "grpo": (GRPOConfig(epochs=2, minibatches=2), flow),
    "sac": (SACConfig(gamma_per="step", critic_hidden=(8,)), squashed),
    "flow actor-critic": (
        FlowActorCriticConfig(gamma_per="step", critic_hidden=(8,), critic_warmup_updates=0, anchor_batch_size=4),
        toy_flow,
    ),
}


def learned(case, second, updates=4, restore_at=None):
    """(all parameters, states of the random generators) after some updates, starting over from what a checkpoint holds
    when `restore_at` of them are made."""
    config, build = SEVERAL[case]

    def begin():
        torch.manual_seed(0)
        algorithm = config.build(build().float(), 0)
        if second is not None:
            algorithm.cotrain(CoTraining(algorithm.policy, dataset(algorithm.policy), second, batch_size=5, seed=4))
        return algorithm

    algorithm, generator = begin(), torch.Generator().manual_seed(0)
    for update in range(updates):
        if update == restore_at:
            before, algorithm = algorithm, begin()
            algorithm.policy.load_state_dict(before.policy.state_dict())
            for name, module in algorithm.modules().items():
                module.load_state_dict(before.modules()[name].state_dict())
            for name, optimizer in algorithm.optimizers().items():
                optimizer.load_state_dict(before.optimizers()[name].state_dict())
            algorithm.load_counters(before.counters())
        improve(algorithm, generator)
    everything = [algorithm.policy, *algorithm.modules().values()]
    parameters = torch.cat([p.detach().flatten() for module in everything for p in module.parameters()])
    return parameters, torch.get_rng_state(), generator.get_state()


@pytest.mark.parametrize("case", SEVERAL)
def test_with_beta_0_everything_is_that_of_the_algorithm_alone_bit_by_bit(case):
    for alone, both in zip(learned(case, None), learned(case, 0.0), strict=True):
        assert torch.equal(alone, both)


@pytest.mark.parametrize("case", SEVERAL)
def test_the_algorithm_draws_the_numbers_that_it_draws_alone(case):
    alone, both = learned(case, None), learned(case, BETA)
    assert not torch.equal(alone[0], both[0])
    assert torch.equal(alone[1], both[1]) and torch.equal(alone[2], both[2])


@pytest.mark.parametrize("case", SEVERAL)
def test_it_goes_on_after_a_checkpoint_as_if_nothing_had_happened(case):
    for whole, resumed in zip(learned(case, BETA), learned(case, BETA, restore_at=2), strict=True):
        assert torch.equal(whole, resumed)


def test_every_update_has_its_own_batch_and_every_seed_its_own():
    policy = flow()
    second = CoTraining(policy, dataset(policy), BETA, batch_size=3, seed=0)
    other = CoTraining(policy, dataset(policy), BETA, batch_size=3, seed=1)
    losses = [each.loss(update).item() for each in (second, other) for update in range(5)]
    assert len(set(losses)) == len(losses)
    assert losses[:5] == [second.loss(update).item() for update in range(5)]


def test_the_value_head_learns_what_it_learns_alone():
    """Also while the critic warms up, when the policy is left alone by both losses."""
    heads = []
    for second in (None, BETA):
        policy = ToyGaussian()
        algorithm = PPOConfig(critic_warmup=1, epochs=1, minibatches=1).build(policy, 0)
        if second:
            algorithm.cotrain(CoTraining(policy, dataset(policy), second, batch_size=5, seed=0))
        trajectory, start = segment(policy), policy.mean.weight.detach().clone()
        assert "cotraining_loss" not in algorithm.learn(trajectory, torch.Generator().manual_seed(0))
        assert torch.equal(policy.mean.weight, start)
        metrics = algorithm.learn(trajectory, torch.Generator().manual_seed(1))
        assert (metrics.get("cotraining_loss", 0.0) > 0) == (second is not None)
        heads.append(policy.value_head.weight.detach().clone())
    assert torch.equal(*heads)


def test_what_cannot_co_train_says_so():
    flow_policy = flow().float()
    second = CoTraining(flow_policy, dataset(flow_policy), BETA, batch_size=5, seed=0)
    with pytest.raises(UserError, match="nothing to co-train"):
        SACConfig(steer="chunk", gamma_per="step").build(flow_policy, 0).cotrain(second)
    with pytest.raises(UserError, match="Imitation does not co-train: use ppo"):
        ImitationConfig().build(flow_policy, 0).cotrain(second)

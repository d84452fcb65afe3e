"""The Gaussian and the flow-matching MLP."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal

from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies import check
from embodied_rl.policies.flow_mlp import FlowMLPConfig
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.policies.mlp import ActionScale, StateNormaliser, mlp
from embodied_rl.policies.value_head import ValueHead
from embodied_rl.randomness import RowNoise
from embodied_rl.registry import policies
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec

OBSERVATION = ObservationSpec(state=7)
ACTION = ActionSpec(low=(-1.0, 0.0, -3.0), high=(1.0, 0.1, 2.0), hold=(0.0, 0.0, 0.0))
SMALL: dict[str, Any] = {"hidden": (16, 16), "value_hidden": (16,)}
JOINT: list[Any] = [(False, "sum"), (True, "sum"), (True, "mean")]
METHODS: list[Any] = ["sde", "noise", "cps"]
CONFIGS = [
    GaussianMLPConfig(**SMALL),
    GaussianMLPConfig(chunk=2, horizon=5, **SMALL),
    *(
        FlowMLPConfig(horizon=5, chunk=3, method=method, joint=joint, joint_reduction=reduction, **SMALL)
        for method in METHODS
        for joint, reduction in JOINT
    ),
    FlowMLPConfig(method="ode", **SMALL),
    FlowMLPConfig(horizon=1, chunk=1, denoise_steps=1, **SMALL),
]
configs = pytest.mark.parametrize("config", CONFIGS, ids=str)
families = pytest.mark.parametrize(
    "config",
    [GaussianMLPConfig(chunk=3, horizon=5, **SMALL), FlowMLPConfig(horizon=5, chunk=3, **SMALL)],
    ids=["g", "f"],
)


def build(config, seed: int = 0):
    torch.manual_seed(seed)
    policy = config.build(OBSERVATION, ACTION)
    policy.set_statistics(np.linspace(-1, 1, 7), np.linspace(0.5, 2, 7))
    return policy


def states(rows: int, seed: int = 0):
    return {"state": torch.randn(rows, 7, generator=torch.Generator().manual_seed(seed))}


def row_noise(rows, decision: int = 0):
    rows = np.asarray(rows)
    return RowNoise(5, rows, np.full(len(rows), decision))


@configs
def test_keeps_the_contract(config):
    check(build(config), fresh=lambda: config.build(OBSERVATION, ACTION))


def test_is_registered():
    assert policies.load("gaussian_mlp") is GaussianMLPConfig
    assert policies.load("flow_mlp") is FlowMLPConfig


@families
@given(cut=st.integers(1, 7), order=st.permutations(range(8)), deterministic=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_row_acts_the_same_in_any_batch(config, cut, order, deterministic):
    policy, inputs = build(config), states(8)
    whole = policy.act(inputs, deterministic, row_noise(range(8))).actions
    for rows in (list(order[:cut]), list(order[cut:])):
        part = policy.act({"state": inputs["state"][rows]}, deterministic, row_noise(rows)).actions
        torch.testing.assert_close(part, whole[rows], rtol=1e-5, atol=1e-6)


@families
@given(lengths=st.lists(st.integers(0, 5), min_size=4, max_size=4), junk=st.sampled_from([7.0, float("nan")]))
@settings(max_examples=20, deadline=None)
def test_imitation_ignores_invalid_steps_exactly(config, lengths, junk):
    policy, inputs = build(config), states(4)
    valid = torch.arange(5) < torch.tensor(lengths)[:, None]
    actions = torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(1))
    runs = []
    for tail in (0.0, junk):
        filled = torch.where(valid[..., None], actions, tail).requires_grad_()
        torch.manual_seed(2)
        policy.zero_grad()
        loss = policy.imitation_loss(inputs, filled, valid)
        loss.sum().backward()
        assert filled.grad is not None
        assert (filled.grad[~valid] == 0).all()
        runs.append([loss.detach(), *(p.grad.clone() for p in policy.parameters() if p.grad is not None)])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
    assert (runs[0][0][torch.tensor(lengths) == 0] == 0).all()


def test_gaussian_score_is_the_density():
    policy, inputs = build(GaussianMLPConfig(chunk=2, horizon=3, initial_log_std=-1.0, **SMALL)), states(6)
    sample = policy.act(inputs)
    score = policy.evaluate_actions(inputs, sample.trace)
    mean = policy.mean((inputs["state"] - policy.normaliser.state_mean) / policy.normaliser.state_std).view(6, 3, 3)
    normal = Normal(mean[:, :2], np.exp(-1.0))
    torch.testing.assert_close(score.log_prob, normal.log_prob(sample.trace["x"]).flatten(1))
    torch.testing.assert_close(score.entropy, normal.entropy().flatten(1))
    assert score.term_step.tolist() == [0, 0, 0, 1, 1, 1]


@families
def test_clipped_actions_keep_the_density_of_the_sample(config):
    policy, inputs = build(config), states(64)
    with torch.no_grad():
        policy.action_scale.scale.mul_(4)
    sample = policy.act(inputs)
    low, high = torch.tensor(ACTION.low), torch.tensor(ACTION.high)
    assert ((sample.actions == low) | (sample.actions == high)).any(), "nothing was clipped: the test tests nothing"
    assert ((sample.actions >= low) & (sample.actions <= high)).all()
    score = policy.evaluate_actions(inputs, sample.trace)
    torch.testing.assert_close(score.log_prob, sample.log_prob, rtol=1e-5, atol=1e-5)


def test_flow_matching_loss_by_definition():
    policy, inputs = build(FlowMLPConfig(horizon=5, chunk=3, **SMALL)), states(4)
    generator = torch.Generator().manual_seed(0)
    actions = torch.rand(4, 5, 3, generator=generator) * 0.1
    noise, time = torch.randn(4, 5, 3, generator=generator), torch.rand(4, generator=generator)
    lengths = [5, 3, 1, 0]
    valid = torch.arange(5) < torch.tensor(lengths)[:, None]
    loss = policy.imitation_loss(inputs, actions, valid, noise=noise, time=time)
    for row, length in enumerate(lengths):
        low, high = torch.tensor(ACTION.low), torch.tensor(ACTION.high)
        target = 2 * (actions[row] - low) / (high - low) - 1
        target[length:] = 0
        x = time[row] * noise[row] + (1 - time[row]) * target
        prefix = policy.encode({"state": inputs["state"][row : row + 1]})
        v = policy.velocity(prefix, x[None], time[row : row + 1])[0][0]
        expected = (v - (noise[row] - target))[:length].square().mean() if length else torch.tensor(0.0)
        torch.testing.assert_close(loss[row], expected, rtol=1e-4, atol=1e-5)


def test_imitation_loss_is_reproducible_with_a_generator():
    policy, inputs = build(FlowMLPConfig(**SMALL)), states(4)
    valid = torch.ones(4, 4, dtype=torch.bool)
    losses = [
        policy.imitation_loss(inputs, torch.zeros(4, 4, 3), valid, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_flow_learns_a_bimodal_action():
    """Cloning two opposite demonstrations must give either of them, never their mean: what a flow is for."""
    torch.manual_seed(0)
    spec = ActionSpec((-2.0, -2.0), (2.0, 2.0), (0.0, 0.0))
    policy = FlowMLPConfig(horizon=2, chunk=2, hidden=(64, 64), value_hidden=(8,), denoise_steps=8).build(
        OBSERVATION, spec
    )
    optimizer = torch.optim.Adam(policy.parameters(), 2e-3)
    valid = torch.ones(256, 2, dtype=torch.bool)
    for _ in range(1200):
        inputs = {"state": torch.randn(256, 7)}
        side = torch.randint(2, (256, 1, 1)) * 2.0 - 1.0
        loss = policy.imitation_loss(inputs, side.expand(256, 2, 2), valid).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    actions = policy.sample({"state": torch.randn(500, 7)}).detach()
    assert (actions.abs() - 1).abs().mean() < 0.2
    assert 0.3 < (actions[:, 0, 0] > 0).float().mean() < 0.7
    assert (actions.sign() == actions[:, :1, :1].sign()).all(2).all(1).float().mean() > 0.95, "a chunk is one mode"


@families
def test_sample_is_differentiable_and_follows_its_noise(config):
    policy, inputs = build(config), states(4)
    noise = torch.randn(4, 5, 3) * 0.1
    actions = policy.sample(inputs, noise)
    assert actions.shape == (4, 5, 3)
    assert torch.equal(actions, policy.sample(inputs, noise))
    assert not torch.equal(actions, policy.sample(inputs, -noise))
    actions.sum().backward()
    assert all(p.grad is not None for p in policy.parameter_groups()["policy"])
    assert all(p.grad is None for p in policy.parameter_groups()["value"])


def test_deterministic_flow_is_the_ode_of_the_row_noise():
    policy, inputs = build(FlowMLPConfig(horizon=5, chunk=3, **SMALL)), states(4)
    noise = torch.from_numpy(row_noise(range(4)).normal(5, 3))
    expected = policy.sample(inputs, noise)[:, :3].detach()
    torch.testing.assert_close(policy.act(inputs, True, row_noise(range(4))).actions, expected)
    torch.testing.assert_close(policy.act(inputs, True).actions, policy.sample(inputs, 0 * noise)[:, :3].detach())


def test_parameter_groups_split_policy_and_value():
    for config in CONFIGS:
        policy = build(config)
        groups = policy.parameter_groups()
        assert {id(p) for p in groups["value"]} == {id(p) for p in policy.value_head.parameters()}
        assert len(groups["policy"]) + len(groups["value"]) == len(list(policy.parameters()))


def test_state_normaliser():
    normaliser = StateNormaliser(3)
    state = torch.tensor([[1.0, 2.0, 300.0]])
    assert torch.equal(normaliser(torch.tensor([[1.0, 2.0, 3.0]])), torch.tensor([[1.0, 2.0, 3.0]]))
    normaliser.fit([1.0, 0.0, 0.0], np.array([2.0, 0.0, 1.0]))
    assert normaliser(state).tolist() == [[0.0, 2.0, 10.0]], "constant dimensions are only centred, far ones clipped"
    with pytest.raises(UserError, match="shape"):
        normaliser.fit([0.0], [1.0])
    with pytest.raises(UserError, match="shape"):
        normaliser.fit([0.0] * 3, [1.0])
    with pytest.raises(UserError, match="NaN"):
        normaliser.fit([0.0, float("nan"), 0.0], [1.0] * 3)


@given(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3))
def test_action_scale_round_trip(unit):
    scale = ActionScale(ACTION)
    actions = scale.to_simulator(torch.tensor(unit))
    torch.testing.assert_close(scale.to_network(actions), torch.tensor(unit), rtol=1e-5, atol=1e-5)


def test_specs_that_do_not_fit():
    endless = ActionSpec((-float("inf"),), (1.0,), (0.0,))
    choices = ActionSpec((0.0,), (1.0,), (0.0,), choices=2)
    for config in (GaussianMLPConfig(), FlowMLPConfig()):
        with pytest.raises(SpecError, match="state"):
            config.build(ObservationSpec(cameras={"front": CameraSpec(8, 8)}), ACTION)
        with pytest.raises(SpecError, match="bounds"):
            config.build(OBSERVATION, endless)
        with pytest.raises(SpecError, match="one of 2 choices"):
            config.build(OBSERVATION, choices)


def test_policy_keeps_the_quaternion_order_it_was_trained_with():
    spec = ObservationSpec(state=9, cameras={"front": CameraSpec(8, 8)}, quaternion="wxyz", quaternion_at=(2,))
    for config in (GaussianMLPConfig(**SMALL), FlowMLPConfig(**SMALL)):
        needed = config.build(spec, ACTION).observation_spec
        assert needed == ObservationSpec(state=9, quaternion="wxyz", quaternion_at=(2,))


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (GaussianMLPConfig, {"chunk": 3, "horizon": 2}),
        (GaussianMLPConfig, {"chunk": 0}),
        (FlowMLPConfig, {"chunk": 5}),
        (FlowMLPConfig, {"hidden": ()}),
        (FlowMLPConfig, {"time_features": 3}),
        (FlowMLPConfig, {"noise_std": (0.2, 0.1)}),
        (FlowMLPConfig, {"denoise_steps": 0}),
    ],
)
def test_wrong_settings_are_user_errors(config, wrong):
    with pytest.raises(UserError):
        config(**wrong)


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu", "gelu"])
def test_value_head_starts_near_zero(activation):
    torch.manual_seed(0)
    values = ValueHead(32, (64, 64), activation)(torch.randn(500, 32))
    assert values.shape == (500,)
    assert values.abs().mean() < 0.5
    assert values.std() > 1e-3


@pytest.mark.parametrize("hidden", [(5,), (16, 16), (7, 3, 9)])
def test_a_network_with_tanh_is_that_of_autograd(hidden: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = mlp(4, hidden, "tanh", 3)
    x, y = torch.randn(64, 4), torch.randn(64, 3)
    found = []
    for forward in (network, lambda x: nn.Sequential.forward(network, x)):
        given = x.clone().requires_grad_()
        out = forward(given)
        gradients = torch.autograd.grad((out * y).sum(), [given, *network.parameters()])
        found.append([out, *gradients])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(network(x), found[0][0]), "the same whether it is differentiated or not"
    with torch.autocast("cpu", torch.bfloat16):
        assert network(x).dtype == torch.bfloat16
    torch.testing.assert_close(network(x.view(8, 8, 4)), found[0][0].view(8, 8, 3))
    network(x).sum().backward()  # inputs that need no gradient
    assert all(weight.grad is not None for weight in network.parameters())

"""The flow sampler: density, per-row independence, gradients."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from embodied_rl.errors import UserError
from embodied_rl.policies.flow import (
    FlowSampler,
    FlowSamplerConfig,
    bounded_std,
    flow_cps_step,
    flow_sde_step,
    gaussian_entropy,
    gaussian_log_prob,
    ode_step,
)
from embodied_rl.randomness import RowNoise

B, H, K, D, A = 5, 4, 3, 3, 2
JOINT: list[Any] = [(False, "sum"), (True, "sum"), (True, "mean")]
METHODS: list[Any] = ["sde", "noise", "cps"]
VARIANTS = [
    FlowSamplerConfig(steps, method, 0.5, joint, reduction)
    for steps in (1, 4)
    for method in METHODS
    for joint, reduction in JOINT
    if not (method == "cps" and steps == 1)
]
variants = pytest.mark.parametrize("config", VARIANTS, ids=str)


class Toy(torch.nn.Module):
    """A velocity that mixes everything within a row, in double precision."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(0.3 * torch.randn(H * D, H * D, generator=generator, dtype=torch.float64))
        self.deviation = torch.nn.Parameter(torch.randn(H * D, H * D, generator=generator, dtype=torch.float64))
        self.calls: list[int] = []

    def velocity(self, prefix, x, t):
        self.calls.append(len(x))
        hidden = torch.tanh(x.flatten(1) @ self.weight + prefix + t[:, None])
        return hidden.view_as(x) * 2, hidden

    def std(self, hidden):
        return bounded_std(hidden @ self.deviation).view(-1, H, D)


def draw(sampler: FlowSampler, rows: Sequence[int] = range(B), seed: int = 3):
    noise = RowNoise(seed, np.asarray(rows), np.zeros(len(rows)))
    return sampler.draw(torch.zeros(len(rows), H, D, dtype=torch.float64), noise)


def run(config: FlowSamplerConfig, seed: int = 3):
    toy, sampler = Toy(), FlowSampler(config, K, A)
    prefix = torch.linspace(-1, 1, B, dtype=torch.float64)[:, None]
    x, trace, log_prob = sampler.sample(toy.velocity, prefix, draw(sampler, seed=seed), toy.std)
    return toy, sampler, prefix, x, trace, log_prob


def reference(config, toy, prefix, trace, times):
    """The density by definition: one row and one denoise step at a time, from torch.distributions."""
    n = config.steps
    found = []
    for row in range(B):
        terms = []
        if config.joint:
            chain = trace["chain"][row]
            pairs = [(k, chain[k], chain[k + 1][:K, :A]) for k in range(n)]
        else:
            pairs = [(int(trace["denoise_step"][row]), trace["x_t"][row], trace["x_next"][row])]
        for k, x, after in pairs:
            t, d = times[k], times[k] - times[k + 1]
            v, hidden = toy.velocity(prefix[row : row + 1], x[None], torch.tensor([t], dtype=torch.float64))
            action, noise = x - t * v[0], x + (1 - t) * v[0]
            if config.method == "sde":
                sigma = config.noise_level * math.sqrt(n if k == 0 else t / (1 - t))
                mean, std = action * (1 - t + d) + noise * (t - d - sigma**2 * d / (2 * t)), sigma * math.sqrt(d)
            elif config.method == "cps":
                angle = math.pi * config.noise_level / 2
                mean = action * (1 - t + d) + noise * (t - d) * math.cos(angle)
                std = (t - d) * math.sin(angle)
            else:
                mean, std = x - d * v[0], toy.std(hidden)[0]
            std = torch.as_tensor(std, dtype=torch.float64).expand(H, D)[:K, :A]
            if config.method == "cps" and k == n - 1:
                one = torch.ones(K, A, dtype=torch.float64)
                terms.append((0 * one, Normal(0 * one, one).entropy()))
            else:
                normal = Normal(mean[:K, :A], std)
                terms.append((normal.log_prob(after), normal.entropy()))
        if config.joint and config.joint_reduction == "mean":
            normal = Normal(torch.zeros(K, A, dtype=torch.float64), 1.0)
            terms.insert(0, (normal.log_prob(trace["chain"][row, 0, :K, :A]), normal.entropy()))
            found.append([torch.stack(each).mean(0).flatten() for each in zip(*terms, strict=True)])
        else:
            found.append([torch.stack(each).flatten() for each in zip(*terms, strict=True)])
    return [torch.stack(each) for each in zip(*found, strict=True)]


@variants
def test_score_is_the_density_by_definition(config):
    toy, sampler, prefix, _, trace, log_prob = run(config)
    score, entropy = sampler.score(toy.velocity, prefix, trace, toy.std)
    expected_log_prob, expected_entropy = reference(config, toy, prefix, trace, sampler.times)
    torch.testing.assert_close(score, expected_log_prob, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_prob, score, rtol=1e-9, atol=1e-9)
    assert score.shape == (B, sampler.terms) == (B, len(sampler.term_step()))


@variants
@given(cut=st.integers(1, B - 1), order=st.permutations(range(B)))
@settings(max_examples=8, deadline=None)
def test_any_split_and_order_gives_the_same_rows(config, cut, order):
    toy, sampler, prefix, x, trace, log_prob = run(config)
    for rows in (list(order[:cut]), list(order[cut:])):
        part = sampler.sample(toy.velocity, prefix[rows], draw(sampler, rows), toy.std)
        torch.testing.assert_close(part[0], x[rows], rtol=1e-12, atol=1e-12)
        assert part[1].keys() == trace.keys()
        for name in trace:
            torch.testing.assert_close(part[1][name], trace[name][rows], rtol=1e-12, atol=1e-12)
        score, _ = sampler.score(toy.velocity, prefix[rows], {k: v[rows] for k, v in trace.items()}, toy.std)
        torch.testing.assert_close(score, log_prob[rows], rtol=1e-9, atol=1e-9)


@variants
def test_score_gradient(config):
    """Against central differences along a random direction of the velocity's and the learned deviation's weights."""
    toy, sampler, prefix, _, trace, _ = run(config)
    parameters = list(toy.parameters())
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    weights = torch.randn(2, B, sampler.terms, generator=generator, dtype=torch.float64)

    def objective(distance: float = 0.0) -> torch.Tensor:
        moved = Toy()
        for parameter, origin, direction in zip(moved.parameters(), parameters, directions, strict=True):
            parameter.data = origin.data + distance * direction
        terms = torch.stack(sampler.score(moved.velocity, prefix, trace, moved.std))
        gradient = torch.autograd.grad((weights * terms).sum(), list(moved.parameters()), allow_unused=True)
        along = sum((g * d).sum() for g, d in zip(gradient, directions, strict=True) if g is not None)
        return torch.stack([(weights * terms).sum().detach(), torch.as_tensor(along)])

    h = 1e-5
    expected = (objective(h)[0] - objective(-h)[0]) / (2 * h)
    assert abs(expected) > 1e-3
    torch.testing.assert_close(objective()[1], expected, rtol=1e-6, atol=1e-6)


def test_single_step_scoring_calls_the_velocity_once():
    toy, sampler, prefix, _, trace, _ = run(FlowSamplerConfig(4))
    assert len(set(trace["denoise_step"].tolist())) > 1, "rows must be at different denoise steps"
    toy.calls.clear()
    sampler.score(toy.velocity, prefix, trace)
    assert toy.calls == [B]


def test_denoise_step_is_drawn_per_row_and_uniform():
    sampler = FlowSampler(FlowSamplerConfig(4), K, A)
    steps = sampler.draw(torch.zeros(4000, 1, 1), RowNoise(0, np.arange(4000), np.zeros(4000))).denoise_step
    assert torch.bincount(steps, minlength=4).sub(1000).abs().max() < 120
    torch.manual_seed(0)
    steps = sampler.draw(torch.zeros(4000, 1, 1)).denoise_step
    assert torch.bincount(steps, minlength=4).sub(1000).abs().max() < 120
    last = FlowSampler(FlowSamplerConfig(4, "cps"), K, A).draw(torch.zeros(500, 1, 1)).denoise_step
    assert set(last.tolist()) == {0, 1, 2}, "the last CPS step is deterministic and must not be drawn"


@pytest.mark.parametrize("joint", [False, True])
def test_score_survives_a_schedule_that_moves_on(joint):
    toy, sampler, prefix, _, trace, log_prob = run(FlowSamplerConfig(4, "sde", 0.5, joint))
    sampler.noise_level = 0.1
    score, _ = sampler.score(toy.velocity, prefix, trace)
    torch.testing.assert_close(score, log_prob, rtol=1e-9, atol=1e-9)
    moved = sampler.sample(toy.velocity, prefix, draw(sampler))[1]
    assert (moved["noise_level"] == 0.1).all()


def test_other_steps_follow_the_ode():
    toy, sampler, prefix, x, trace, _ = run(FlowSamplerConfig(4))
    drawn = draw(sampler)
    for row in range(B):
        here, start = prefix[row : row + 1], drawn.initial[row : row + 1]
        k = int(drawn.denoise_step[row])
        for j in range(k):
            t = torch.tensor([sampler.times[j]], dtype=torch.float64)
            start = start - toy.velocity(here, start, t)[0] / 4
        torch.testing.assert_close(start[0], trace["x_t"][row])
    torch.testing.assert_close(sampler.ode(toy.velocity, prefix, drawn.initial).shape, x.shape)


def test_only_executed_real_actions_are_scored():
    toy, sampler, prefix, _, trace, log_prob = run(FlowSamplerConfig(4, "sde", 0.5, joint=True))
    last = trace["chain"].clone()
    last[:, -1, K:] += 1.0
    last[:, -1, :, A:] += 1.0
    score, _ = sampler.score(toy.velocity, prefix, {**trace, "chain": last})
    assert torch.equal(score, sampler.score(toy.velocity, prefix, trace)[0])
    last[:, -1, 0, 0] += 0.1
    assert not torch.equal(sampler.score(toy.velocity, prefix, {**trace, "chain": last})[0], score)
    assert sampler.term_step().tolist() == [0, 0, 1, 1, 2, 2] * 4
    assert log_prob.shape == (B, 4 * K * A)


times = st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1)))


@given(times)
def test_level_zero_is_the_ode(where):
    n, k = where
    t, t_next = torch.tensor(1 - k / n), torch.tensor(1 - (k + 1) / n)
    x, v = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3, 2)
    expected = ode_step(x, v, t, t_next)
    for step in (flow_sde_step, flow_cps_step):
        mean, std = step(x, v, t, t_next, torch.tensor(0.0))
        torch.testing.assert_close(mean, expected[0], rtol=1e-5, atol=1e-6)
        assert (std == 0).all()


@pytest.mark.parametrize("method", ["sde", "cps"])
def test_stochastic_sampling_keeps_the_marginal(method):
    """For a Gaussian flow the exact velocity is known, and the sampled actions must have the data's mean and
    deviation; this fails for a wrong drift."""
    mean, std = 0.7, 0.3

    def velocity(prefix, x, t):
        t = t[:, None, None]
        variance = t**2 + (1 - t) ** 2 * std**2
        slope = (t - (1 - t) * std**2) / variance
        return -mean + slope * (x - (1 - t) * mean), None

    torch.manual_seed(0)
    sampler = FlowSampler(FlowSamplerConfig(100, method, 0.3, joint=True), 1, 1)
    x = sampler.sample(velocity, None, sampler.draw(torch.zeros(20000, 1, 1)))[0]
    assert abs(float(x.mean()) - mean) < 0.02
    assert abs(float(x.std()) - std) < 0.02


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(1e-3, 50))
def test_log_prob_and_entropy_against_torch(x, mean, std):
    x, mean, std = (torch.tensor(number, dtype=torch.float64) for number in (x, mean, std))
    torch.testing.assert_close(gaussian_log_prob(x, mean, std), Normal(mean, std).log_prob(x))
    torch.testing.assert_close(gaussian_entropy(std), Normal(mean, std).entropy())


def test_log_prob_of_a_deterministic_element_is_zero_and_has_no_gradient():
    mean, std = torch.zeros(2, requires_grad=True), torch.tensor([0.0, 1.0], requires_grad=True)
    log_prob = gaussian_log_prob(torch.ones(2), mean, std)
    (log_prob.sum() + gaussian_entropy(std).sum()).backward()
    assert log_prob[0] == 0
    assert mean.grad is not None and std.grad is not None
    assert mean.grad.tolist() == [0.0, 1.0]
    assert std.grad[0] == 0


@given(st.floats(-1e6, 1e6))
def test_bounded_std(raw):
    assert 0.08 - 1e-6 <= float(bounded_std(torch.tensor(raw))) <= 0.16 + 1e-6


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"noise_level": 0.0}, {"method": "cps", "noise_level": 1.5}, {"method": "cps", "steps": 1}]
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(UserError, match="flow sampler"):
        FlowSamplerConfig(**wrong)


def test_a_deterministic_flow_has_no_density():
    toy, sampler = Toy(), FlowSampler(FlowSamplerConfig(4, "ode"), K, A)
    with pytest.raises(TypeError, match="no density"):
        sampler.sample(toy.velocity, torch.zeros(B, 1), draw(sampler))

"""The flow steps and the scores of whole rollouts, number by number against RLinf (see the fixture's README)."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from embodied_rl.policies.flow import (
    FlowNoise,
    FlowSampler,
    FlowSamplerConfig,
    annealed_noise_level,
    flow_cps_step,
    flow_noise_step,
    flow_sde_step,
    gaussian_entropy,
    gaussian_log_prob,
    ode_step,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "flow_sde"
CONFIG = json.loads((FIXTURE / "config.json").read_text())
STEPS = load_file(FIXTURE / "steps.safetensors")
ROLLOUT = load_file(FIXTURE / "rollout.safetensors")


def column(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers)[:, None, None]


def step(case: dict, rows: int):
    """(mean, std) of a fixture case, and what it reads."""
    tensors = {name.split(".", 1)[1]: value for name, value in STEPS.items() if name.startswith(case["case"] + ".")}
    x, v = tensors["x_t"], tensors["v_t"]
    k, steps = case["step"], case["num_steps"]
    t, t_next = column(*[1 - k / steps] * rows), column(*[1 - (k + 1) / steps] * rows)
    level = case["noise_level"]
    if case["noise_anneal"]:
        start, end, updates = case["noise_anneal"]
        level = annealed_noise_level(start, end, updates, case["global_step"])
    level = column(*[level] * rows)
    moments = {
        "flow_ode": lambda: ode_step(x, v, t, t_next),
        "flow_sde": lambda: flow_sde_step(x, v, t, t_next, level),
        "flow_cps": lambda: flow_cps_step(x, v, t, t_next, level),
        "flow_noise": lambda: flow_noise_step(x, v, t, t_next, tensors["noise_std"]),
    }[case["method"]]()
    return moments, tensors


@pytest.mark.parametrize("case", CONFIG["steps"], ids=lambda case: f"{case['case']}-{case['method']}")
def test_step(case):
    (mean, std), expected = step(case, rows=2)
    log_prob = gaussian_log_prob(expected["x_next"], mean, std)
    torch.testing.assert_close(mean, expected["mean"], rtol=1e-5, atol=2e-6)
    # the last CPS step has std sin(.) * t_next with t_next = 0 exactly
    torch.testing.assert_close(std, expected["std"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(log_prob, expected["logprob"], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(gaussian_entropy(std), expected["entropy"], rtol=1e-5, atol=1e-6)
    assert math.isclose(float(log_prob.sum()), case["logprob_sum"], rel_tol=1e-5, abs_tol=1e-4)


def test_all_cases_are_covered():
    assert len(CONFIG["steps"]) == 45
    assert {case["method"] for case in CONFIG["steps"]} == {"flow_ode", "flow_sde", "flow_cps", "flow_noise"}


def rollout(index: int):
    settings = CONFIG["rollouts"][index]
    prefix = settings["prefix"]
    return settings, {name[len(prefix) :]: value for name, value in ROLLOUT.items() if name.startswith(prefix)}


def test_single_step_rollout():
    """The stochastic step's log-prob in a rollout whose other steps are ODE."""
    settings, data = rollout(0)
    steps, index, chain = settings["num_steps"], settings["denoise_index"], data["chains"]
    sampler = FlowSampler(
        FlowSamplerConfig(steps, "sde", settings["noise_level"]), settings["action_chunk"], settings["action_env_dim"]
    )
    # velocities that reproduce the chain: exact for ODE steps; the SDE mean is affine in v, so two values invert it
    t = torch.tensor(sampler.times)
    velocities = []
    for k in range(steps):
        before, after = chain[:, k], chain[:, k + 1]
        if k != index:
            velocities.append((before - after) / (t[k] - t[k + 1]))
            continue
        level = torch.tensor(settings["noise_level"])
        at_zero, std = flow_sde_step(before, torch.zeros_like(before), t[k], t[k + 1], level)
        at_one, _ = flow_sde_step(before, torch.ones_like(before), t[k], t[k + 1], level)
        velocities.append((after - std * data["step_noise"][k] - at_zero) / (at_one - at_zero))

    def velocity(prefix, x, t):
        return torch.stack(velocities)[((1 - t) * steps).round().long(), torch.arange(len(x))], None

    noise = FlowNoise(chain[:, 0], data["denoise_inds"][:, 0], data["step_noise"][index][:, None])
    assert (data["denoise_inds"] == index).all()
    actions, trace, log_prob = sampler.sample(velocity, None, noise)
    torch.testing.assert_close(actions, chain[:, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_prob, data["rollout_logprobs"].flatten(1), rtol=1e-5, atol=2e-5)
    score, entropy = sampler.score(velocity, None, trace)
    torch.testing.assert_close(score, data["train_logprobs"].flatten(1), rtol=1e-5, atol=2e-5)
    # the reference reports 0 here; ours is the entropy of the step's deviation, 0.25 at t = 0.5
    torch.testing.assert_close(entropy, torch.full_like(entropy, 0.5 * math.log(2 * math.pi * math.e * 0.25**2)))


def test_joint_rollout():
    """The mean over the N steps and the initial noise, cut to the executed actions' real dimensions."""
    settings, data = rollout(1)
    steps, chunk, dim, chain = (
        settings["num_steps"],
        settings["action_chunk"],
        settings["action_env_dim"],
        data["chains"],
    )
    sampler = FlowSampler(FlowSamplerConfig(steps, "noise", joint=True, joint_reduction="mean"), chunk, dim)
    # the deviation of every step from its own log-prob: log p = -log s - log(2 pi)/2 - noise^2/2
    noise = data["step_noise"].transpose(0, 1)
    stds = torch.exp(-data["train_logprobs_full"][:, 1:] - 0.5 * math.log(2 * math.pi) - 0.5 * noise**2)
    velocities = (chain[:, :-1] + stds * noise - chain[:, 1:]) * steps

    def velocity(prefix, x, t):
        k = ((1 - t) * steps).round().long()
        rows = torch.arange(len(x))
        return velocities[rows, k], stds[rows, k]

    drawn = FlowNoise(chain[:, 0], torch.zeros(len(chain), dtype=torch.int64), noise)
    actions, trace, log_prob = sampler.sample(velocity, None, drawn, lambda hidden: hidden)
    torch.testing.assert_close(actions, chain[:, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_prob, data["rollout_logprobs"].flatten(1), rtol=1e-4, atol=1e-4)
    trace["chain"] = chain
    score, entropy = sampler.score(velocity, None, trace, lambda hidden: hidden)
    torch.testing.assert_close(score, data["train_logprobs"].flatten(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, data["train_entropy"].mean(1).flatten(1), rtol=1e-4, atol=1e-4)

    summed = FlowSampler(FlowSamplerConfig(steps, "noise", joint=True), chunk, dim)
    score, _ = summed.score(velocity, None, trace, lambda hidden: hidden)
    torch.testing.assert_close(score, data["train_logprobs_full"][:, 1:, :chunk, :dim].flatten(1), rtol=1e-4, atol=1e-4)

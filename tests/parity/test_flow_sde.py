"""The flow steps, number by number against RLinf (see the fixture's README). Its whole rollouts are in test_pi0.py."""

import math

import pytest
import torch
from cases import cases, listed, read
from safetensors.torch import load_file

from embodied_rl.policies.flow import (
    annealed_noise_level,
    flow_cps_step,
    flow_noise_step,
    flow_sde_step,
    gaussian_entropy,
    gaussian_log_prob,
    ode_step,
)

STEPS = listed("flow_sde", "steps")


def moments(case, tensors):
    """(mean, std) of a step."""
    x, v = tensors["x_t"], tensors["v_t"]

    def column(number):
        return torch.full((len(x), 1, 1), number)

    k, steps = case["step"], case["num_steps"]
    t, t_next = column(1 - k / steps), column(1 - (k + 1) / steps)
    assert float(t[0]) == pytest.approx(case["t"]) and float(t_next[0]) == pytest.approx(case["t_next"], abs=1e-6)
    level = case["noise_level"]
    if case["noise_anneal"]:
        start, end, updates = case["noise_anneal"]
        level = annealed_noise_level(start, end, updates, case["global_step"])
    return {
        "flow_ode": lambda: ode_step(x, v, t, t_next),
        "flow_sde": lambda: flow_sde_step(x, v, t, t_next, column(level)),
        "flow_cps": lambda: flow_cps_step(x, v, t, t_next, column(level)),
        "flow_noise": lambda: flow_noise_step(x, v, t, t_next, tensors["noise_std"]),
    }[case["method"]]()


@pytest.mark.parametrize(("folder", "case"), STEPS)
def test_step(folder, case):
    every, prefix = load_file(folder / "steps.safetensors"), case["case"] + "."
    expected = {name.removeprefix(prefix): value for name, value in every.items() if name.startswith(prefix)}
    mean, std = moments(case, expected)
    log_prob = gaussian_log_prob(expected["x_next"], mean, std)
    torch.testing.assert_close(mean, expected["mean"], rtol=1e-5, atol=2e-6)
    # the last CPS step has std sin(.) * t_next with t_next = 0 exactly
    torch.testing.assert_close(std, expected["std"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(log_prob, expected["logprob"], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(gaussian_entropy(std), expected["entropy"], rtol=1e-5, atol=1e-6)
    assert math.isclose(float(log_prob.sum()), case["logprob_sum"], rel_tol=1e-5, abs_tol=1e-4)


@pytest.mark.parametrize("folder", cases("flow_sde"))
def test_every_step_of_the_file_is_listed(folder):
    listed = {case["case"] for case in read(folder / "config.json")["steps"]}
    assert {name.split(".")[0] for name in load_file(folder / "steps.safetensors")} == listed

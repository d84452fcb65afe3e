"""GR00T N1.5's action head, number by number against NVIDIA's release and RLinf's stochastic steps on it (see the
fixture's README)."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from embodied_rl.policies.flow import (
    FlowNoise,
    FlowSampler,
    FlowSamplerConfig,
    flow_cps_step,
    flow_sde_step,
    gaussian_log_prob,
    ode_step,
)
from embodied_rl.policies.gr00t.action_head import ActionHead
from embodied_rl.policies.gr00t.network import flow_velocity, time_bucket
from embodied_rl.policies.gr00t.sizes import ActionHeadConfig, TransformerConfig
from embodied_rl.policies.pretrained import load_strict, read_weights

if "EMBODIED_RL_PARITY" not in os.environ:
    pytest.skip("EMBODIED_RL_PARITY names no folder of fixtures", allow_module_level=True)
FOLDER = Path(os.environ["EMBODIED_RL_PARITY"]) / "gr00t"
CONFIG = json.loads((FOLDER / "config.json").read_text())
FLOW_STEPS = json.loads((FOLDER / "flow_steps.json").read_text())["steps"]
PREFIX = "action_head."


def transformer(sizes):
    return TransformerConfig(sizes["num_layers"], sizes["num_attention_heads"], sizes["attention_head_dim"])


class Case:
    """The head with its weights, what goes in and what must come out."""

    def __init__(self):
        sizes = CONFIG["action_head_cfg"]
        self.head = ActionHead(
            ActionHeadConfig(
                features=sizes["backbone_embedding_dim"],
                dit=transformer(sizes["diffusion_model_cfg"]),
                features_attention=transformer(sizes["vl_self_attention_cfg"]),
                hidden=sizes["hidden_size"],
                action_dim=sizes["action_dim"],
                state_dim=sizes["max_state_dim"],
                embodiments=sizes["max_num_embodiments"],
                future_tokens=sizes["num_target_vision_tokens"],
                positions=sizes["max_seq_len"],
                buckets=sizes["num_timestep_buckets"],
            )
        )
        weights = {key.removeprefix(PREFIX): value for key, value in read_weights(FOLDER).items()}
        load_strict(self.head, weights, FOLDER)
        self.inputs = load_file(FOLDER / "inputs.safetensors")
        self.expected = load_file(FOLDER / "expected.safetensors")
        self.flow_steps = load_file(FOLDER / "flow_steps.safetensors")

    def context(self):
        inputs = self.inputs
        return self.head.context(inputs["backbone_features"], inputs["state"][:, 0], inputs["embodiment_id"])

    def velocity(self, prefix, x, t):
        return flow_velocity(self.head, prefix, x, t)


@pytest.fixture(scope="module")
def case():
    return Case()


def close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_every_intermediate_number(case):
    head, inputs, expected = case.head, case.inputs, case.expected
    embodiment, x, at = inputs["embodiment_id"], inputs["x_ts"][0], inputs["t_buckets"][0].expand(2)
    close(head.process(inputs["backbone_features"]), expected["processed_backbone_features"])
    context = case.context()
    close(context.state, expected["state_features"])
    close(head.action_encoder(x, at, embodiment), expected["action_encoder_0"])
    close(head.model.timestep_encoder(at), expected["timestep_embedding_0"])
    tokens = head.tokens(context, x, at)
    close(tokens, expected["dit_input_0"])
    close(head.model(tokens, context.keys_values, at), expected["dit_output_0"])
    assert len(set(embodiment.tolist())) == 2


@torch.no_grad()
def test_velocities(case):
    context, inputs = case.context(), case.inputs
    for x, at, expected in zip(inputs["x_ts"], inputs["t_buckets"], case.expected["v_ts"], strict=True):
        close(case.head(context, x, at.expand(2))[0], expected)


@torch.no_grad()
def test_one_embodiment_for_all_rows_is_the_same_as_one_per_row(case):
    inputs = case.inputs
    x, at = inputs["x_ts"][1], inputs["t_buckets"][1].expand(2)
    for row, embodiment in enumerate(inputs["embodiment_id"].tolist()):
        context = case.head.context(inputs["backbone_features"], inputs["state"][:, 0], embodiment)
        close(case.head(context, x, at)[0][row], case.expected["v_ts"][1][row])


@pytest.mark.parametrize("steps", [4, 10])
def test_samples(case, steps):
    sampler = FlowSampler(FlowSamplerConfig(steps, "ode"), 16, 32)
    with torch.no_grad():
        actions = sampler.ode(case.velocity, case.context(), case.inputs["noise"])
    close(actions, case.expected[f"sample.{steps}.actions"])


def test_times_fall_into_the_reference_buckets():
    for steps in (1, 2, 3, 4, 5, 6, 8, 10, 16, 20, 50, 100):
        t = torch.tensor(FlowSampler(FlowSamplerConfig(steps, "ode"), 1, 1).times[:-1])
        assert time_bucket(t, 1000).tolist() == [int(k / float(steps) * 1000) for k in range(steps)], steps
    assert time_bucket(torch.tensor([1.0005]), 1000).item() == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients(case, checkpointing):
    head, inputs, expected = case.head, case.inputs, case.expected
    head.model.checkpointing = head.vl_self_attention.checkpointing = checkpointing
    head.zero_grad()
    t = 1 - inputs["time"]
    assert torch.equal(time_bucket(t, 1000), expected["train_t_bucket"])
    at = t[:, None, None]
    v, _ = case.velocity(case.context(), at * inputs["noise"] + (1 - at) * inputs["action"], t)
    error = (v - (inputs["noise"] - inputs["action"])).square() * inputs["action_mask"]
    loss = error.sum() / inputs["action_mask"].sum()
    close(loss, expected["train_loss"])
    loss.backward()
    head.model.checkpointing = head.vl_self_attention.checkpointing = False
    gradients = {PREFIX + name: parameter.grad for name, parameter in head.named_parameters()}
    names = [name for name in expected if name.startswith("grad.")]
    assert len(names) == 7
    for name in names:
        close(gradients[name.removeprefix("grad.")], expected[name])
    assert gradients.keys() == CONFIG["grad_norms"].keys()
    for name, norm in CONFIG["grad_norms"].items():
        found = gradients[name]
        assert float(0 if found is None else found.norm()) == pytest.approx(norm, rel=1e-3, abs=1e-6), name


# -- RLinf's stochastic steps, in the convention of policies/flow.py ---------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("step", FLOW_STEPS, ids=lambda step: f"{step['case']}-{step['method']}")
def test_stochastic_step(case, step):
    data = {name[4:]: value for name, value in case.flow_steps.items() if name.startswith(step["case"] + ".")}
    t, t_next = torch.full((2,), 1 - step["t"]), torch.full((2,), 1 - step["t"] - 1 / step["num_steps"])
    assert time_bucket(t, 1000).tolist() == [step["t_bucket"]] * 2
    v, _ = case.velocity(case.context(), data["x_t"], t)
    at, then = t[:, None, None], t_next[:, None, None]
    level = torch.full((2, 1, 1), step["noise_level"])
    mean, std = {
        "flow_ode": lambda: ode_step(data["x_t"], v, at, then),
        "flow_sde": lambda: flow_sde_step(data["x_t"], v, at, then, level),
        "flow_cps": lambda: flow_cps_step(data["x_t"], v, at, then, level),
    }[step["method"]]()
    close(mean, data["mean"])
    close(std, data["std"].expand_as(std))
    close(gaussian_log_prob(data["x_next"], mean, std), data["logprob"], 1e-4)


def test_the_stochastic_steps_are_all_there():
    assert len(FLOW_STEPS) == 20
    assert {step["method"] for step in FLOW_STEPS} == {"flow_ode", "flow_sde", "flow_cps"}


@pytest.mark.parametrize(("method", "level"), [("sde", 0.5), ("sde", 0.3), ("cps", 0.5)])
def test_the_sampler_draws_and_scores_the_same_transitions(case, method, level):
    """The fixture's steps through `FlowSampler.score`: what a rollout's trace holds, and RLinf's log-prob."""
    sampler = FlowSampler(FlowSamplerConfig(4, method, level), 5, 7)
    steps = [s for s in FLOW_STEPS if s["method"] == f"flow_{method}" and s["noise_level"] == level]
    assert [s["step"] for s in steps] == [0, 1, 2, 3]
    for step in steps:
        data = {name[4:]: value for name, value in case.flow_steps.items() if name.startswith(step["case"] + ".")}
        trace = {
            "x_t": data["x_t"],
            "x_next": data["x_next"][:, :5, :7],
            "t": torch.full((2,), sampler.times[step["step"]]),
            "t_next": torch.full((2,), sampler.times[step["step"] + 1]),
            "noise_level": torch.full((2,), level),
        }
        with torch.no_grad():
            log_prob, _ = sampler.score(case.velocity, case.context(), trace)
        close(log_prob, data["logprob"][:, :5, :7].flatten(1), 1e-4)


@torch.no_grad()
def test_a_rollout_scores_as_it_was_drawn(case):
    sampler = FlowSampler(FlowSamplerConfig(4, "sde", 0.5), 5, 7)
    torch.manual_seed(0)
    drawn = FlowNoise(case.inputs["noise"], torch.tensor([0, 2]), torch.randn(2, 1, 16, 32))
    _, trace, log_prob = sampler.sample(case.velocity, case.context(), drawn)
    close(sampler.score(case.velocity, case.context(), trace)[0], log_prob)

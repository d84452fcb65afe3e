"""GR00T N1.5's action head, number by number against NVIDIA's release and RLinf's stochastic steps on it (see the
fixture's README)."""

import pytest
import torch
from cases import cases, read
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

PREFIX = "action_head."


def transformer(sizes):
    return TransformerConfig(sizes["num_layers"], sizes["num_attention_heads"], sizes["attention_head_dim"])


class Case:
    """The head with its weights, what goes in and what must come out."""

    def __init__(self, folder):
        self.config = read(folder / "config.json")
        self.steps = read(folder / "flow_steps.json")["steps"]
        sizes = self.config["action_head_cfg"]
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
        weights = {key.removeprefix(PREFIX): value for key, value in read_weights(folder).items()}
        load_strict(self.head, weights, folder)
        self.inputs = load_file(folder / "inputs.safetensors")
        self.expected = load_file(folder / "expected.safetensors")
        self.flow_steps = load_file(folder / "flow_steps.safetensors")

    def context(self):
        inputs = self.inputs
        return self.head.context(inputs["backbone_features"], inputs["state"][:, 0], inputs["embodiment_id"])

    def velocity(self, prefix, x, t):
        return flow_velocity(self.head, prefix, x, t)

    @property
    def rows(self):
        return len(self.inputs["noise"])

    @property
    def executed(self):
        """(steps, dimensions) of a chunk that is shorter and narrower than the network's."""
        _, horizon, width = self.inputs["noise"].shape
        return max(1, horizon // 3), min(width, self.config["action_head_cfg"].get("real_action_dim", width // 2 or 1))

    def step(self, name):
        """{"x_t", "mean", ...} of one stochastic step."""
        return {k.split(".", 1)[1]: value for k, value in self.flow_steps.items() if k.startswith(f"{name}.")}


@pytest.fixture(scope="module", params=cases("gr00t"))
def case(request):
    return Case(request.param)


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_every_intermediate_number(case):
    head, inputs, expected = case.head, case.inputs, case.expected
    embodiment, x, at = inputs["embodiment_id"], inputs["x_ts"][0], inputs["t_buckets"][0].expand(case.rows)
    close(head.process(inputs["backbone_features"]), expected["processed_backbone_features"])
    context = case.context()
    close(context.state, expected["state_features"])
    close(head.action_encoder(x, at, embodiment), expected["action_encoder_0"])
    close(head.model.timestep_encoder(at), expected["timestep_embedding_0"])
    tokens = head.tokens(context, x, at)
    close(tokens, expected["dit_input_0"])
    close(head.model(tokens, context.keys_values, at), expected["dit_output_0"])


@torch.no_grad()
def test_velocities(case):
    context, inputs = case.context(), case.inputs
    for x, at, expected in zip(inputs["x_ts"], inputs["t_buckets"], case.expected["v_ts"], strict=True):
        close(case.head(context, x, at.expand(case.rows))[0], expected)


@torch.no_grad()
def test_one_embodiment_for_all_rows_is_the_same_as_one_per_row(case):
    inputs = case.inputs
    x, at = inputs["x_ts"][1], inputs["t_buckets"][1].expand(case.rows)
    for row, embodiment in enumerate(inputs["embodiment_id"].tolist()):
        context = case.head.context(inputs["backbone_features"], inputs["state"][:, 0], embodiment)
        close(case.head(context, x, at)[0][row], case.expected["v_ts"][1][row])


def test_samples(case):
    for steps in case.config["sample_steps"]:
        sampler = FlowSampler(FlowSamplerConfig(steps, "ode"), *case.inputs["noise"].shape[1:])
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
    assert torch.equal(time_bucket(t, head.config.buckets), expected["train_t_bucket"])
    at = t[:, None, None]
    v, _ = case.velocity(case.context(), at * inputs["noise"] + (1 - at) * inputs["action"], t)
    error = (v - (inputs["noise"] - inputs["action"])).square() * inputs["action_mask"]
    loss = error.sum() / inputs["action_mask"].sum()
    close(loss, expected["train_loss"])
    loss.backward()
    head.model.checkpointing = head.vl_self_attention.checkpointing = False
    gradients = {PREFIX + name: parameter.grad for name, parameter in head.named_parameters()}
    for name in [name for name in expected if name.startswith("grad.")]:
        close(gradients[name.removeprefix("grad.")], expected[name])
    norms = case.config["grad_norms"]
    assert gradients.keys() == norms.keys()
    for name, norm in norms.items():
        found = gradients[name]
        assert float(0 if found is None else found.norm()) == pytest.approx(norm, rel=1e-3, abs=1e-5), name


# -- RLinf's stochastic steps, in the convention of policies/flow.py ---------------------------------------------------


def moments(step, x, v, t, t_next):
    """(mean, std) of a step."""
    level = torch.full_like(t, step["noise_level"])
    return {
        "flow_ode": lambda: ode_step(x, v, t, t_next),
        "flow_sde": lambda: flow_sde_step(x, v, t, t_next, level),
        "flow_cps": lambda: flow_cps_step(x, v, t, t_next, level),
    }[step["method"]]()


@torch.no_grad()
def test_stochastic_steps(case):
    assert {step["case"] for step in case.steps} == {name.split(".")[0] for name in case.flow_steps}
    for step in case.steps:
        data, steps = case.step(step["case"]), step["num_steps"]
        t, t_next = (torch.full((case.rows,), 1 - at) for at in (step["t"], step["t"] + 1 / steps))
        assert time_bucket(t, case.head.config.buckets).tolist() == [step["t_bucket"]] * case.rows
        v, _ = case.velocity(case.context(), data["x_t"], t)
        mean, std = moments(step, data["x_t"], v, t[:, None, None], t_next[:, None, None])
        close(mean, data["mean"])
        close(std, data["std"].expand_as(std))
        close(gaussian_log_prob(data["x_next"], mean, std), data["logprob"])


@torch.no_grad()
def test_the_sampler_scores_the_same_transitions(case):
    """The fixture's steps through `FlowSampler.score`: what a rollout's trace holds, and RLinf's log-prob."""
    chunk, dim = case.executed
    for step in case.steps:
        if step["method"] == "flow_ode":
            continue  # it has no density
        level, method = step["noise_level"], step["method"].removeprefix("flow_")
        sampler = FlowSampler(FlowSamplerConfig(step["num_steps"], method, level), chunk, dim)
        data = case.step(step["case"])
        trace = {
            "x_t": data["x_t"],
            "x_next": data["x_next"][:, :chunk, :dim],
            "t": torch.full((case.rows,), sampler.times[step["step"]]),
            "t_next": torch.full((case.rows,), sampler.times[step["step"] + 1]),
            "noise_level": torch.full((case.rows,), level),
        }
        log_prob, _ = sampler.score(case.velocity, case.context(), trace)
        close(log_prob, data["logprob"][:, :chunk, :dim].flatten(1))


@torch.no_grad()
def test_a_rollout_scores_as_it_was_drawn(case):
    sampler = FlowSampler(FlowSamplerConfig(4, "sde", 0.5), *case.executed)
    torch.manual_seed(0)
    noise = case.inputs["noise"]
    drawn = FlowNoise(noise, torch.arange(case.rows) % 4, torch.randn(case.rows, 1, *noise.shape[1:]))
    _, trace, log_prob = sampler.sample(case.velocity, case.context(), drawn)
    close(sampler.score(case.velocity, case.context(), trace)[0], log_prob)

"""π₀ and π₀.₅, number by number against openpi's PyTorch implementation (see the fixtures' READMEs)."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from embodied_rl.policies.flow import FlowNoise, FlowSampler, FlowSamplerConfig, bounded_std
from embodied_rl.policies.mlp import mlp
from embodied_rl.policies.normalization import Normaliser
from embodied_rl.policies.pi0.checkpoint import TOKEN_TABLE, from_published, published_name
from embodied_rl.policies.pi0.gemma import GemmaConfig
from embodied_rl.policies.pi0.network import Network, NetworkConfig, time_embedding
from embodied_rl.policies.pi0.preprocessing import pi0_prompt, pi05_prompt, pi05_text, resize_with_pad, state_bins
from embodied_rl.policies.pi0.siglip import SiglipConfig
from embodied_rl.policies.pretrained import load_strict, read_weights

if "EMBODIED_RL_PARITY" not in os.environ:
    pytest.skip("EMBODIED_RL_PARITY names no folder of fixtures", allow_module_level=True)
FIXTURES = Path(os.environ["EMBODIED_RL_PARITY"])
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


def gemma(sizes):
    return GemmaConfig(
        sizes["hidden_size"],
        sizes["num_hidden_layers"],
        sizes["intermediate_size"],
        sizes["num_attention_heads"],
        sizes["num_key_value_heads"],
        sizes["head_dim"],
    )


class Case:
    """One fixture folder: the network with its weights, what goes in and what must come out."""

    def __init__(self, name):
        folder = FIXTURES / name
        self.config = json.loads((folder / "config.json").read_text())
        vision = self.config["vision"]
        sizes = NetworkConfig(
            SiglipConfig(
                vision["hidden_size"],
                vision["num_hidden_layers"],
                vision["num_attention_heads"],
                vision["intermediate_size"],
                vision["patch_size"],
                vision["image_size"],
            ),
            gemma(self.config["text"]),
            gemma(self.config["expert"]),
            self.config["vocab_size"],
            self.config["action_dim"],
            self.config["pi05"],
        )
        self.network = Network(sizes, self.config["action_horizon"])
        load_strict(self.network, from_published(read_weights(folder), self.network.state_dict()), folder)
        self.inputs = load_file(folder / "inputs.safetensors")
        self.expected = load_file(folder / "expected.safetensors")

    def encode(self, cameras=CAMERAS):
        images = {name: self.inputs[f"images.{name}"] for name in cameras}
        masks = {name: self.inputs["image_masks"][:, i] for i, name in enumerate(CAMERAS) if name in cameras}
        prompt, mask = self.inputs["tokenized_prompt"], self.inputs["tokenized_prompt_mask"]
        return self.network.encode(images, masks, prompt, mask, self.inputs["state"])


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def case(request):
    return Case(request.param)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_prefix(case):
    with torch.no_grad():
        prefix = case.encode()
        output = case.network.output(prefix)
    expected, valid = case.expected, case.expected["prefix_pad_mask"]
    assert torch.equal(prefix.mask, valid)
    for layer, past in enumerate(prefix.past):
        for name, mine in (("key", past.keys), ("value", past.values)):
            theirs = expected[f"prefix_kv.{layer}.{name}"]
            close(mine[:, :, : past.length].transpose(1, 2)[valid], theirs.transpose(1, 2)[valid], 1e-5)
    close(output[valid], expected["prefix_output"][valid], 1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_velocity(case, grad):
    with torch.set_grad_enabled(grad):
        prefix = case.encode()
        before = [past.keys[:, :, : past.length].clone() for past in prefix.past]
        for t, x, expected in zip(case.inputs["ts"], case.inputs["x_ts"], case.expected["v_ts"], strict=True):
            v, _ = case.network.velocity(prefix, x, t.expand(len(x)))
            close(v, expected, 3e-5)
    assert all(torch.equal(a, b.keys[:, :, : b.length]) for a, b in zip(before, prefix.past, strict=True))


def test_time_embedding(case):
    width = case.config["expert"]["hidden_size"]
    expected = case.expected["time_emb_0"]
    close(time_embedding(case.inputs["ts"][:1].expand(len(expected)), width), expected, 1e-6)


@pytest.mark.parametrize("steps", [10, 4])
def test_sample_at_the_reference_clock(case, steps):
    chain, times = case.expected[f"sample.{steps}.chain"], case.expected[f"sample.{steps}.times"]
    with torch.no_grad():
        prefix, x = case.encode(), case.inputs["noise"]
        for k, t in enumerate(times):
            close(x, chain[:, k], 2e-5)
            x = x - case.network.velocity(prefix, x, t.expand(len(x)))[0] / steps
    close(x, case.expected[f"sample.{steps}.actions"], 2e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients(case, checkpointing):
    network, inputs = case.network, case.inputs
    network.set_checkpointing(checkpointing)
    network.zero_grad()
    t = inputs["time"][:, None, None]
    x = t * inputs["noise"] + (1 - t) * inputs["actions"]
    v, _ = network.velocity(case.encode(), x, inputs["time"])
    loss = (v - (inputs["noise"] - inputs["actions"])).square()
    close(loss, case.expected["train_loss_elementwise"], 1e-3)
    close(loss.mean(), case.expected["train_loss_mean"], 1e-4)
    loss.mean().backward()
    network.set_checkpointing(False)
    gradients = {published_name(name): p.grad for name, p in network.named_parameters() if p.grad is not None}
    gradients[TOKEN_TABLE] = gradients.pop(published_name("language.embed_tokens.weight"))
    for name, value in case.expected.items():
        if name.startswith("grad."):
            close(gradients[name.removeprefix("grad.")], value, 1e-4)
    norms = {name: norm for name, norm in case.config["grad_norms"].items() if norm}
    assert norms.keys() == gradients.keys()
    for name, norm in norms.items():
        assert float(gradients[name].norm()) == pytest.approx(norm, rel=1e-3, abs=1e-5), name


def test_a_camera_that_no_row_has_may_be_left_out(case):
    masks = case.inputs["image_masks"]
    case.inputs["image_masks"] = masks & torch.tensor([True, True, False])
    x, t = case.inputs["x_ts"][0], case.inputs["ts"][0].expand(2)
    with torch.no_grad():
        whole, less = case.encode(), case.encode(CAMERAS[:2])
        close(case.network.velocity(less, x, t)[0], case.network.velocity(whole, x, t)[0], 1e-5)
    assert whole.mask.shape[1] - less.mask.shape[1] == case.network.config.vision.tokens
    case.inputs["image_masks"] = masks


# -- stochastic rollouts of RLinf on these networks -------------------------------------------------------------------


def rollout(index):
    settings = json.loads((FIXTURES / "flow_sde" / "config.json").read_text())["rollouts"][index]
    whole, prefix = load_file(FIXTURES / "flow_sde" / "rollout.safetensors"), settings["prefix"]
    case = Case(settings["fixture"])
    head = mlp(case.config["expert"]["hidden_size"], settings["noise_head_hidden"], "tanh", case.config["action_dim"])
    data = {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}
    linears = [layer for layer in head if isinstance(layer, torch.nn.Linear)]
    for i, linear in enumerate(linears):
        name = f"noise_head.mlp_logvar.moduleList.{i}.linear_1"
        linear.load_state_dict({key: data[f"{name}.{key}"] for key in ("weight", "bias")})
    return settings, data, case, head


@pytest.mark.parametrize("index", [0, 1], ids=["flow_sde", "flow_noise"])
def test_rollout(index):
    settings, data, case, head = rollout(index)
    steps, joint = settings["num_steps"], settings["joint_logprob"]
    method = "noise" if settings["method"] == "flow_noise" else "sde"
    sampler = FlowSampler(
        FlowSamplerConfig(steps, method, settings["noise_level"], joint, "mean" if joint else "sum"),
        settings["action_chunk"],
        settings["action_env_dim"],
    )

    def std(hidden):
        return bounded_std(head(hidden), *settings["noise_std_range"])

    step_noise = data["step_noise"].transpose(0, 1)
    chosen = data["denoise_inds"][:, 0]
    transition = step_noise if joint else step_noise[:, settings["denoise_index"]][:, None]
    with torch.no_grad():
        drawn = FlowNoise(case.inputs["noise"], chosen, transition)
        actions, trace, log_prob = sampler.sample(case.network.velocity, case.encode(), drawn, std)
    close(actions, data["chains"][:, -1], 1e-4)
    close(log_prob, data["rollout_logprobs"].flatten(1), 1e-4)
    if joint:
        trace["chain"] = data["chains"]
    else:
        k = settings["denoise_index"]
        trace["x_t"], trace["x_next"] = data["chains"][:, k], data["chains"][:, k + 1, : sampler.chunk, : sampler.dim]
    score, entropy = sampler.score(case.network.velocity, case.encode(), trace, std)
    close(score, data["train_logprobs"].flatten(1), 1e-4)
    if joint:  # the reference reports 0 otherwise
        close(entropy, data["train_entropy"].mean(1).flatten(1), 1e-4)
    score.mean().backward()
    gradients = {published_name(name): p.grad for name, p in case.network.named_parameters()}
    expected = {name.removeprefix("grad."): value for name, value in data.items() if name.startswith("grad.")}
    assert len(expected) == 3
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-4)


# -- openpi's data transforms -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preprocess():
    folder = FIXTURES / "pi_preprocess"
    return json.loads((folder / "preprocess.json").read_text()), load_file(folder / "preprocess.safetensors")


def test_images(preprocess):
    config, data = preprocess
    for i in range(len(config["images"])):
        resized = resize_with_pad(data[f"image{i}.raw"].numpy(), config["image_size"])
        assert (resized == data[f"image{i}.pil_uint8"].numpy()).all()


@pytest.mark.parametrize("kind", ["meanstd", "quantile"])
def test_normalisation(preprocess, kind):
    _, data = preprocess
    for what in ("state", "actions"):
        raw, expected = data[f"raw.{what}"], data[f"norm.{kind}.{what}"]
        normaliser = Normaliser({"meanstd": "openpi_mean_std", "quantile": "openpi_quantile"}[kind], raw.shape[-1])
        statistics = {name: data[f"stats.{what}.{name}"].tolist() for name in ("mean", "std", "q01", "q99")}
        normaliser.fit(statistics, "the fixture")
        close(normaliser.normalise(raw), expected, 1e-12)
        if what == "actions":
            padded = torch.nn.functional.pad(expected, (0, 32 - raw.shape[-1]))
            assert torch.equal(padded, data[f"norm.{kind}.actions_padded"])
            close(normaliser.unnormalise(expected), data[f"unnorm.{kind}.actions"][..., : raw.shape[-1]], 1e-12)


class Recorder:
    """A tokenizer that keeps what it was asked for."""

    bos_token_id = 2

    def __init__(self):
        self.texts = []

    def encode(self, text):
        self.texts.append(text)
        return [2, 100 + len(text)]


def test_prompts(preprocess):
    config, data = preprocess
    states = data["norm.quantile.state"].numpy()
    assert (state_bins(states) == data["pi05.state_bins"].numpy()).all()
    recorder = Recorder()
    for prompt, state, text in zip(config["prompts"], states, config["pi05_texts"], strict=True):
        assert pi05_text(prompt, state) == text
        assert pi05_prompt(recorder, prompt, state) == [2, 100 + len(text)]
    assert recorder.texts == config["pi05_texts"]
    recorder = Recorder()
    for prompt in config["prompts"]:
        ids = pi0_prompt(recorder, prompt)
        assert ids == [2, 100 + len(recorder.texts[-2]), 101]
    assert recorder.texts == [text for text, _ in config["pi0_encode_calls"]]

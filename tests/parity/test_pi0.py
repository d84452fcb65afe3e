"""π₀ and π₀.₅, number by number against openpi's PyTorch implementation (see the fixtures' READMEs)."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from embodied_rl.policies.pi0.checkpoint import TOKEN_TABLE, from_published, published_name
from embodied_rl.policies.pi0.gemma import GemmaConfig
from embodied_rl.policies.pi0.network import Network, NetworkConfig, time_embedding
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
        load_strict(self.network, from_published(read_weights(folder), self.network, folder), folder)
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
            close(v, expected, 1e-4)
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

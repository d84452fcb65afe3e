"""What a user can get wrong, family by family, through the user's path: one line that names the file or the key."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gr00t_toys import SETTINGS as GR00T
from lerobot_toys import write_act
from safetensors.torch import load_file, save_file

from embodied_rl.errors import UserError
from embodied_rl.policies.check import synthesise
from embodied_rl.policies.pi0.config import tiny as tiny_pi0
from embodied_rl.policies.pretrained import write_weights
from embodied_rl.registry import policies
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"
SEEN = ObservationSpec(state=7, cameras={"agentview": CameraSpec(32, 48), "wrist": CameraSpec(32, 32)})
ACTION = ActionSpec((-1.0,) * 7, (1.0,) * 7, (0.0,) * 7)
OPENVLA = {"dtype": "float32", "prompt_length": 80, "empty_token": 371, "cameras": ("agentview",)}
FLOW = {"horizon": 4, "chunk": 2, "denoise_steps": 2, "value_hidden": (8,)}


@dataclass
class Family:
    """How one is configured, and where its statistics are."""

    name: str
    settings: dict[str, Any]
    statistics: str = ""
    """The JSON file, relative to the folder."""
    missing: str = ""
    """A statistic without which it cannot act."""
    tokenize: Any = None
    """In place of a tokenizer that the fixture has not."""
    fixture: str = ""

    def configure(self, **settings):
        return policies.load(self.name)(**{**self.settings, **settings})

    def load(self, folder):
        extra = [self.tokenize] if self.tokenize else []
        return self.configure(checkpoint=str(folder)).build(SEEN, ACTION, *extra)

    def write(self, folder):
        if self.fixture:
            shutil.copytree(FIXTURES / self.fixture, folder)
            weights = load_file(folder / "model.safetensors")
            write_weights(folder, weights, shard_bytes=4e5)
        elif self.name == "lerobot":
            write_act(folder, cameras={"agentview": (32, 48)}, state=7, action=7)
        else:
            self.configure().build(SEEN, ACTION).save_pretrained(folder)


def llama_bytes(text):
    return [1, *(3 + byte for byte in text.encode())]


PI0 = {**FLOW, "tokenizer": "bytes", "prompt_length": 80}
FAMILIES = [
    Family(
        "openvla",
        OPENVLA,
        "dataset_statistics.json",
        "q99",
        llama_bytes,
        fixture="openvla/ar_fp32_vocab704",
    ),
    Family(
        "openvla_oft",
        {**OPENVLA, "horizon": 5, "cameras": ("agentview", "wrist")},
        "dataset_statistics.json",
        "q01",
        llama_bytes,
        fixture="openvla_oft/discrete_fp32_vocab704_5x7_2img_proprio",
    ),
    Family("pi0", {**PI0, "network": tiny_pi0(False)}, "assets/embodied_rl/norm_stats.json", "std"),
    Family(
        "pi05", {**PI0, "network": tiny_pi0(True), "prompt_length": 110}, "assets/embodied_rl/norm_stats.json", "q99"
    ),
    Family("gr00t", {**GR00T, **FLOW}, "experiment_cfg/metadata.json", "max"),
    Family("tiny_vla", FLOW, "assets/embodied_rl/norm_stats.json", "mean"),
    Family("lerobot", {}),
]
every = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{family: folder}, not to be changed."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for family in FAMILIES:
        family.write(root / family.name)
    return {family.name: root / family.name for family in FAMILIES}


def refused(act, *words):
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert len(message) < 800 and "\n" not in message
    for word in words:
        assert str(word) in message, message


@every
def test_a_folder_that_is_whole_loads(family, written):
    policy = family.load(written[family.name])
    assert torch.isfinite(policy.act(policy.prepare(synthesise(policy.observation_spec))).actions).all()


@every
def test_a_folder_of_another_family_is_refused(family, written):
    for other, folder in written.items():
        # OpenVLA-OFT begins its training with an OpenVLA checkpoint
        if other != family.name and (family.name, other) != ("openvla_oft", "openvla"):
            refused(lambda folder=folder: family.load(folder), folder)


@every
def test_a_folder_that_is_not_there_is_refused(family, tmp_path):
    refused(lambda: family.load(tmp_path / "nowhere"), tmp_path / "nowhere")


@every
@pytest.mark.parametrize("cut", [10, 2000])
def test_a_truncated_shard_is_named(family, written, tmp_path, cut):
    folder = shutil.copytree(written[family.name], tmp_path / "copy")
    shard = sorted(folder.glob("model*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-cut])
    refused(lambda: family.load(folder), shard)


@every
def test_a_missing_and_an_unexpected_key_are_named(family, written, tmp_path):
    folder = shutil.copytree(written[family.name], tmp_path / "copy")
    shard = sorted(folder.glob("model*.safetensors"))[-1]
    weights = load_file(shard)
    key = next(key for key in sorted(weights) if "norm" in key and key.endswith("weight"))
    value = weights.pop(key)
    weights["surplus.weight"] = value
    save_file(weights, shard)
    if (index := folder / "model.safetensors.index.json").is_file():
        content = json.loads(index.read_text())
        content["weight_map"]["surplus.weight"] = content["weight_map"].pop(key)
        index.write_text(json.dumps(content))
    refused(lambda: family.load(folder), folder, "surplus.weight")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.statistics], ids=lambda family: family.name)
def test_a_missing_statistic_is_named(family, written, tmp_path):
    folder = shutil.copytree(written[family.name], tmp_path / "copy")
    file = folder / family.statistics

    def without(found):
        if isinstance(found, dict):
            return {key: without(value) for key, value in found.items() if key != family.missing}
        return found

    file.write_text(json.dumps(without(json.loads(file.read_text()))))
    refused(lambda: family.load(folder), file, f"'{family.missing}'")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name != "lerobot"], ids=lambda family: family.name)
def test_an_instruction_longer_than_the_context_is_named(family, written):
    policy = family.load(written[family.name])
    seen = synthesise(policy.observation_spec)
    refused(lambda: policy.prepare(replace(seen, instructions=("open it", "fold\nthe towel " * 400))), "fold the towel")


@every
def test_images_of_another_type_are_named(family, written):
    policy = family.load(written[family.name])
    seen = synthesise(policy.observation_spec)
    camera, pixels = next(iter(seen.images.items()))
    for wrong in (pixels.astype(np.float32) / 255, pixels.transpose(0, 3, 1, 2), pixels[..., :1], pixels[0]):
        other = replace(seen, images={**seen.images, camera: wrong})
        refused(lambda other=other: policy.prepare(other), f"image.{camera}", wrong.dtype)
    absent = replace(seen, images={name: image for name, image in seen.images.items() if name != camera})
    refused(lambda: policy.prepare(absent), f"image.{camera}")

"""Fixture folders of OpenVLA and OpenVLA-OFT as policies that see the fixtures' pixels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from cases import read
from safetensors.torch import load_file
from torch import Tensor

from embodied_rl.policies.openvla.config import OpenVLAConfig, OpenVLAOFTConfig
from embodied_rl.policies.openvla.heads import token_value_head
from embodied_rl.policies.openvla.preprocessing import ImageProcessor
from embodied_rl.policies.openvla.prompts import llama_bytes
from embodied_rl.policies.pretrained import read_weights
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec


class AlreadyNormalised(ImageProcessor):
    def normalise(self, images: Tensor) -> Tensor:
        return images


class Case:
    """One fixture folder. `settings` are those of the policy's configuration."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.meta = read(folder / "meta.json")
        self.inputs = load_file(self.folder / "inputs.safetensors")
        self.expected = load_file(self.folder / "expected.safetensors")
        self.images = self.meta.get("num_images", 1)
        self.cameras = tuple(f"camera{i}" for i in range(self.images))
        settings = {
            "checkpoint": str(self.folder),
            "unnorm_key": self.meta["unnorm_key"],
            "cameras": self.cameras,
            "empty_token": self.meta["empty_token_id"],
            "prompt_length": self.length,
            "dtype": "float32",
            **settings,
        }
        if self.meta["kind"] == "openvla_ar":
            config = OpenVLAConfig(**settings)
        else:
            config = OpenVLAOFTConfig(
                horizon=self.meta["num_action_chunks"], normalization=self.meta["norm_type"], **settings
            )
        dim = self.meta["action_dim"]
        low, high = (-math.inf,) * dim, (math.inf,) * dim
        views = {camera: CameraSpec(64, 64) for camera in self.cameras}
        observation = ObservationSpec(state=self.meta.get("proprio_dim", 0), cameras=views)
        self.policy: Any = config.build(observation, ActionSpec(low, high, (0.0,) * dim), llama_bytes)
        real = self.policy.processor
        self.policy.processor = AlreadyNormalised(real.size, real.letterbox, real.means, real.stds)
        self.policy.eval()
        self._value_head()

    def _value_head(self) -> None:
        file = self.folder / "value_head.safetensors"
        if file.is_file():
            weights = {key.replace("mlp.", "network."): value for key, value in load_file(file).items()}
            widths = tuple(len(weights[key]) for key in sorted(weights) if key.endswith("bias"))
            self.policy.value_head = token_value_head(self.policy.network.hidden_size, widths)
            self.policy.value_head.load_state_dict(weights)

    @property
    def rows(self) -> int:
        return len(self.inputs["input_ids"])

    @property
    def pixels(self) -> Tensor:
        """[B,images,6,S,S]."""
        return self.inputs["pixel_values"].unflatten(1, (self.images, 6))

    @property
    def length(self) -> int:
        """A prompt length with room to spare, without BOS."""
        return self.inputs["input_ids"].shape[1] + 11

    def policy_inputs(self, spare: int = 0) -> dict[str, Tensor]:
        """What `prepare` would return, had the images been these pixels; prompts padded to `length` less `spare`."""
        length = self.length - spare
        prompt = torch.full((self.rows, length), self.meta["pad_token_id"])
        for row, (ids, mask) in enumerate(zip(self.inputs["input_ids"], self.inputs["attention_mask"], strict=True)):
            kept = ids[mask.bool()][1:]
            prompt[row, length - len(kept) :] = kept
        inputs = {"images": self.pixels, "prompt": prompt}
        return inputs | ({"state": self.inputs["proprio_raw"]} if "proprio_raw" in self.inputs else {})

    def trace(self, temperature: float = 1.0) -> dict[str, Tensor]:
        """The fixture's sampled tokens, as `act` would record them."""
        tokens = self.inputs["sampled_action_tokens"].flatten(1)
        return {"tokens": tokens, "temperature": torch.full((self.rows,), temperature)}

    def action_ids(self, logits: Tensor) -> Tensor:
        """Of all logits, those that the fixtures keep: ids V - 256 and above."""
        return logits[..., self.meta["vocab_size"] - 256 :]


def close(actual: Tensor, expected: Tensor, atol: float = 1e-4, rtol: float = 0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False)


def same_weights(source: Path, saved: Path, stem: str = "model", but: str = "nothing") -> None:
    """Names, types and values; values of keys that begin with `but` may differ."""
    before, after = read_weights(source, stem), read_weights(saved, stem)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert (after[key].dtype, after[key].shape) == (value.dtype, value.shape), key
        assert key.startswith(but) or torch.equal(after[key], value), key
    for file in ("config.json", "preprocessor_config.json", "dataset_statistics.json"):
        assert (saved / file).read_bytes() == (source / file).read_bytes()

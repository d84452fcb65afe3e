"""The five families at tiny size, each in a checkpoint folder of its published layout with the statistics of a made-up
dataset in the simulator at hand."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matrix_simulators import Recorder
from torch import nn

from embodied_rl.policies.gr00t import sizes as gr00t_sizes
from embodied_rl.policies.gr00t.config import Gr00tConfig
from embodied_rl.policies.openvla.architecture import Architecture
from embodied_rl.policies.openvla.checkpoint import exported_weights
from embodied_rl.policies.openvla.config import OpenVLAConfig, OpenVLAOFTConfig
from embodied_rl.policies.openvla.network import OpenVLANetwork
from embodied_rl.policies.openvla.prompts import llama_bytes
from embodied_rl.policies.pi0.config import Pi0Config, Pi05Config
from embodied_rl.policies.pi0.config import tiny as tiny_pi0
from embodied_rl.policies.pretrained import write_weights

HORIZON, CHUNK = 3, 2
OPENVLA_SIZE, FLOW_SIZE = 28, 32
"""Sides of the images that the networks see."""
VOCABULARY, EMPTY, PAD = 640, 300, 640
"""OpenVLA's token ids: how many there are, the one that ends a prompt, the one that fills it up."""
PROMPT = {"openvla": 150, "openvla_oft": 150, "pi0": 96, "pi05": 170, "gr00t": 270}

VISION = {"depth": 2, "embed_dim": 16, "num_heads": 2}
TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY + 64,
    "pad_token_id": PAD,
}
PIXELS = {
    "mean": [[0.484375, 0.455078125, 0.40625], [0.5] * 3],
    "std": [[0.228515625, 0.2236328125, 0.224609375], [0.5] * 3],
}
FAMILIES = ("openvla", "openvla_oft", "pi0", "pi05", "gr00t")


@dataclass(frozen=True)
class Dataset:
    """Statistics of states and actions by name, the gripper last in an action."""

    state: dict[str, np.ndarray]
    action: dict[str, np.ndarray]


def dataset(simulator: Recorder, family: str) -> Dataset:
    """Near what the simulator shows, all numbers different."""
    rng = np.random.default_rng(0)
    seen = policy_state(simulator, simulator.seen[0].state)[0].astype(np.float64)

    def around(centre: np.ndarray, reach: np.ndarray) -> dict[str, np.ndarray]:
        low, high = centre - reach * rng.uniform(0.5, 1, len(reach)), centre + reach * rng.uniform(0.5, 1, len(reach))
        spread = {"mean": centre + 0.1 * reach, "std": 0.4 * reach, "min": low - 0.2 * reach, "max": high + 0.3 * reach}
        return spread | {"q01": low, "q99": high}

    state = around(seen + 0.02 * rng.standard_normal(len(seen)), rng.uniform(0.05, 0.3, len(seen)))
    action = around(rng.uniform(-0.2, 0.2, 7), rng.uniform(0.5, 0.9, 7))
    if unit_gripper(simulator, family):
        for name, value in {"mean": 0.6, "std": 0.5, "min": 0.0, "max": 1.0, "q01": 0.0, "q99": 1.0}.items():
            action[name][6] = value
    return Dataset(state, action)


def unit_gripper(simulator: Recorder, family: str) -> bool:
    """Whether the gripper of the data runs from 0, closed, to 1, open: OpenVLA's do, and GR00T's of LIBERO. The others
    are the simulator's."""
    return family.startswith("openvla") or (family, simulator.place.name) == ("gr00t", "libero")


def policy_state(simulator: Recorder, state: np.ndarray) -> np.ndarray:
    """The numbers [N,S] of the simulator's state that published checkpoints are given; in Isaac Lab those that LIBERO
    has: the hand's position, its rotation vector and its fingers."""
    if simulator.place.name != "isaaclab":
        return state
    names = simulator.observation_spec.state_names
    hand, fingers = names.index("policy.eef_pos.0"), names.index("policy.gripper_pos.0")
    found = []
    for row in state.astype(np.float64):
        *axis, cosine = row[hand + 3 : hand + 7]  # Isaac Lab 3 has xyzw
        vector = 2 * np.arccos(cosine) * np.array(axis) / np.sqrt(1 - cosine**2)  # as robosuite divides
        found.append([*row[hand : hand + 3], *vector, *row[fingers : fingers + 2]])
    return np.array(found, np.float32)


def sees_state(simulator: Recorder, family: str) -> bool:
    """OpenVLA's network never sees the robot's state, openpi's π₀.₅ for LIBERO was trained without."""
    return family != "openvla" and (family, simulator.place.name) != ("pi05", "libero")


def configure(family: str, simulator: Recorder, **settings: Any) -> Any:
    """As published, but tiny; a folder is to be added."""
    place = simulator.place
    tiny = {"prompt_length": PROMPT[family]}
    if family.startswith("openvla"):
        tiny |= {"dtype": "float32", "empty_token": EMPTY}
        if place.name == "libero":
            tiny |= {"resize": "jpeg_lanczos", "center_crop": True}
        if family == "openvla":
            return OpenVLAConfig(**tiny | settings)
        views = ("primary", "wrist")[: len(place.cameras)]
        tiny |= {"horizon": HORIZON, "chunk": CHUNK, "cameras": views, "state": place.state}
        return OpenVLAOFTConfig(**tiny | settings)
    flow = {"tokenizer": "bytes", "horizon": HORIZON, "chunk": CHUNK, "denoise_steps": 2, "value_hidden": (16,)}
    tiny |= flow | {"state": place.state}
    if family == "gr00t":
        tiny |= {"network": gr00t_sizes.tiny(), "cameras": place.cameras, "state_keys": ("arm", "hand")}
        tiny |= {"unit_gripper": unit_gripper(simulator, family)}
        return Gr00tConfig(**tiny | {"action_keys": ("arm", "hand")} | settings)
    tiny |= {"network": tiny_pi0(family == "pi05")}
    if family == "pi05":
        return Pi05Config(**tiny | {"state_in_prompt": sees_state(simulator, family)} | settings)
    return Pi0Config(**tiny | settings)


def build(family: str, simulator: Recorder, folder: Path, **settings: Any) -> Any:
    """The policy of the checkpoint in `folder`, as a run builds it."""
    config = replace(configure(family, simulator, **settings), checkpoint=str(folder))
    given = (llama_bytes,) if family.startswith("openvla") else ()
    torch.manual_seed(0)
    return config.build(simulator.observation_spec, simulator.action_spec, *given)


def publish(family: str, simulator: Recorder, folder: Path) -> Dataset:
    """Write a checkpoint of random weights into `folder`."""
    found = dataset(simulator, family)
    torch.manual_seed(0)
    if family.startswith("openvla"):
        _publish_openvla(family, found, folder)
        return found
    policy = configure(family, simulator).build(simulator.observation_spec, simulator.action_spec)
    _stir(policy)
    policy.save_pretrained(folder)
    if family == "gr00t":
        statistics = {"state": _split(found.state), "action": _split(found.action)}
        metadata = {"new_embodiment": {"statistics": statistics, "embodiment_tag": "new_embodiment"}}
        (folder / "experiment_cfg" / "metadata.json").write_text(json.dumps(metadata))
    else:
        (written,) = folder.rglob("norm_stats.json")
        keep = ("mean", "std", "q01", "q99")
        parts = {"state": found.state, "actions": found.action}
        statistics = {part: {key: values[key].tolist() for key in keep} for part, values in parts.items()}
        written.write_text(json.dumps({"norm_stats": statistics}))
    return found


def _publish_openvla(family: str, found: Dataset, folder: Path) -> None:
    proprio = len(found.state["mean"]) if family == "openvla_oft" else 0
    network = OpenVLANetwork(
        Architecture(vision_options=(VISION, VISION), image_size=OPENVLA_SIZE, text=TEXT, proprio_dim=proprio)
    )
    _stir(network)
    write_weights(folder, exported_weights(network, torch.float32))
    config = {
        "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_sizes": [OPENVLA_SIZE] * 2,
        "timm_model_ids": list(Architecture().vision),
        "timm_model_kwargs": [VISION, VISION],
        "text_config": TEXT,
        "pad_to_multiple_of": 64,
        "use_fused_vision_backbone": True,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    processor = {
        "tvf_resize_params": [{"size": [OPENVLA_SIZE] * 2, "interpolation": 3}] * 2,
        "tvf_crop_params": [{"output_size": [OPENVLA_SIZE] * 2}] * 2,
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_normalize_params": [
            dict(zip(("mean", "std"), each, strict=True)) for each in zip(*PIXELS.values(), strict=True)
        ],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    statistics = {"action": {key: values.tolist() for key, values in found.action.items()}}
    statistics["action"]["mask"] = [True] * 6 + [False]
    if proprio:
        statistics["proprio"] = {key: values.tolist() for key, values in found.state.items()}
    (folder / "dataset_statistics.json").write_text(json.dumps({"demonstrations_no_noops": statistics}))


def _split(statistics: dict[str, np.ndarray]) -> dict[str, dict[str, list[float]]]:
    """As two parts, the hand's first in the file."""
    where = {"hand": slice(6, None), "arm": slice(0, 6)}
    return {part: {key: values[at].tolist() for key, values in statistics.items()} for part, at in where.items()}


@torch.no_grad()
def _stir(module: nn.Module) -> None:
    """Every parameter away from its first value: gates of zero would let no gradient through."""
    for parameter in module.parameters():
        parameter += 0.05 * torch.randn_like(parameter)

"""Checkpoint folders that openpi's and LeRobot's own loaders read."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from embodied_rl.errors import UserError, unknown
from embodied_rl.policies.pi0.checkpoint import to_published
from embodied_rl.policies.pi0.config import GEMMA_2B, GEMMA_300M
from embodied_rl.policies.pi0.network import NetworkConfig
from embodied_rl.policies.pi0.statistics import LEROBOT_MODES
from embodied_rl.policies.pretrained import write_weights

if TYPE_CHECKING:
    from embodied_rl.policies.normalization import Normaliser
    from embodied_rl.policies.pi0.policy import Pi0Policy

LAYOUTS = ("openpi", "lerobot")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
NORMALISER = "policy_preprocessor_step_0_normalizer_processor.safetensors"
UNNORMALISER = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


def save(policy: Pi0Policy, folder: Path, layout: str) -> None:
    """See `Pi0Policy.save_pretrained`. Raises `UserError` when the folder cannot be written."""
    if layout not in LAYOUTS:
        raise unknown("checkpoint layout", layout, LAYOUTS)
    from embodied_rl.policies.lora import merged_weights  # peft is slow to import

    lerobot = layout == "lerobot"
    heads = {"value_head": policy.value_head, "noise_head": policy.noise_head}
    whole = to_published(merged_weights(policy.network), _unused(policy), lerobot)
    write_weights(folder, whole, shard_bytes=math.inf)  # both loaders want one file
    own = {f"{name}.{key}": value for name, head in heads.items() if head for key, value in head.state_dict().items()}
    write_weights(folder, own, "heads", math.inf)
    tokenizer = Path(policy.config.tokenizer or policy.config.checkpoint)
    try:
        (_write_lerobot if lerobot else _write_openpi)(policy, folder)
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file() and tokenizer.resolve() != folder.resolve():
                shutil.copyfile(tokenizer / name, folder / name)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; free disk space or choose another place") from error


def _unused(policy: Pi0Policy) -> Tensor:
    """The expert's output layer as it was loaded, zeros for a network that came from no file."""
    if policy.checkpoint is not None and policy.checkpoint.unused is not None:
        return policy.checkpoint.unused
    sizes = policy.config.network
    return torch.zeros((sizes.vocabulary, sizes.expert.width), dtype=policy.network.expert.dtype)


def _write_openpi(policy: Pi0Policy, folder: Path) -> None:
    sizes = policy.config.network
    precision = str(policy.network.language.dtype).removeprefix("torch.")
    config = {"action_dim": sizes.action_dim, "action_horizon": policy.horizon, "precision": precision}
    _write_json(folder / "config.json", config | _variants(sizes))
    statistics = {"state": policy.state_normaliser.as_dict(), "actions": policy.action_normaliser.as_dict()}
    _write_json(
        folder / "assets" / (policy.config.asset or "embodied_rl") / "norm_stats.json", {"norm_stats": statistics}
    )


def _write_lerobot(policy: Pi0Policy, folder: Path) -> None:
    size, sizes, name = policy.config.network.vision.image, policy.config.network, policy.config.name
    inputs: dict[str, Any] = {
        f"observation.images.{camera}": {"type": "VISUAL", "shape": [3, size, size]} for camera in policy.views
    }
    inputs["observation.state"] = {"type": "STATE", "shape": [policy.observation_spec.state]}
    outputs = {"action": {"type": "ACTION", "shape": [policy.action_spec.dim]}}
    modes = {
        "VISUAL": "IDENTITY",
        "STATE": _mode(policy.state_normaliser),
        "ACTION": _mode(policy.action_normaliser),
    }
    config = {
        "type": name,
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "normalization_mapping": modes,
        "chunk_size": policy.horizon,
        "n_action_steps": policy.chunk,
        "max_state_dim": sizes.action_dim,
        "max_action_dim": sizes.action_dim,
        "num_inference_steps": policy.config.denoise_steps,
        "image_resolution": [size, size],
        "tokenizer_max_length": policy.config.prompt_length,
        "dtype": str(policy.network.language.dtype).removeprefix("torch."),
    }
    _write_json(folder / "config.json", config | _variants(sizes))

    length = policy.config.prompt_length
    normalise: dict[str, Any] = {"eps": 1e-8, "features": inputs | outputs, "norm_map": modes}
    tokenize = {
        "max_length": length,
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": "google/paligemma-3b-pt-224",
    }
    device = {"device": "cpu", "float_dtype": None}
    if sizes.adaptive:
        text = {"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}}
    else:
        text = {"registry_name": "pi0_new_line_processor", "config": {}}
    normaliser = {"registry_name": "normalizer_processor", "config": normalise, "state_file": NORMALISER}
    before = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        normaliser,
        text,
        {"registry_name": "tokenizer_processor", "config": tokenize},
        {"registry_name": "device_processor", "config": device},
    ]
    unnormaliser = {
        "registry_name": "unnormalizer_processor",
        "config": {**normalise, "features": outputs},
        "state_file": UNNORMALISER,
    }
    after = [unnormaliser, {"registry_name": "device_processor", "config": device}]
    _write_json(folder / "policy_preprocessor.json", {"name": "policy_preprocessor", "steps": before})
    _write_json(folder / "policy_postprocessor.json", {"name": "policy_postprocessor", "steps": after})
    action = {f"action.{key}": _float(value) for key, value in policy.action_normaliser.as_dict().items()}
    state = {f"observation.state.{key}": _float(value) for key, value in policy.state_normaliser.as_dict().items()}
    save_file(state | action, folder / NORMALISER)
    save_file(action, folder / UNNORMALISER)


def _mode(normaliser: Normaliser) -> str:
    """LeRobot's name of a normaliser's statistics; its epsilons differ from openpi's, 1e-8 against 1e-6."""
    modes = {"_".join(name.split("_")[1:]): mode for mode, name in LEROBOT_MODES.items()}
    return modes[normaliser.name.split("_", 1)[1]]


def _variants(sizes: NetworkConfig) -> dict[str, str]:
    """What the published code calls these sizes; {} for others, which it does not know."""
    parts = {"paligemma_variant": sizes.language, "action_expert_variant": sizes.expert}
    names = {GEMMA_2B: "gemma_2b", GEMMA_300M: "gemma_300m"}
    return {key: names[part] for key, part in parts.items() if part in names}


def _float(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))

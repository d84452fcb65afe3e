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
from embodied_rl.policies.pretrained import save_heads, write_weights

if TYPE_CHECKING:
    from embodied_rl.policies.normalization import Normaliser
    from embodied_rl.policies.pi0.policy import Pi0Policy

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
OPENPI_STATISTICS = ("mean", "std", "q01", "q99")
NORMALISER = "policy_preprocessor_step_0_normalizer_processor.safetensors"
UNNORMALISER = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


def save(policy: Pi0Policy, folder: Path, layout: str | None) -> None:
    """See `Pi0Policy.save_pretrained`."""
    from embodied_rl.policies.lora import merged_weights  # peft is slow to import

    original = policy.checkpoint
    layout = layout or (original.layout if original else "openpi")
    if layout not in WRITERS:
        raise unknown("checkpoint layout", layout, WRITERS)
    if original is not None and original.folder.resolve() in folder.resolve().parents:
        raise UserError(f"{folder} is inside the checkpoint that the policy was loaded from; save it beside that")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if original is None or layout != original.layout:
            WRITERS[layout](policy, folder)
            if source := policy.config.tokenizer or policy.config.checkpoint:
                _copy_tokenizer(Path(source), folder)
        elif original.folder.resolve() != folder.resolve():
            weights = shutil.ignore_patterns("model*.safetensors*", "heads.safetensors", ".*")
            shutil.copytree(original.folder, folder, ignore=weights, dirs_exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; free disk space or choose another place") from error
    whole = to_published(merged_weights(policy.network), _unused(policy), layout == "lerobot")
    write_weights(folder, whole, shard_bytes=math.inf)  # both loaders want one file
    save_heads(folder, policy.heads)


def _unused(policy: Pi0Policy) -> Tensor:
    """The expert's output layer as it was loaded, zeros for a network that came from no file."""
    if policy.checkpoint is not None and policy.checkpoint.unused is not None:
        return policy.checkpoint.unused
    sizes = policy.config.network
    return torch.zeros((sizes.vocabulary, sizes.expert.width), dtype=policy.network.expert.dtype)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_openpi(policy: Pi0Policy, folder: Path) -> None:
    sizes = policy.config.network
    wanted = "quantile" if sizes.adaptive else "mean_std"
    statistics = {}
    for name, normaliser in {"state": policy.state_normaliser, "actions": policy.action_normaliser}.items():
        if not normaliser.name.endswith(wanted):
            raise UserError(
                f"openpi normalises {policy.config.name} by {wanted}, this policy's {name} by {normaliser.name}: "
                f"save it in the layout 'lerobot'"
            )
        statistics[name] = {key: value for key, value in normaliser.as_dict().items() if key in OPENPI_STATISTICS}
    config = {"action_dim": sizes.action_dim, "action_horizon": policy.horizon, "precision": _precision(policy)}
    _write_json(folder / "config.json", config | _variants(sizes))
    _write_json(folder / "assets" / "embodied_rl" / "norm_stats.json", {"norm_stats": statistics})


def _write_lerobot(policy: Pi0Policy, folder: Path) -> None:
    if policy.config.relative_to_state:
        raise UserError("LeRobot's π₀ takes no actions relative to the state: save it in the layout 'openpi'")
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
        "dtype": _precision(policy),
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
    kind = normaliser.name.split("_", 1)[1]
    return next(mode for mode, name in LEROBOT_MODES.items() if name == f"lerobot_{kind}")


def _precision(policy: Pi0Policy) -> str:
    return str(policy.network.language.dtype).removeprefix("torch.")


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


WRITERS = {"openpi": _write_openpi, "lerobot": _write_lerobot}
"""What a layout has besides weights."""

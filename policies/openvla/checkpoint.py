"""Checkpoint folders of OpenVLA and OpenVLA-OFT, in and out.

config.json  preprocessor_config.json  dataset_statistics.json  tokenizer files
model.safetensors, or shards with an index
action_head--N_checkpoint.pt  proprio_projector--N_checkpoint.pt  vision_backbone--N_checkpoint.pt   (OFT)
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.policies.lora import merged_weights
from embodied_rl.policies.normalization import read_statistics
from embodied_rl.policies.openvla.architecture import Architecture
from embodied_rl.policies.openvla.network import OpenVLANetwork
from embodied_rl.policies.openvla.preprocessing import ImageProcessor
from embodied_rl.policies.pretrained import load_strict, read_json, read_weights, write_weights

PARTS = {"action_head": "module.", "proprio_projector": "module.", "vision_backbone": "vision_backbone."}
"""The parts that OFT saves on their own, and what stands before their keys: wrappers of the training script."""
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".bin", ".index.json")


@dataclass(frozen=True)
class Checkpoint:
    """What a folder says about itself before its weights are used."""

    folder: Path
    architecture: Architecture
    """The horizon is not recorded in a folder; the caller sets it."""
    processor: ImageProcessor
    parts: Mapping[str, Path]
    """Files of the parts that are saved on their own."""
    dtype: torch.dtype
    """Of the stored weights."""
    statistics: Path
    """The file that has them."""
    dataset: tuple[str, ...]
    """Where in it those of one dataset are; for `read_statistics`."""


def open_checkpoint(folder: str | Path, unnorm_key: str | None) -> Checkpoint:
    """The folder with the statistics of dataset `unnorm_key`. Raises `UserError` naming the file when something is
    missing, damaged or of another family."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    architecture = Architecture.from_json(config, str(folder / "config.json"))
    processor_json = folder / "preprocessor_config.json"
    processor = ImageProcessor.from_json(read_json(processor_json), str(processor_json))
    if processor.size != architecture.image_size:
        raise UserError(
            f"{processor_json} makes images of {processor.size} pixels, the network takes {architecture.image_size}"
        )
    parts = {part: file for part in PARTS if (file := _part_file(folder, part))}
    source, dataset = folder / "dataset_statistics.json", ()  # of fine-tuning: they replace those of pre-training
    if not source.is_file():
        source, dataset = folder / "config.json", ("norm_stats",)
    dataset = (*dataset, _dataset(read_statistics(source, *dataset), unnorm_key, source))
    vectors = [value for value in read_statistics(source, *dataset, "action").values() if isinstance(value, list)]
    architecture = replace(architecture, action_dim=max(map(len, vectors), default=0))
    dtype = getattr(torch, str(config.get("torch_dtype") or config.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"{folder / 'config.json'} names no torch_dtype")
    return Checkpoint(folder, _with_parts(architecture, folder, parts), processor, parts, dtype, source, dataset)


def _dataset(datasets: Mapping[str, Any], wanted: str | None, source: Path) -> str:
    """`wanted`, with or without the suffix "_no_noops" that LIBERO's fine-tuning sets carry; None = the only one."""
    if wanted is None and len(datasets) == 1:
        return next(iter(datasets))
    for key in () if wanted is None else (wanted, f"{wanted}_no_noops"):
        if key in datasets:
            return key
    has = ", ".join(sorted(datasets)) or "none"
    raise UserError(f"{source} has no statistics '{wanted}': set the policy's unnorm_key to one of {has}")


def load_network(checkpoint: Checkpoint, architecture: Architecture, dtype: torch.dtype) -> OpenVLANetwork:
    """The network with the folder's weights, on the CPU. Raises `UserError` for missing, unexpected, misshapen keys."""
    with torch.device("meta"):
        network = OpenVLANetwork(architecture)
    weights = read_weights(checkpoint.folder)
    if "vision_backbone" in checkpoint.parts:
        weights = {key: value for key, value in weights.items() if not key.startswith("vision_backbone.")}
    for part, file in checkpoint.parts.items():
        weights |= {f"{part}.{key}": value for key, value in _read_part(file).items()}
    load_strict(network, {_ours(key): value for key, value in weights.items()}, checkpoint.folder)
    network.restore_buffers()
    return network.to(dtype)


def save_network(network: OpenVLANetwork, checkpoint: Checkpoint, folder: Path) -> None:
    """Write `network` in the layout, the names and the precision that `checkpoint` has, with adapters added by
    `add_lora` merged. Everything in its folder that holds no weights is copied."""
    if folder.resolve() == checkpoint.folder.resolve():
        raise UserError(f"{folder} is the checkpoint that the policy was loaded from; save it to another folder")
    weights = exported_weights(network, checkpoint.dtype)
    own: dict[str, dict[str, Tensor]] = {}
    for part in checkpoint.parts:
        own[part] = {key: weights.pop(key) for key in [*weights] if key.startswith(f"{part}.")}
    if "vision_backbone" in own:
        # the same vision without FiLM's layers, which a loader without the part would see
        weights |= _plain_vision(network, checkpoint.dtype)
    write_weights(folder, weights)
    try:
        for part, tensors in own.items():
            named = {PARTS[part] + key.removeprefix(f"{part}."): value.contiguous() for key, value in tensors.items()}
            file = folder / checkpoint.parts[part].name
            if file.suffix == ".pt":
                torch.save(named, file)
            else:
                save_file(named, file, metadata={"format": "pt"})
        for file in checkpoint.folder.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
                shutil.copyfile(file, folder / file.name)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as RuntimeError
        raise UserError(f"cannot write {folder}: {error}; free disk space or choose another place") from error


def exported_weights(network: OpenVLANetwork, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights under their published names. The vision adapters of a FiLM checkpoint stay unmerged, as published."""
    published = network.architecture.vision_lora_rank > 0
    weights: dict[str, Tensor] = {}
    for part, module in network.named_children():
        keep = published and part == "vision_backbone"
        state = module.state_dict() if keep else merged_weights(module)
        weights |= {_published(f"{part}.{key}"): value.detach().to("cpu", dtype) for key, value in state.items()}
    return weights


def _plain_vision(network: OpenVLANetwork, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        _published(f"vision_backbone.{key.replace('.block.', '.')}"): value.detach().to("cpu", dtype)
        for key, value in merged_weights(network.vision_backbone).items()
        if ".scale." not in key and ".shift." not in key
    }


def _ours(key: str) -> str:
    return key.replace(".scale_factor", ".gamma")


def _published(key: str) -> str:
    return key.replace(".gamma", ".scale_factor")


def _part_file(folder: Path, part: str) -> Path | None:
    files = sorted(file for suffix in ("pt", "safetensors") for file in folder.glob(f"{part}--*_checkpoint.{suffix}"))
    if len(files) > 1:
        raise UserError(f"{folder} has several files of one part: {', '.join(f.name for f in files)}; keep one")
    return files[0] if files else None


def _read_part(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        weights = read_weights(file.parent, file.stem)
    else:
        try:
            weights = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251 (tensors only, no code)
        except Exception as error:  # what torch raises for a damaged file has no common base
            raise UserError(
                f"{file} is damaged, or holds more than tensors ({type(error).__name__}); copy it again"
            ) from error
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise UserError(f"{file} holds no dictionary of tensors")
    return {key.removeprefix("module.").removeprefix("vision_backbone."): value for key, value in weights.items()}


def _with_parts(architecture: Architecture, folder: Path, parts: Mapping[str, Path]) -> Architecture:
    """`architecture` with the sizes that only the weights tell."""
    heads = {part: _read_part(file) for part, file in parts.items()}
    try:
        if "action_head" in heads:
            action_dim = len(heads["action_head"]["model.fc2.bias"])
            architecture = replace(architecture, regression=True, action_dim=action_dim)
        proprio = heads.get("proprio_projector")
        if proprio is None:  # SimpleVLA-RL keeps it among the network's weights
            proprio = {key.removeprefix("proprio_projector."): value for key, value in read_weights(folder).items()}
        if "fc1.weight" in proprio:
            architecture = replace(architecture, proprio_dim=proprio["fc1.weight"].shape[1])
        if "vision_backbone" in heads:
            ranks = {len(value) for key, value in heads["vision_backbone"].items() if ".lora_A." in key}
            if len(ranks) > 1:
                raise UserError(f"{parts['vision_backbone']} has adapters of several ranks: {sorted(ranks)}")
            architecture = replace(architecture, film=True, vision_lora_rank=max(ranks, default=0))
    except KeyError as error:
        raise UserError(f"{folder}: the action head has no {error}; is it an L1 regression head?") from error
    return architecture

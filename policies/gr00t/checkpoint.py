"""Checkpoint folders of GR00T N1.5 in NVIDIA's layout, in and out.

config.json  model.safetensors, or shards with an index  experiment_cfg/metadata.json (statistics by embodiment)

A folder may hold heads.safetensors besides, the value and noise heads of a policy that was saved here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl.errors import UserError
from embodied_rl.policies.gr00t.action_head import EmbodimentLinear
from embodied_rl.policies.gr00t.network import Network
from embodied_rl.policies.gr00t.sizes import NetworkConfig
from embodied_rl.policies.normalization import read_statistics
from embodied_rl.policies.pretrained import load_strict, read_json, read_weights, save_heads, write_weights

TOKEN_TABLE = "backbone.eagle_model.language_model.model.embed_tokens.weight"
OUTPUT_LAYER = "backbone.eagle_model.language_model.lm_head.weight"
"""Of the language model, which nobody reads. Files hold it besides the token table, or instead, for they are tied."""
METADATA = Path("experiment_cfg", "metadata.json")
MODEL_TYPE = "gr00t_n1_5"


def describe(sizes: NetworkConfig, horizon: int) -> dict[str, Any]:
    """What config.json says about a network."""
    head = sizes.head
    dit = {"num_attention_heads": head.dit.heads, "attention_head_dim": head.dit.head_dim, "num_layers": head.dit.depth}
    over = head.features_attention
    attention = {"num_attention_heads": over.heads, "attention_head_dim": over.head_dim, "num_layers": over.depth}
    return {
        "model_type": MODEL_TYPE,
        "hidden_size": head.features,
        "action_dim": head.action_dim,
        "action_horizon": horizon,
        "backbone_cfg": {"select_layer": sizes.backbone.language.depth, "project_to_dim": None},
        "action_head_cfg": {
            "action_dim": head.action_dim,
            "action_horizon": horizon,
            "max_state_dim": head.state_dim,
            "hidden_size": head.hidden,
            "input_embedding_dim": head.dit.width,
            "backbone_embedding_dim": head.features,
            "max_num_embodiments": head.embodiments,
            "max_seq_len": head.positions,
            "num_target_vision_tokens": head.future_tokens,
            "num_timestep_buckets": head.buckets,
            "add_pos_embed": True,
            "use_vlln": True,
            "diffusion_model_cfg": {
                **dit,
                "output_dim": head.hidden,
                "cross_attention_dim": head.features,
                "interleave_self_attention": True,
                "norm_type": "ada_norm",
                "positional_embeddings": None,
            },
            "vl_self_attention_cfg": {**attention, "positional_embeddings": None},
        },
    }


@dataclass(frozen=True)
class Checkpoint:
    """What a folder says about itself before its weights are used."""

    folder: Path
    config: dict[str, Any]
    """config.json."""
    table: str
    """The name of its token table."""
    unused: Tensor | None
    """Its output layer besides that; it is written back as it was, and read then."""

    @staticmethod
    def open(folder: str | Path) -> Checkpoint:
        """Raises `UserError` naming the file when it is missing, damaged or of another family."""
        folder = Path(folder)
        config = read_json(folder / "config.json")
        if config.get("model_type") != MODEL_TYPE:
            raise UserError(
                f"{folder / 'config.json'}: model_type is {config.get('model_type')}, not {MODEL_TYPE}; GR00T N1, N1.6 "
                f"and N1.7 are other networks"
            )
        weights = read_weights(folder)
        if TOKEN_TABLE in weights:
            return Checkpoint(folder, config, TOKEN_TABLE, weights.get(OUTPUT_LAYER))
        return Checkpoint(folder, config, OUTPUT_LAYER, None)

    @property
    def horizon(self) -> int | None:
        """What the folder says that it was trained for; the weights do not tell."""
        return self.config.get("action_head_cfg", {}).get("action_horizon", self.config.get("action_horizon"))

    def network(self, sizes: NetworkConfig, horizon: int) -> Network:
        """The network with these weights, on the CPU. Raises `UserError` naming what does not fit."""
        if difference := next(_differences(self.config, describe(sizes, horizon)), None):
            name, found, wanted = difference
            raise UserError(
                f"{self.folder / 'config.json'}: {name} is {found}, the policy's {wanted}: set the policy's horizon or "
                f"network to the checkpoint's"
            )
        weights = read_weights(self.folder)
        if self.unused is not None:
            del weights[OUTPUT_LAYER]
        weights = {TOKEN_TABLE if key == self.table else key: value for key, value in weights.items()}
        with torch.device("meta"):
            network = Network(sizes)
        load_strict(network, weights, self.folder)
        network.eagle.restore_buffers()
        return network

    def statistics(self, embodiment: str, kind: str, keys: Sequence[str], size: int) -> tuple[dict[str, Any], str]:
        """({"min", "max", ...}, where they are from) of `kind` "state" or "action", the parts `keys` one after the
        other; () = all, as they stand in the file. Raises `UserError` naming the file when it has them not, or for
        another number of dimensions than `size`."""
        path = self.folder / METADATA
        parts = read_statistics(path, embodiment, "statistics", kind)
        chosen = [read_statistics(path, embodiment, "statistics", kind, key) for key in keys or parts]
        names = set.intersection(*map(set, chosen)) if chosen else set()
        joined = {name: [number for part in chosen for number in _vector(part[name])] for name in sorted(names)}
        source = f"{path}, {embodiment} / statistics / {kind}"
        counts = {len(values) for values in joined.values()}
        if counts - {size}:
            raise UserError(
                f"{source} describes {max(counts)} dimensions ({', '.join(keys or parts)}), the simulator has {size}: "
                f"choose with --policy.{kind}-keys"
            )
        return joined, source

    def __deepcopy__(self, memo: dict) -> Checkpoint:
        return self  # immutable, and its output layer is large


def keep_embodiment(network: Network, index: int) -> None:
    """Cut the tables of the embodiments' weights to those of one, which is number 0 from now on. What is not used is
    not trained, not decayed and has no optimizer state."""
    for layer in network.modules():
        if isinstance(layer, EmbodimentLinear):
            layer.W = nn.Parameter(layer.W.detach()[index : index + 1].clone())
            layer.b = nn.Parameter(layer.b.detach()[index : index + 1].clone())


def whole_tables(network: Network, index: int, original: Checkpoint | None) -> dict[str, Tensor]:
    """The tables that `keep_embodiment` has cut: the others' weights as `original` has them, or the same for all."""
    stored = read_weights(original.folder) if original else {}
    tables: dict[str, Tensor] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, EmbodimentLinear):
            for part, own in layer.named_parameters():
                own, key = own.detach().cpu(), f"{name}.{part}"
                count = network.config.head.embodiments
                tables[key] = (
                    stored[key].to(own.dtype, copy=True) if stored else own.repeat(count, *[1] * (own.dim() - 1))
                )
                tables[key][index] = own[0]
    return tables


def save(
    folder: Path,
    original: Checkpoint | None,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    heads: Mapping[str, nn.Module | None],
) -> None:
    """Write `weights` under the names and beside the files that the `original` folder has; `config` and `metadata` are
    for a network that came from no file. Raises `UserError` when it cannot be written."""
    if original is not None and original.folder.resolve() in folder.resolve().parents:
        raise UserError(f"{folder} is inside the checkpoint that the policy was loaded from; save it beside that")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if original is None:
            (folder / METADATA).parent.mkdir(exist_ok=True)
            (folder / METADATA).write_text(json.dumps(metadata, indent=2))
            (folder / "config.json").write_text(json.dumps(config, indent=2))
        elif original.folder.resolve() != folder.resolve():
            ignored = shutil.ignore_patterns("model*.safetensors*", "heads.safetensors", ".*")
            shutil.copytree(original.folder, folder, ignore=ignored, dirs_exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; free disk space or choose another place") from error
    table, unused = (original.table, original.unused) if original else (TOKEN_TABLE, weights[TOKEN_TABLE].clone())
    whole = {table if key == TOKEN_TABLE else key: value for key, value in weights.items()}
    whole |= {} if unused is None else {OUTPUT_LAYER: unused}
    write_weights(folder, {key: whole[key] for key in sorted(whole)})
    save_heads(folder, heads)


def _vector(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, found, wanted) where the two say something else; what is not said does not differ."""
    for key, value in wanted.items():
        if isinstance(value, Mapping) and isinstance(found.get(key), Mapping):
            yield from ((f"{key}.{name}", *pair) for name, *pair in _differences(found[key], value))
        elif key in found and found[key] != value:
            yield key, found[key], value

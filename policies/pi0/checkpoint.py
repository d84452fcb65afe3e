"""Published checkpoint folders: openpi's PyTorch layout, and LeRobot's, whose keys are the same behind "model.".

openpi:   model.safetensors  config.json  assets/ASSET/norm_stats.json
LeRobot:  model.safetensors  config.json  policy_preprocessor.json with its normaliser's safetensors

Either may hold heads.safetensors besides, the value and noise heads of a policy that was saved here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.policies.pi0.network import Network, NetworkConfig
from embodied_rl.policies.pi0.statistics import Found, find_statistics
from embodied_rl.policies.pretrained import load_strict, read_json, read_weights

LEROBOT = "model."
"""In front of every key of LeRobot's files."""
PUBLISHED = {
    "vision.": "paligemma_with_expert.paligemma.model.vision_tower.vision_model.",
    "projector.": "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.",
    # the token table and the language model's output layer are one tensor, stored under the latter's name
    "language.embed_tokens.weight": "paligemma_with_expert.paligemma.lm_head.weight",
    "language.": "paligemma_with_expert.paligemma.model.language_model.",
    "expert.": "paligemma_with_expert.gemma_expert.model.",
}
"""Our names (or their beginnings) and the published ones, the first that fits; other names are the same."""
TOKEN_TABLE = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
"""The token table's other name."""
UNUSED = "paligemma_with_expert.gemma_expert.lm_head.weight"
"""The expert's output layer [vocabulary, expert width]: in every published file, and read by nobody."""


def published_name(name: str) -> str:
    """openpi's name of one of our parameters."""
    for ours, published in PUBLISHED.items():
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return name


def from_published(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Published weights under our `names`, without what the network does not have; unknown keys stay as they are."""
    ours = {published_name(name): name for name in names} | {TOKEN_TABLE: "language.embed_tokens.weight"}
    weights = {key.removeprefix(LEROBOT): value for key, value in weights.items()}
    return {ours.get(key, key): value for key, value in weights.items() if key != UNUSED}


def to_published(weights: Mapping[str, Tensor], unused: Tensor, lerobot: bool = False) -> dict[str, Tensor]:
    """The network's state dict in the published layout. `unused` is the expert's output layer."""
    named = {published_name(name): value for name, value in weights.items()} | {UNUSED: unused}
    return {(LEROBOT if lerobot else "") + key: named[key] for key in sorted(named)}


@dataclass(frozen=True)
class Checkpoint:
    """What a folder says about itself before its weights are used."""

    folder: Path
    config: dict[str, Any]
    """config.json, {} without one."""
    layout: Literal["openpi", "lerobot"]
    adaptive: bool
    """It is π₀.₅."""
    unused: Tensor | None
    """See `UNUSED`; it is written back as it was, and read then."""

    @staticmethod
    def open(folder: str | Path) -> Checkpoint:
        """Raises `UserError` naming the file when it is missing, damaged or of another family."""
        folder = Path(folder)
        if (folder / "params").is_dir():
            raise UserError(
                f"{folder} is a JAX checkpoint: convert it with openpi's examples/convert_jax_model_to_pytorch.py"
            )
        stored = read_weights(folder)
        weights = {key.removeprefix(LEROBOT): value for key, value in stored.items()}
        if "action_in_proj.weight" not in weights:
            raise UserError(f"{folder} holds no π₀ or π₀.₅ in openpi's PyTorch layout: no key action_in_proj.weight")
        path = folder / "config.json"
        config = read_json(path) if path.is_file() else {}
        if config.get("use_relative_actions"):
            raise UserError(f"{path}: use_relative_actions is not supported; fine-tune with absolute or delta actions")
        layout = "openpi" if "action_in_proj.weight" in stored else "lerobot"
        return Checkpoint(folder, config, layout, "time_mlp_in.weight" in weights, weights.get(UNUSED))

    @property
    def horizon(self) -> int | None:
        """What the folder says that it was trained for; the weights do not tell."""
        return self.config.get("action_horizon", self.config.get("chunk_size"))

    def network(self, sizes: NetworkConfig, horizon: int) -> Network:
        """The network with these weights, on the CPU. Raises `UserError` naming what does not fit."""
        if self.adaptive != sizes.adaptive:
            found, wanted = ("pi05", "pi0") if self.adaptive else ("pi0", "pi05")
            raise UserError(f"{self.folder} is a {found} checkpoint, the policy is {wanted}: use --policy {found}")
        if self.horizon not in (None, horizon):
            raise UserError(
                f"{self.folder / 'config.json'}: trained to predict {self.horizon} actions, the policy predicts "
                f"{horizon}: set --policy.horizon {self.horizon}"
            )
        with torch.device("meta"):
            network = Network(sizes, horizon)
        load_strict(network, from_published(read_weights(self.folder), network.state_dict()), self.folder)
        return network

    def statistics(self, asset: str | None) -> dict[str, Found]:
        """{"state", "actions"}."""
        return find_statistics(self.folder, asset, self.adaptive)

    def __deepcopy__(self, memo: dict) -> Checkpoint:
        return self  # immutable, and its unused layer is large

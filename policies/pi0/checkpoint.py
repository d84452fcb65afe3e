"""The layout of published checkpoints: openpi's PyTorch files, and LeRobot's, which are the same behind "model."."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.policies.pi0.network import Network

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


def from_published(weights: Mapping[str, Tensor], network: Network, source: Path | str) -> dict[str, Tensor]:
    """Published weights under our names, without what the network does not have. Raises `UserError` when they belong to
    the other of π₀ and π₀.₅."""
    if all(key.startswith(LEROBOT) for key in weights):
        weights = {key.removeprefix(LEROBOT): value for key, value in weights.items()}
    adaptive = "time_mlp_in.weight" in weights
    if adaptive != network.config.adaptive and (adaptive or "state_proj.weight" in weights):
        found, wanted = ("pi05", "pi0") if adaptive else ("pi0", "pi05")
        raise UserError(f"{source} is a {found} checkpoint, the policy is {wanted}: use --policy {found}")
    names = {published_name(name): name for name in network.state_dict()} | {
        TOKEN_TABLE: "language.embed_tokens.weight"
    }
    return {names.get(key, key): value for key, value in weights.items() if key != UNUSED}


def to_published(weights: Mapping[str, Tensor], unused: Tensor, lerobot: bool = False) -> dict[str, Tensor]:
    """The network's state dict in the published layout. `unused` is the expert's output layer."""
    named = {published_name(name): value for name, value in weights.items()} | {UNUSED: unused}
    return {(LEROBOT if lerobot else "") + key: named[key] for key in sorted(named)}


def unused_layer(network: Network) -> Tensor:
    """Zeros for `UNUSED`, for a network that came from no file; they take no memory until they are written."""
    config = network.config
    like = network.language.layers[0].self_attn["q_proj"].weight
    return torch.zeros((), dtype=like.dtype).expand(config.vocabulary, config.expert.width)

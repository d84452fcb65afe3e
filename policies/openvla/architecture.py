"""Shapes of the OpenVLA networks: what a checkpoint's config.json says, and the published sizes by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from embodied_rl.errors import UserError

DINO_SIGLIP = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
LLAMA_2_7B = {"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064}
"""What the published config.json lists; the rest are transformers' defaults (rms_norm_eps 1e-6, not Llama 2's 1e-5)."""


@dataclass(frozen=True)
class Architecture:
    """Everything that decides the names and shapes of the parameters, and the horizon."""

    vision: tuple[str, str] = DINO_SIGLIP
    """timm names of the two vision transformers; both see every image."""
    vision_options: tuple[Mapping[str, Any], Mapping[str, Any]] = field(default=({}, {}))
    """Overrides of timm's sizes, e.g. {"depth": 3}, for small networks."""
    image_size: int = 224
    """Side of the square images that the network sees, pixels."""
    text: Mapping[str, Any] = field(default_factory=lambda: LLAMA_2_7B)
    """Keyword arguments of transformers' LlamaConfig."""
    vocabulary_padding: int = 64
    """Rows that pad the embedding table; the action tokens are the last 256 rows before them."""
    horizon: int = 1
    """H, actions predicted at once."""
    action_dim: int = 7
    """A."""
    proprio_dim: int = 0
    """Size of the state that becomes a token; 0 = none. OpenVLA-OFT only, like what follows."""
    regression: bool = False
    """Actions from an L1 regression head instead of tokens."""
    film: bool = False
    """The instruction modulates every vision block (FiLM, arXiv 1709.07871)."""
    vision_lora_rank: int = 0
    """Of adapters that a FiLM checkpoint's vision part still carries unmerged; their alpha is min(rank, 16)."""

    @property
    def vocabulary(self) -> int:
        """V, tokens of the tokenizer without padding; action tokens are V - 256 .. V - 1."""
        return self.text["vocab_size"] - self.vocabulary_padding

    @staticmethod
    def from_json(config: Mapping[str, Any], source: str) -> Architecture:
        """The part that a checkpoint's config.json determines. Raises `UserError` naming `source` for another
        family."""
        try:
            sizes = config["image_sizes"]
            options = config.get("timm_model_kwargs", ({}, {}))
            architecture = Architecture(
                vision=tuple(config["timm_model_ids"]),
                vision_options=tuple(options),
                image_size=sizes[0],
                text=config["text_config"],
                vocabulary_padding=config["pad_to_multiple_of"],
            )
            text, fused = config["text_config"]["model_type"], config["use_fused_vision_backbone"]
            activations = config.get("timm_override_act_layers", [None])
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{source} is not an OpenVLA configuration: {error} is missing or malformed") from error
        if config.get("model_type") != "openvla" or config.get("arch_specifier") != "no-align+fused-gelu-mlp":
            raise UserError(
                f"{source}: model_type is '{config.get('model_type')}', not an OpenVLA network with fused-gelu-mlp"
            )
        if text != "llama" or not fused or len(set(sizes)) != 1 or any(activations):
            raise UserError(
                f"{source}: only OpenVLA on Llama with two vision transformers of one image size is supported"
            )
        return architecture


SIZES: dict[str, Architecture] = {"openvla-7b": Architecture()}
SIZES["openvla-oft-7b-discrete"] = replace(SIZES["openvla-7b"], horizon=8)
SIZES["openvla-oft-7b-libero"] = replace(SIZES["openvla-7b"], horizon=8, proprio_dim=8, regression=True)
SIZES["openvla-oft-7b-aloha"] = replace(
    SIZES["openvla-7b"],
    horizon=25,
    action_dim=14,
    proprio_dim=14,
    regression=True,
    film=True,
    vision_lora_rank=32,
)
"""The published sizes."""

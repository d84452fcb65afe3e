"""Sizes of GR00T N1.5 networks: what decides the names and shapes of their parameters."""

from __future__ import annotations

from dataclasses import dataclass

from embodied_rl.policies.pi0.siglip import SiglipConfig


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of one stack of blocks."""

    depth: int
    """Blocks."""
    heads: int
    """Attention heads."""
    head_dim: int
    """Size of each; the width of the stack is heads * head_dim."""

    @property
    def width(self) -> int:
        """Size of a token."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class ActionHeadConfig:
    """Sizes of an action head; the published ones are below."""

    features: int
    """Size of the backbone's features."""
    dit: TransformerConfig
    features_attention: TransformerConfig
    """Self-attention over the features; its width is `features`."""
    hidden: int
    """Of the state encoder and the action decoder, and the size of the DiT's outputs."""
    action_dim: int = 32
    """D, dimensions of an action, zero padded."""
    state_dim: int = 64
    """Dimensions of the state, zero padded."""
    embodiments: int = 32
    """Embodiments that have weights of their own."""
    future_tokens: int = 32
    """Learned tokens between state and actions."""
    positions: int = 1024
    """Rows of the table of positions in the chunk."""
    buckets: int = 1000
    """Time buckets."""

    def __post_init__(self) -> None:
        if self.features_attention.width != self.features:
            raise ValueError("features_attention needs the width of the features")


@dataclass(frozen=True)
class LanguageConfig:
    """Sizes of a Qwen3 language model."""

    width: int
    """Size of a token."""
    depth: int
    """Layers that are used; a checkpoint holds no others."""
    mlp: int
    """Hidden size of the layers' MLP."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads."""
    head_dim: int
    """Size of a head."""
    vocabulary: int
    """Rows of the token table."""


@dataclass(frozen=True)
class EagleConfig:
    """Sizes of a backbone; the published ones are below."""

    vision: SiglipConfig
    language: LanguageConfig
    image_token: int
    """The token id whose place an image's features take."""


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of a network; the named ones are below."""

    backbone: EagleConfig
    head: ActionHeadConfig

    def __post_init__(self) -> None:
        if self.head.features != self.backbone.language.width:
            raise ValueError("the head's features need the language model's width")


EAGLE = EagleConfig(
    SiglipConfig(width=1152, depth=27, heads=16, mlp=4304, patch=14, image=224),
    LanguageConfig(width=2048, depth=12, mlp=6144, heads=16, kv_heads=8, head_dim=128, vocabulary=151_680),
    image_token=151_669,
)
"""From public code, not verified against the weights; see `eagle.py`."""
GR00T_N1_5 = NetworkConfig(
    EAGLE,
    ActionHeadConfig(
        features=2048,
        dit=TransformerConfig(depth=16, heads=32, head_dim=48),
        features_attention=TransformerConfig(depth=4, heads=32, head_dim=64),
        hidden=1024,
    ),
)


def tiny() -> NetworkConfig:
    """A network of the same make with about 0.2 M parameters, for tests and first steps."""
    return NetworkConfig(
        EagleConfig(
            SiglipConfig(width=32, depth=2, heads=4, mlp=64, patch=8, image=32),
            LanguageConfig(width=48, depth=2, mlp=96, heads=4, kv_heads=2, head_dim=16, vocabulary=272),
            image_token=1,
        ),
        ActionHeadConfig(
            features=48,
            dit=TransformerConfig(depth=4, heads=4, head_dim=8),
            features_attention=TransformerConfig(depth=1, heads=4, head_dim=12),
            hidden=24,
            future_tokens=4,
            positions=64,
        ),
    )

"""The SigLIP vision transformer (arXiv 2303.15343) without its pooling head: one token per patch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl.policies.pi0.checkpointing import checkpointed

EPSILON = 1e-6


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of a SigLIP vision transformer."""

    width: int
    """Size of a token."""
    depth: int
    """Layers."""
    heads: int
    """Attention heads; divides the width."""
    mlp: int
    """Hidden size of the layers' MLP."""
    patch: int
    """Pixels of a patch's side."""
    image: int
    """Pixels of the image's side; a multiple of the patch's."""

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return (self.image // self.patch) ** 2


class Siglip(nn.Module):
    """Images to tokens. Parameter names are those of transformers' `SiglipVisionTransformer`."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.checkpointing = False
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.post_layernorm = LayerNorm(config.width, EPSILON)

    def forward(self, images: Tensor) -> Tensor:
        """Float [B,3,S,S] in [-1, 1] -> [B,tokens,width]."""
        x = self.embeddings(images).to(self.encoder.dtype)
        for layer in self.encoder.layers:
            x = checkpointed(self.checkpointing, layer, x)
        return self.post_layernorm(x)


class _Embeddings(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, config.patch)
        self.position_embedding = nn.Embedding(config.tokens, config.width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images.to(self.patch_embedding.weight.dtype))
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight


class _Encoder(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.depth))

    @property
    def dtype(self) -> torch.dtype:
        return next(layer.mlp.fc1.weight.dtype for layer in self.layers if isinstance(layer, _Layer))


class _Layer(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.width, EPSILON)
        self.self_attn = _Attention(config)
        self.layer_norm2 = LayerNorm(config.width, EPSILON)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Attention(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class LayerNorm(nn.LayerNorm):
    """Computed in float32, whatever the types of its input and weights; returns the input's type."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(input.to(torch.float32), self.normalized_shape, weight, bias, self.eps).to(input.dtype)

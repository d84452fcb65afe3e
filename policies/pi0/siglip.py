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
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Conv2d(3, config.width, config.patch, config.patch),
                "position_embedding": nn.Embedding(config.tokens, config.width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(_Layer(config) for _ in range(config.depth))})
        self.post_layernorm = LayerNorm(config.width, EPSILON)

    def forward(self, images: Tensor) -> Tensor:
        """Float [B,3,S,S] in [-1, 1] -> [B,tokens,width]."""
        patch, position = self.embeddings["patch_embedding"], self.embeddings["position_embedding"]
        x = patch(images.to(patch.weight.dtype)).flatten(2).transpose(1, 2) + position.weight
        x = x.to(self.encoder["layers"][0].mlp["fc1"].weight.dtype)
        for layer in self.encoder["layers"]:
            x = checkpointed(self.checkpointing, layer, x)
        return self.post_layernorm(x)


class _Layer(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.layer_norm1 = LayerNorm(width, EPSILON)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.layer_norm2 = LayerNorm(width, EPSILON)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, config.mlp), "fc2": nn.Linear(config.mlp, width)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        x = x + self.self_attn["out_proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        hidden = F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh")
        return x + self.mlp["fc2"](hidden)


class LayerNorm(nn.LayerNorm):
    """Computed in float32, whatever the types of its input and weights; returns the input's type."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(input.to(torch.float32), self.normalized_shape, weight, bias, self.eps).to(input.dtype)

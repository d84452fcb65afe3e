"""The vision part: two transformers see the same image, and their features are concatenated."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from embodied_rl.policies.openvla.architecture import Architecture


class FusedVision(nn.Module):
    """DINOv2 and SigLIP features of the second to last block, before its norm, one token per patch. The last block, the
    norm and SigLIP's pooling head are dead weights that checkpoints carry."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        make = partial(timm.create_model, pretrained=False, num_classes=0, img_size=architecture.image_size)
        (dino, siglip), (dino_options, siglip_options) = architecture.vision, architecture.vision_options
        self.featurizer: Any = make(dino, **dino_options)
        self.fused_featurizer: Any = make(siglip, **siglip_options)
        if architecture.film:
            width = architecture.text.get("hidden_size", 4096)
            for transformer in (self.featurizer, self.fused_featurizer):
                transformer.blocks = nn.ModuleList(FiLMBlock(block, width) for block in transformer.blocks)

    def freeze_unused(self) -> None:
        """Train nothing behind the features."""
        for transformer in (self.featurizer, self.fused_featurizer):
            for part in (transformer.blocks[-1], transformer.norm, transformer.fc_norm, transformer.attn_pool):
                if part is not None:
                    part.requires_grad_(False)

    @property
    def width(self) -> int:
        """Features per patch."""
        return self.featurizer.embed_dim + self.fused_featurizer.embed_dim

    @property
    def patches(self) -> int:
        """Per image."""
        return self.featurizer.patch_embed.num_patches

    def forward(self, dino: Tensor, siglip: Tensor, instruction: Tensor | None = None) -> Tensor:
        """[B,patches,width] from the image in each transformer's normalisation, [B,3,S,S]. `instruction` [B,hidden] is
        the mean embedding of the text, for FiLM."""
        return torch.cat(
            [features(self.featurizer, dino, instruction), features(self.fused_featurizer, siglip, instruction)], -1
        )


def features(transformer: Any, pixels: Tensor, instruction: Tensor | None) -> Tensor:
    """Patch tokens [B,patches,width] after the second to last block."""
    last: int = len(transformer.blocks) - 2
    if instruction is None:
        return transformer.forward_intermediates(
            pixels, indices=[last], norm=False, stop_early=True, output_fmt="NLC", intermediates_only=True
        )[0]
    x: Any = transformer.norm_pre(transformer.patch_drop(transformer._pos_embed(transformer.patch_embed(pixels))))
    for block in transformer.blocks[: last + 1]:
        if transformer.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, instruction, use_reentrant=False)
        else:
            x = block(x, instruction)
    return x[:, transformer.num_prefix_tokens :]


class FiLMBlock(nn.Module):
    """A transformer block whose tokens are scaled and shifted by the instruction between attention and MLP."""

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        self.block: Any = block
        dim = self.block.norm1.normalized_shape[0]
        self.scale = nn.Linear(width, dim)
        self.shift = nn.Linear(width, dim)

    def forward(self, x: Tensor, instruction: Tensor) -> Tensor:
        """x [B,tokens,dim], instruction [B,width]."""
        block = self.block
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        x = x * (1 + self.scale(instruction)[:, None]) + self.shift(instruction)[:, None]
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

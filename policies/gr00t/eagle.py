"""The Eagle 2.5 backbone of GR00T N1.5: SigLIP, a linear projector and the first layers of Qwen3, of transformers'
parts.

Names and sizes are those of NVIDIA's public code and of public converters of its weights: one linear layer, no pixel
shuffle; 12 of Qwen3-1.7B's 28 layers, then its final norm. With them the whole network has as many parameters as public
training logs count. They are not verified against the weights themselves, and no reference numbers hold this file; the
action head's are held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Qwen3Config, Qwen3Model, SiglipVisionConfig, SiglipVisionModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from embodied_rl.policies.gr00t.sizes import EagleConfig

PADDED = "embodied_rl_padded_sdpa"
"""The attention of the language model, for transformers."""


def padded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **settings: Any
) -> Any:
    """Attention in which a query that sees nothing gets zeros, as padding does from the reference's flash attention.
    It matters, for the action head attends to padding. `mask` is bool [B,1,T,T]."""
    sees = mask.any(-1, keepdim=True)
    output, _ = sdpa_attention_forward(module, query, key, value, mask | ~sees, **settings)
    return output * sees.transpose(1, 2), None


AttentionInterface.register(PADDED, padded_attention)


class Eagle(nn.Module):
    """Parameter names are the published ones without "backbone.eagle_model."; the language model's output layer, which
    is the token table under another name, is left out."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = config
        vision, language = config.vision, config.language
        siglip: dict[str, Any] = {
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp,
            "patch_size": vision.patch,
            "image_size": vision.image,
            "attn_implementation": "sdpa",
        }
        qwen: dict[str, Any] = {
            "vocab_size": language.vocabulary,
            "hidden_size": language.width,
            "intermediate_size": language.mlp,
            "num_hidden_layers": language.depth,
            "num_attention_heads": language.heads,
            "num_key_value_heads": language.kv_heads,
            "head_dim": language.head_dim,
            "max_position_embeddings": 40_960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "use_cache": False,
            "attn_implementation": PADDED,
        }
        self.vision_model: Any = SiglipVisionModel(SiglipVisionConfig(**siglip))
        self.mlp1: Any = nn.Sequential(nn.Linear(vision.width, language.width))
        self.language_model: Any = nn.ModuleDict({"model": Qwen3Model(Qwen3Config(**qwen))})
        vision_model = self.vision_model.vision_model
        vision_model.use_head = False  # its pooling head has weights in a checkpoint, and no use
        vision_model.head.requires_grad_(False)

    def forward(self, images: list[Tensor], tokens: Tensor, mask: Tensor) -> Tensor:
        """Features [B,T,W] of images [uint8 [B,S,S,3]] and a prompt int64 [B,T] with its mask bool [B,T]; every row has
        as many image tokens as its images have patches."""
        model = self.language_model["model"]
        embedded = model.embed_tokens(tokens)
        seen = self.see(images).to(embedded.dtype)
        embedded = embedded.masked_scatter((tokens == self.config.image_token)[..., None], seen)
        causal = torch.ones((tokens.shape[1],) * 2, dtype=torch.bool, device=tokens.device).tril()
        sees = causal & mask[:, None, None, :] & mask[:, None, :, None]
        return model(inputs_embeds=embedded, attention_mask={"full_attention": sees}).last_hidden_state

    def see(self, images: list[Tensor]) -> Tensor:
        """Tokens [B,images*patches,W] of the images of every row, image after image."""
        pixels = torch.stack(images, 1).flatten(0, 1).permute(0, 3, 1, 2)
        pixels = (pixels.float() / 255 * 2 - 1).to(self.mlp1[0].weight.dtype)
        patches = self.vision_model(pixel_values=pixels).last_hidden_state
        return self.mlp1(patches).unflatten(0, (-1, len(images))).flatten(1, 2)

    def set_checkpointing(self, on: bool) -> None:
        """Recompute activations in the backward pass, in train mode."""
        for model in (self.vision_model, self.language_model["model"]):
            if on:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                model.gradient_checkpointing_disable()

    def restore_buffers(self) -> None:
        """Build anew what no checkpoint holds: rotary frequencies, float32, and the patches' positions."""
        device = self.mlp1[0].weight.device
        model = self.language_model["model"]
        model.rotary_emb = type(model.rotary_emb)(model.config, device=device)
        embeddings = self.vision_model.vision_model.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions, device=device).expand(1, -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Eagle:
        """Moves and casts as any module, but for the rotary frequencies: bfloat16 ones turn far positions by up to a
        radian."""
        super()._apply(fn, recurse)
        model = self.language_model["model"]
        if model.rotary_emb.inv_freq.dtype != torch.float32:
            self.restore_buffers()
        return self

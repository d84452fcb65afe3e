"""The network: vision, projector and language model, with the sequence layouts of OpenVLA and OpenVLA-OFT.

Sequence: BOS, patches of every image, (state token,) padding, prompt, actions(, stop). Padding lies before the prompt,
so that the action positions are the same in every row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from embodied_rl.policies.lora import add_lora
from embodied_rl.policies.openvla.architecture import Architecture
from embodied_rl.policies.openvla.heads import Projector, ProprioProjector, RegressionHead
from embodied_rl.policies.openvla.lean_llama import make_lean
from embodied_rl.policies.openvla.prompts import BOS
from embodied_rl.policies.openvla.tokens import ACTION_TOKENS
from embodied_rl.policies.openvla.vision import FusedVision

STOP = 2
SDPA = "embodied_rl_sdpa"
"""transformers' own attention under a name for which it makes no masks: without one, all queries see all keys, or in a
causal call those up to their own place."""
AttentionInterface.register(SDPA, sdpa_attention_forward)


class OpenVLANetwork(nn.Module):
    """Parameters are named as in published checkpoints, but for timm's `gamma` (there `scale_factor`)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        config = LlamaConfig(**{**architecture.text, "use_cache": False})
        config._attn_implementation = SDPA
        self.vision_backbone = FusedVision(architecture)
        if architecture.vision_lora_rank:
            rank = architecture.vision_lora_rank
            add_lora(self.vision_backbone, adapted_layers(self.vision_backbone), rank, min(rank, 16))
        self.vision_backbone.freeze_unused()
        self.projector = Projector(self.vision_backbone.width, config.hidden_size)
        self.language_model: Any = LlamaForCausalLM(config)
        make_lean(self.language_model.model)
        if architecture.proprio_dim:
            self.proprio_projector = ProprioProjector(architecture.proprio_dim, config.hidden_size)
        if architecture.regression:
            self.action_head = RegressionHead(config.hidden_size, architecture.action_dim)

    @property
    def dtype(self) -> torch.dtype:
        return self.projector.fc1.weight.dtype

    @property
    def hidden_size(self) -> int:
        return self.language_model.config.hidden_size

    @property
    def pad_token(self) -> int:
        """Its embedding is never attended to."""
        return self.language_model.config.pad_token_id

    def embed(self, tokens: Tensor) -> Tensor:
        """[B,L] -> [B,L,hidden]."""
        return self.language_model.model.embed_tokens(tokens)

    def prefix(
        self, pixels: Tensor, prompt: Tensor, state: Tensor | None = None, stop_token: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B,S,hidden] of everything before the actions, and which of them are valid, bool [B,S].

        pixels: [B,images,6,size,size], both normalisations of every image.
        prompt: int64 [B,L], left-padded token ids without BOS.
        state: normalised, [B,proprio_dim].
        stop_token: the sequence will end in one, which FiLM's mean over the text counts.
        """
        valid = prompt != self.pad_token
        if not valid.is_meta:  # nothing sees the padding that all rows have in front
            longest = max(int(valid.sum(1).max()), 1)
            prompt, valid = prompt[:, -longest:], valid[:, -longest:]
        text = self.embed(prompt)
        bos = self.embed(torch.full_like(prompt[:, :1], BOS))
        instruction = None
        if self.architecture.film:
            around = [bos[:, 0], self.embed(torch.full_like(prompt[:, 0], STOP))][: 1 + stop_token]
            total = (text * valid[..., None]).sum(1) + sum(around)
            instruction = total / (valid.sum(1, keepdim=True) + len(around)).to(total.dtype)
        parts = [bos, self.see(pixels, instruction)]
        if state is not None:
            parts.append(self.proprio_projector(state.to(self.dtype))[:, None])
        ahead = torch.cat(parts, 1)
        return torch.cat([ahead, text], 1), torch.cat([valid.new_ones(ahead.shape[:2]), valid], 1)

    def see(self, pixels: Tensor, instruction: Tensor | None = None) -> Tensor:
        """Projected patches [B,images*patches,hidden]."""
        return self.projector(self.patch_features(pixels, instruction))

    def patch_features(self, pixels: Tensor, instruction: Tensor | None = None) -> Tensor:
        """[B,images*patches,vision width]."""
        batch, images = pixels.shape[:2]
        if instruction is not None:
            instruction = instruction.repeat_interleave(images, 0)
        dino, siglip = pixels.to(self.dtype).flatten(0, 1).split(3, 1)
        return self.vision_backbone(dino, siglip, instruction).unflatten(0, (batch, images)).flatten(1, 2)

    def hidden(
        self,
        embeddings: Tensor,
        valid: Tensor,
        causal: bool,
        read: slice = slice(None),
        cache: Any = None,
        first: int = 0,
    ) -> Tensor:
        """Last hidden states [B,R,hidden] of the places `read` among the Q of `embeddings` [B,Q,hidden], the queries
        first .. first + Q - 1.

        valid: bool [B,S] over all keys, S = Q without a cache and the cache's length with one.
        causal: else every query sees every valid key.
        """
        places = torch.arange(first, first + embeddings.shape[1], device=valid.device)
        rotary = (valid.cumsum(1) - 1).clamp_min(0)[:, places]
        mask = None
        if first or not (valid.is_meta or valid.all()):
            sees = valid[:, None, :]
            if causal:
                sees = sees & (torch.arange(valid.shape[1], device=valid.device) <= places[:, None])
            # a padding query with nothing to see would be NaN; BOS is always valid, and comes first
            mask = sees[:, None].expand(-1, -1, len(places), -1)
        output = self.language_model.model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=rotary,
            past_key_values=cache,
            use_cache=cache is not None,
            is_causal=causal,
            read=read,
        )
        return output.last_hidden_state

    def logits(self, hidden: Tensor, actions_only: bool) -> Tensor:
        """float32 [...,256] over the action tokens V-256 .. V-1, or [...,vocabulary with padding] over all tokens."""
        weight = self.language_model.lm_head.weight
        if actions_only:
            end = self.architecture.vocabulary
            weight = weight[end - ACTION_TOKENS : end]
        return F.linear(hidden, weight).float()

    @contextmanager
    def caching(self) -> Iterator[None]:
        """Keys and values can be cached; a network in train mode that recomputes activations would lose them."""
        training = self.language_model.training
        self.language_model.eval()
        try:
            yield
        finally:
            self.language_model.train(training)

    def restore_buffers(self) -> None:
        """Build the rotary frequencies anew, float32: no checkpoint holds them."""
        model = self.language_model.model
        model.rotary_emb = type(model.rotary_emb)(model.config, device=self.projector.fc1.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OpenVLANetwork:
        """Moves and casts as any module, but for the rotary frequencies: bfloat16 ones turn far positions by up to a
        radian."""
        super()._apply(fn, recurse)
        if self.language_model.model.rotary_emb.inv_freq.dtype != torch.float32:
            self.restore_buffers()
        return self

    def set_checkpointing(self, on: bool) -> None:
        """Recompute activations in the backward pass."""
        for transformer in (self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer):
            transformer.set_grad_checkpointing(on)
        if on:
            self.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.language_model.gradient_checkpointing_disable()


def adapted_layers(vision: nn.Module) -> list[str]:
    """The layers that OpenVLA-OFT's fine-tuning adapts: linear and convolution, not FiLM's own."""
    return [
        name
        for name, layer in vision.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.endswith((".scale", ".shift"))
    ]

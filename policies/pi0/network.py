"""The network of π₀ and π₀.₅: images and a prompt become a prefix once, the action expert reads it at every denoise
step.

The vision-language model and the expert are two transformers of the same depth, heads and head size; in every layer the
expert's tokens attend to the prefix's keys and values and to their own. The prefix never looks at the expert's tokens,
so nothing of it depends on the noise or the denoise step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl.policies.pi0.gemma import Gemma, GemmaConfig, Past, RMSNorm, Rotary, rotary
from embodied_rl.policies.pi0.siglip import Siglip, SiglipConfig

PERIODS = (4e-3, 4.0)
"""Shortest and longest period of the time embedding."""


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of a π₀ network; the named ones are in `config.py`."""

    vision: SiglipConfig
    language: GemmaConfig
    expert: GemmaConfig
    """Depth, heads and head size as in `language`."""
    vocabulary: int
    """Rows of the token table."""
    action_dim: int
    """D, dimensions of an action (and of π₀'s state), zero padded."""
    adaptive: bool
    """π₀.₅: the time conditions the expert's norms, the state is in the prompt. π₀: the time is mixed into the action
    tokens, the state is a token of the expert."""

    def __post_init__(self) -> None:
        shared = [(gemma.depth, gemma.heads, gemma.kv_heads, gemma.head_dim) for gemma in (self.language, self.expert)]
        if shared[0] != shared[1]:
            raise ValueError("language and expert need the same depth, heads, kv_heads and head_dim")


@dataclass(frozen=True)
class Prefix:
    """An encoded observation of B rows."""

    past: list[Past]
    """What the expert reads, layer by layer."""
    hidden: Tensor
    """[B,P,W] before the language model's last layer."""
    mask: Tensor
    """bool [B,P], False for padding of the prompt and cameras that a row does not have."""
    rotary: Rotary
    state: Tensor | None
    """π₀'s state token [B,1,We]."""
    suffix_rotary: Rotary
    suffix_mask: Tensor
    """bool [B,1,S,P+S]."""


class Network(nn.Module):
    """Velocities of action chunks. Times and velocities follow `policies/flow.py`, which is openpi's convention."""

    def __init__(self, config: NetworkConfig, horizon: int) -> None:
        super().__init__()
        self.config = config
        self.horizon = horizon
        width, condition = config.expert.width, config.expert.width if config.adaptive else None
        self.vision = Siglip(config.vision)
        self.projector = nn.Linear(config.vision.width, config.language.width)
        self.language = Gemma(config.language, config.vocabulary)
        self.expert = Gemma(config.expert, condition=condition)
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        if config.adaptive:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(config.action_dim, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)

    def initialise(self) -> None:
        """Random weights: normal with variance 1 / inputs, zero biases. Adaptive norms start with gates of 0, so that
        every layer of the expert starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        for module in self.modules():
            if isinstance(module, RMSNorm) and module.dense is not None:
                nn.init.zeros_(module.dense.weight)

    def set_checkpointing(self, on: bool) -> None:
        """Compute the layers again in the backward pass instead of keeping what is inside them."""
        self.vision.checkpointing = self.language.checkpointing = self.expert.checkpointing = on

    def encode(
        self,
        images: Mapping[str, Tensor],
        image_masks: Mapping[str, Tensor],
        tokens: Tensor,
        token_mask: Tensor,
        state: Tensor | None,
    ) -> Prefix:
        """Encode images {camera: uint8 [B,S,S,3]} with masks {camera: bool [B]}, a prompt [B,T] with its mask, and π₀'s
        state [B,D]. A camera that no row has may be left out: nothing sees a masked one.

        No gradient is recorded in the vision-language model when none of its parameters is trained.
        """
        parts = (self.vision, self.projector, self.language)
        frozen = not any(parameter.requires_grad for part in parts for parameter in part.parameters())
        suffix = self.horizon + (0 if self.config.adaptive else 1)
        room = 0 if torch.is_grad_enabled() else suffix
        mask = torch.cat(
            [*(image_masks[name][:, None].expand(-1, self.config.vision.tokens) for name in images), token_mask], 1
        )
        key_mask = mask[:, None, None]
        turn = rotary(mask.cumsum(1) - 1, self.config.language.head_dim)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            embedded = torch.cat([*self._embed(images), self.language.embed(tokens)], 1)
            past, hidden = self.language.prefix(embedded, turn, key_mask, room)
        steps = torch.arange(suffix, device=mask.device)
        visible = torch.ones((suffix, suffix), dtype=torch.bool, device=mask.device)
        state_token = None
        if not self.config.adaptive:
            assert state is not None
            state_token = self.state_proj(state.to(self.state_proj.weight.dtype))[:, None]
            visible[0, 1:] = False  # the state does not see the actions
        suffix_mask = torch.cat([key_mask.expand(-1, -1, suffix, -1), visible.expand(len(mask), 1, -1, -1)], -1)
        suffix_rotary = rotary(mask.sum(1, keepdim=True) + steps, self.config.expert.head_dim)
        return Prefix(past, hidden, mask, turn, state_token, suffix_rotary, suffix_mask)

    def output(self, prefix: Prefix) -> Tensor:
        """The vision-language model's own final output [B,P,W], of which the velocity needs nothing."""
        return self.language.output(prefix.hidden, prefix.rotary, prefix.mask[:, None, None])

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(v float32 [B,H,D], the action tokens' final hidden [B,H,We]) at x [B,H,D] and t [B]."""
        actions = self.action_in_proj(x.to(self.action_in_proj.weight.dtype))
        time = time_embedding(t, self.config.expert.width).to(actions.dtype)
        condition = None
        if self.config.adaptive:
            condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time))))
        else:
            both = torch.cat([actions, time[:, None].expand_as(actions)], -1)
            actions = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(both)))
        suffix = actions if prefix.state is None else torch.cat([prefix.state, actions], 1)
        hidden = self.expert.suffix(suffix, prefix.suffix_rotary, prefix.suffix_mask, prefix.past, condition)
        hidden = hidden[:, -self.horizon :]
        return self.action_out_proj(hidden.to(self.action_out_proj.weight.dtype)).float(), hidden

    def _embed(self, images: Mapping[str, Tensor]) -> list[Tensor]:
        """Image tokens [B,tokens,W] of every camera, in one pass."""
        if not images:
            return []
        pixels = torch.cat(list(images.values())).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        features = self.vision(pixels)
        return list(self.projector(features.to(self.projector.weight.dtype)).chunk(len(images)))


def time_embedding(t: Tensor, width: int) -> Tensor:
    """[sin | cos] float32 [B,width] of t [B] at width / 2 periods. The angles need float64: at the shortest period
    float32 moves the velocity by 3e-4."""
    shortest, longest = PERIODS
    share = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=t.device)
    angle = 2 * math.pi * t.double()[:, None] / (shortest * (longest / shortest) ** share)
    return torch.cat([angle.sin(), angle.cos()], -1).float()

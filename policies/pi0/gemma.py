"""Gemma decoder layers (arXiv 2403.08295) that read keys and values from a prefix they do not change, with the plain
RMSNorm or one that is scaled, shifted and gated by a condition (π₀.₅'s action expert)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl.policies.pi0.checkpointing import checkpointed

EPSILON = 1e-6
ROTARY_BASE = 10_000.0

Rotary = tuple[Tensor, Tensor]
"""(cos, sin) float32 [B,1,S,head_dim], the sin of a head's first half negative; see `rotate`."""
KeysValues = tuple[Tensor, Tensor]
"""(keys after rotation, values) [B,kv_heads,S,head_dim]."""


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes of a Gemma transformer."""

    width: int
    """Size of a token."""
    depth: int
    """Layers."""
    mlp: int
    """Hidden size of the layers' MLP."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Heads of keys and values; divides `heads`."""
    head_dim: int
    """Size of a head; even."""


def rotary(positions: Tensor, head_dim: int) -> Rotary:
    """Rotary position embedding (arXiv 2104.09864) of positions [B,S]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() / ROTARY_BASE**exponents
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn [B,heads,S,head_dim] by its positions' angles; the halves of a head are the two coordinates."""
    (cos, sin), wide = rotary, x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight); with a condition x / rms(x) * (1 + scale) + shift, and a gate for the residual branch.
    Computed in float32; returns the input's type."""

    def __init__(self, width: int, condition: int | None) -> None:
        super().__init__()
        if condition is None:
            self.weight = nn.Parameter(torch.zeros(width))
            self.dense = None
        else:
            self.dense = nn.Linear(condition, 3 * width)

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(normed, gate) of x [B,S,W] and condition [B,C]."""
        if self.dense is None or condition is None:
            return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), EPSILON).to(x.dtype), None
        normed = F.rms_norm(x.float(), x.shape[-1:], None, EPSILON)
        modulation = self.dense(condition.to(self.dense.weight.dtype))[:, None]
        scale, shift, gate = modulation.float().chunk(3, -1)
        return (normed * (1 + scale) + shift).to(x.dtype), gate.to(x.dtype)


@dataclass(frozen=True)
class Past:
    """Keys and values of P earlier tokens in one layer, which nothing changes.

    With `room` behind them, calls without gradients write theirs there, so that a denoise step copies none of the P.
    """

    keys: Tensor
    """[B,kv_heads,P+room,head_dim]."""
    values: Tensor
    length: int
    """P."""

    def extended(self, keys: Tensor, values: Tensor) -> KeysValues:
        """The past ones followed by these; overwritten by the next call when gradients are off."""
        end = self.length + keys.shape[2]
        if end == self.keys.shape[2] and not torch.is_grad_enabled():
            self.keys[:, :, self.length :] = keys
            self.values[:, :, self.length :] = values
            return self.keys, self.values
        past = slice(None, self.length)
        return torch.cat([self.keys[:, :, past], keys], 2), torch.cat([self.values[:, :, past], values], 2)

    @staticmethod
    def of(keys: Tensor, values: Tensor, room: int) -> Past:
        """These keys and values, with room for `room` more tokens."""
        length = keys.shape[2]
        if room:
            keys, values = (F.pad(each, (0, 0, 0, room)) for each in (keys, values))
        return Past(keys, values, length)


class Attention(nn.Module):
    """Queries share the heads of keys and values in groups."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        width, queries, keys = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.groups = config.heads // config.kv_heads
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(queries, width, bias=False)

    def keys_values(self, y: Tensor, rotary: Rotary) -> KeysValues:
        """Those of y [B,S,W] itself."""
        return rotate(self._heads(self.k_proj(y)), rotary), self._heads(self.v_proj(y))

    def forward(self, y: Tensor, rotary: Rotary, mask: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What y [B,S,W] finds among keys and values; see `Layer.forward` for the mask."""
        queries = rotate(self._heads(self.q_proj(y)), rotary)
        # those of a group follow each other: one attention of many queries, and no copy of the keys per query head
        grouped = queries.unflatten(1, (-1, self.groups)).flatten(2, 3)
        found = F.scaled_dot_product_attention(grouped, keys, values, mask).reshape(queries.shape)
        return self.o_proj(found.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """Gated by GELU."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer. Parameter names are those of transformers' `GemmaDecoderLayer`."""

    def __init__(self, config: GemmaConfig, condition: int | None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, condition)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, condition)
        self.mlp = MLP(config)

    def keys_values(self, x: Tensor, rotary: Rotary) -> KeysValues:
        """What later tokens read of x [B,S,W], without a condition."""
        return self.self_attn.keys_values(self.input_layernorm(x, None)[0], rotary)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        mask: Tensor,
        condition: Tensor | None = None,
        past: Past | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,S,W] after the layer, and its own keys and values. `mask` bool [B,1,groups*S or 1,P+S] is True where a
        token may look; the P tokens of `past` come first."""
        y, gate = self.input_layernorm(x, condition)
        keys, values = self.self_attn.keys_values(y, rotary)
        seen = (keys, values) if past is None else past.extended(keys, values)
        x = _residual(x, self.self_attn(y, rotary, mask, *seen), gate)
        y, gate = self.post_attention_layernorm(x, condition)
        return _residual(x, self.mlp(y), gate), keys, values


class Gemma(nn.Module):
    """A stack of decoder layers; with a `vocabulary` also the table of token embeddings."""

    def __init__(self, config: GemmaConfig, vocabulary: int | None = None, condition: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embed_tokens = None if vocabulary is None else nn.Embedding(vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config, condition) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, condition)

    @property
    def dtype(self) -> torch.dtype:
        """In which the tokens travel through the layers."""
        return next(layer.self_attn.q_proj.weight.dtype for layer in self.layers if isinstance(layer, Layer))

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B,T] -> [B,T,W], scaled by sqrt(W)."""
        assert self.embed_tokens is not None
        return self.embed_tokens(tokens) * self.config.width**0.5

    def prefix(self, x: Tensor, rotary: Rotary, mask: Tensor, room: int) -> tuple[list[Past], Tensor]:
        """What later tokens read of x [B,P,W] in every layer (with `room` for theirs), and x before the last layer,
        which only `output` goes through."""
        x = x.to(self.dtype)
        past = []
        for layer in self.layers[:-1]:
            x, keys, values = checkpointed(self.checkpointing, layer, x, rotary, mask)
            past.append(Past.of(keys, values, room))
        last = self.layers[-1]
        assert isinstance(last, Layer)
        past.append(Past.of(*last.keys_values(x, rotary), room))
        return past, x

    def output(self, x: Tensor, rotary: Rotary, mask: Tensor) -> Tensor:
        """The last layer and the final norm on what `prefix` returned, [B,P,W]."""
        x, _, _ = checkpointed(self.checkpointing, self.layers[-1], x, rotary, mask)
        return self.norm(x, None)[0]

    def freeze_output(self) -> None:
        """Train nothing that `output` alone needs."""
        last = self.layers[-1]
        assert isinstance(last, Layer)
        attention = last.self_attn
        for part in (attention.q_proj, attention.o_proj, last.post_attention_layernorm, last.mlp, self.norm):
            part.requires_grad_(False)

    def suffix(self, x: Tensor, rotary: Rotary, mask: Tensor, past: list[Past], condition: Tensor | None) -> Tensor:
        """x [B,S,W] after all layers and the final norm, reading `past`; mask bool [B,1,S,P+S]."""
        x, mask = x.to(self.dtype), mask.repeat(1, 1, self.config.heads // self.config.kv_heads, 1)
        for layer, before in zip(self.layers, past, strict=True):
            x, _, _ = checkpointed(self.checkpointing, layer, x, rotary, mask, condition, before)
        return self.norm(x, condition)[0]


def _residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return x + branch if gate is None else x + branch * gate

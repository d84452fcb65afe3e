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
"""(cos, sin) float32 [B,1,S,head_dim/2]."""
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
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn [B,heads,S,head_dim] by its positions' angles; the halves of a head are the two coordinates."""
    (cos, sin), (first, second) = rotary, x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


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
        normed = x.float()
        normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + EPSILON)
        if self.dense is None or condition is None:
            return (normed * (1 + self.weight.float())).to(x.dtype), None
        modulation = self.dense(condition.to(self.dense.weight.dtype))[:, None]
        scale, shift, gate = modulation.float().chunk(3, -1)
        return (normed * (1 + scale) + shift).to(x.dtype), gate.to(x.dtype)


class Layer(nn.Module):
    """One decoder layer. Parameter names are those of transformers' `GemmaDecoderLayer`."""

    def __init__(self, config: GemmaConfig, condition: int | None) -> None:
        super().__init__()
        width, queries, keys = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.groups = config.heads // config.kv_heads
        self.input_layernorm = RMSNorm(width, condition)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(width, queries, bias=False),
                "k_proj": nn.Linear(width, keys, bias=False),
                "v_proj": nn.Linear(width, keys, bias=False),
                "o_proj": nn.Linear(queries, width, bias=False),
            }
        )
        self.post_attention_layernorm = RMSNorm(width, condition)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(width, config.mlp, bias=False),
                "up_proj": nn.Linear(width, config.mlp, bias=False),
                "down_proj": nn.Linear(config.mlp, width, bias=False),
            }
        )

    def keys_values(self, x: Tensor, rotary: Rotary) -> KeysValues:
        """What later tokens read of x [B,S,W] (no condition)."""
        return self._keys_values(self.input_layernorm(x, None)[0], rotary)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        mask: Tensor,
        condition: Tensor | None = None,
        past: Past | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,S,W] after the layer, and its own keys and values. `mask` bool [B,1,S or 1,P+S] is True where a token
        may look; the P tokens of `past` come first."""
        y, gate = self.input_layernorm(x, condition)
        keys, values = self._keys_values(y, rotary)
        all_keys, all_values = (keys, values) if past is None else past.extended(keys, values)
        queries = rotate(self._heads("q_proj", y), rotary)
        found = F.scaled_dot_product_attention(queries, self._shared(all_keys), self._shared(all_values), mask)
        x = _residual(x, self.self_attn["o_proj"](found.transpose(1, 2).flatten(2)), gate)
        y, gate = self.post_attention_layernorm(x, condition)
        hidden = F.gelu(self.mlp["gate_proj"](y), approximate="tanh") * self.mlp["up_proj"](y)
        return _residual(x, self.mlp["down_proj"](hidden), gate), keys, values

    def _keys_values(self, y: Tensor, rotary: Rotary) -> KeysValues:
        return rotate(self._heads("k_proj", y), rotary), self._heads("v_proj", y)

    def _heads(self, name: str, y: Tensor) -> Tensor:
        return self.self_attn[name](y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _shared(self, x: Tensor) -> Tensor:
        """Keys or values as every query head sees them; a view when there is one head of them."""
        return x[:, :, None].expand(-1, -1, self.groups, -1, -1).flatten(1, 2)


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
        return self.layers[0].self_attn["q_proj"].weight.dtype

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B,T] -> [B,T,W], scaled by sqrt(W)."""
        assert self.embed_tokens is not None
        return self.embed_tokens(tokens) * self.config.width**0.5

    def prefix(self, x: Tensor, rotary: Rotary, mask: Tensor, room: int) -> tuple[list[Past], Tensor]:
        """What later tokens read of x [B,P,W] in every layer (with `room` for theirs), and x before the last layer, whose
        own output only `output` needs."""
        x = x.to(self.dtype)
        past = []
        *layers, last = self.layers
        for layer in layers:
            x, keys, values = checkpointed(self.checkpointing, layer, x, rotary, mask)
            past.append(Past.of(keys, values, room))
        past.append(Past.of(*last.keys_values(x, rotary), room))
        return past, x

    def output(self, x: Tensor, rotary: Rotary, mask: Tensor) -> Tensor:
        """The last layer and the final norm on what `prefix` returned, [B,P,W]."""
        x, _, _ = checkpointed(self.checkpointing, self.layers[-1], x, rotary, mask)
        return self.norm(x, None)[0]

    def suffix(self, x: Tensor, rotary: Rotary, mask: Tensor, past: list[Past], condition: Tensor | None) -> Tensor:
        """x [B,S,W] after all layers and the final norm, reading `past`."""
        x = x.to(self.dtype)
        for layer, before in zip(self.layers, past, strict=True):
            x, _, _ = checkpointed(self.checkpointing, layer, x, rotary, mask, condition, before)
        return self.norm(x, condition)[0]


def _residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return x + branch if gate is None else x + branch * gate

"""The transformer blocks of GR00T N1.5's action head. Parameter names are those that diffusers gives its layers, which
the published files use."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl.policies.gr00t.sizes import TransformerConfig
from embodied_rl.policies.pi0.checkpointing import checkpointed

KeysValues = tuple[Tensor, Tensor]
"""What is attended to: keys and values [B,heads,S,head_dim]."""
TIME_CHANNELS = 256
"""Of the sinusoidal embedding of the time."""


class SelfAttentionTransformer(nn.Module):
    """Blocks of self-attention with ordinary norms, over the backbone's features."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.checkpointing = False
        self.transformer_blocks = nn.ModuleList(Block(config, config.width, False) for _ in range(config.depth))

    def forward(self, x: Tensor) -> Tensor:
        """[B,S,W] -> [B,S,W]. No mask: padding is attended to like anything else."""
        for block in self.transformer_blocks:
            x = checkpointed(self.checkpointing, block, x)
        return x


class DiT(nn.Module):
    """Blocks whose first norm is modulated by the time: even ones attend to the features, odd ones to themselves."""

    def __init__(self, config: TransformerConfig, features: int, outputs: int) -> None:
        super().__init__()
        self.checkpointing = False
        self.timestep_encoder = _TimestepEncoder(config.width)
        self.transformer_blocks = nn.ModuleList(
            Block(config, config.width if i % 2 else features, True) for i in range(config.depth)
        )
        self.proj_out_1 = nn.Linear(config.width, 2 * config.width)
        self.proj_out_2 = nn.Linear(config.width, outputs)

    @property
    def cross_blocks(self) -> Iterable[Block]:
        """Those that attend to the features."""
        return (block for block in self.transformer_blocks[::2] if isinstance(block, Block))

    def keys_values(self, features: Tensor) -> list[KeysValues]:
        """What the even blocks attend to, for features [B,S,F]. It does not depend on the time: once is enough."""
        return [block.attn1.keys_values(features) for block in self.cross_blocks]

    def forward(self, x: Tensor, keys_values: list[KeysValues], bucket: Tensor) -> Tensor:
        """[B,T,W] at time buckets int64 [B] -> [B,T,outputs]."""
        time = F.silu(self.timestep_encoder(bucket))  # its only use is behind SiLU
        for i, block in enumerate(self.transformer_blocks):
            x = checkpointed(self.checkpointing, block, x, time, None if i % 2 else keys_values[i // 2])
        shift, scale = self.proj_out_1(time)[:, None].chunk(2, -1)
        return self.proj_out_2(layer_norm(x, 1e-6) * (1 + scale) + shift)


class Block(nn.Module):
    """Attention and an MLP, both residual."""

    def __init__(self, config: TransformerConfig, attended: int, adaptive: bool) -> None:
        """`attended`: the size of the tokens that are attended to. `adaptive`: the first norm has scale and shift from
        the time, the second none; else both are affine."""
        super().__init__()
        self.norm1 = _AdaptiveNorm(config.width) if adaptive else nn.LayerNorm(config.width)
        self.attn1 = _Attention(config, attended)
        self.norm3 = nn.LayerNorm(config.width, elementwise_affine=not adaptive)
        self.ff = _FeedForward(config.width)

    def forward(self, x: Tensor, time: Tensor | None = None, keys_values: KeysValues | None = None) -> Tensor:
        """[B,T,W]; `time` [B,W] when adaptive; `keys_values` None = its own."""
        normed = self.norm1(x) if time is None else self.norm1(x, time)
        x = x + self.attn1(normed, keys_values)
        return x + self.ff(self.norm3(x))


class _AdaptiveNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.linear(time)[:, None].chunk(2, -1)
        return layer_norm(x, 1e-5) * (1 + scale) + shift


class _Attention(nn.Module):
    def __init__(self, config: TransformerConfig, attended: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.to_q = nn.Linear(config.width, config.width)
        self.to_k = nn.Linear(attended, config.width)
        self.to_v = nn.Linear(attended, config.width)
        self.to_out = nn.ModuleList([nn.Linear(config.width, config.width)])

    def keys_values(self, x: Tensor) -> KeysValues:
        return self._split(self.to_k(x)), self._split(self.to_v(x))

    def forward(self, x: Tensor, keys_values: KeysValues | None) -> Tensor:
        keys, values = self.keys_values(x) if keys_values is None else keys_values
        attended = F.scaled_dot_product_attention(self._split(self.to_q(x)), keys, values)
        return self.to_out[0](attended.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # the names net.0.proj and net.2; net.1 is the reference's dropout
        self.net: Any = nn.ModuleDict(
            {"0": nn.ModuleDict({"proj": nn.Linear(width, 4 * width)}), "2": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net["2"](F.gelu(self.net["0"]["proj"](x), approximate="tanh"))


class _TimestepEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder: Any = nn.ModuleDict(
            {"linear_1": nn.Linear(TIME_CHANNELS, width), "linear_2": nn.Linear(width, width)}
        )

    def forward(self, bucket: Tensor) -> Tensor:
        """int64 [B] -> [B,W]."""
        half = TIME_CHANNELS // 2
        angle = sinusoid_angles(bucket, half, half - 1)
        first, second = self.timestep_embedder["linear_1"], self.timestep_embedder["linear_2"]
        time = torch.cat([angle.cos(), angle.sin()], -1).to(first.weight.dtype)
        return second(F.silu(first(time)))


def sinusoid_angles(bucket: Tensor, count: int, spread: int) -> Tensor:
    """float32 [B,count]: bucket * 10000^(-i / spread)."""
    steps = torch.arange(count, dtype=torch.float32, device=bucket.device)
    return bucket.float()[:, None] * torch.exp(-math.log(10_000) / spread * steps)


def layer_norm(x: Tensor, epsilon: float) -> Tensor:
    """Without scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=epsilon)

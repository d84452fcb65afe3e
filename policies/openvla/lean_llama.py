"""transformers' Llama with the same numbers in less time and memory. Norms and gates save their inputs alone for the
backward pass, since the normalised state and the gate's activation are cheap to compute again; the last layer computes
only the positions that are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaModel, LlamaRMSNorm, rotate_half


def make_lean(model: LlamaModel) -> None:
    """Change the class of `model`'s norms, gated layers and last layer; parameters and their names stay."""
    model.layers[-1].__class__ = LeanLastLayer
    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = LeanRMSNorm
        elif type(module) is LlamaMLP and module.config.hidden_act == "silu":
            module.__class__ = LeanMLP


class LeanRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class LeanMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class LeanLastLayer(LlamaDecoderLayer):
    """Passed on by `LlamaModel`: `read`, the positions to compute; all of them are keys and values."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        past_key_values: Any = None,
        is_causal: bool = True,
        read: slice = slice(None),
        **kwargs: Any,
    ) -> Tensor:
        attention: Any = self.self_attn
        normalised = self.input_layernorm(hidden_states)
        turn = [each[:, None] for each in position_embeddings]
        own = [each[:, :, read] for each in turn]
        queries = _rotated(_heads(attention.q_proj(normalised[:, read]), attention), own)
        keys = _rotated(_heads(attention.k_proj(normalised), attention), turn)
        values = _heads(attention.v_proj(normalised), attention)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, attention.layer_idx)
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, read]
        elif is_causal and queries.shape[2] < hidden_states.shape[1]:
            places = torch.arange(keys.shape[2], device=keys.device)
            attention_mask = (places <= places[: hidden_states.shape[1], None][read])[None, None]
        found, _ = sdpa_attention_forward(
            attention, queries, keys, values, attention_mask, scaling=attention.scaling, is_causal=is_causal
        )
        hidden_states = hidden_states[:, read] + attention.o_proj(found.flatten(2))
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def _heads(x: Tensor, attention: Any) -> Tensor:
    return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _rotated(x: Tensor, turn: list[Tensor]) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) by (cos, sin) [B,1,S,head_dim]."""
    return x * turn[0] + rotate_half(x) * turn[1]


class _RMSNorm(torch.autograd.Function):
    """weight * x / rms(x), arXiv 1910.07467; the quotient in float32, the product in x's precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return weight * (x.float() * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normalised = x.float() * scale
        of_weight = (grad * normalised.to(x.dtype)).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad = (grad * weight).float()
        of_x = scale * (grad - normalised * (grad * normalised).mean(-1, keepdim=True))
        return of_x.to(x.dtype), of_weight, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, arXiv 2002.05202."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)

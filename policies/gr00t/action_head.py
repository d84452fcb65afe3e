"""The action head of GR00T N1.5: features of a vision-language model, a state and noisy actions to velocities.

Time here is GR00T's: 0 is noise and 1 the action, and the network sees an integer bucket of it. `network.py` converts
it to the convention of `policies/flow.py`.

The reference trains the head with dropout 0.2; there is none here, because a score needs the function that acted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl.policies.gr00t.sizes import ActionHeadConfig
from embodied_rl.policies.gr00t.transformer import (
    DiT,
    KeysValues,
    SelfAttentionTransformer,
    sinusoid_angles,
)

Embodiment = int | Tensor
"""Which embodiment's weights are used: one for all rows, or int64 [B], one per row (which copies weights per row)."""


@dataclass(frozen=True)
class Context:
    """What the head needs to know of B observations, at any time."""

    keys_values: list[KeysValues]
    """Of the DiT's even blocks."""
    state: Tensor
    """The state's token [B,1,W]."""
    embodiment: Embodiment


class ActionHead(nn.Module):
    """Parameter names are the published ones without "action_head."."""

    def __init__(self, config: ActionHeadConfig) -> None:
        super().__init__()
        self.config = config
        width = config.dit.width
        self.model = DiT(config.dit, config.features, config.hidden)
        self.state_encoder = EmbodimentMLP(config.embodiments, config.state_dim, config.hidden, width)
        self.action_encoder = ActionEncoder(config.embodiments, config.action_dim, width)
        self.action_decoder = EmbodimentMLP(config.embodiments, config.hidden, config.hidden, config.action_dim)
        self.future_tokens = nn.Embedding(config.future_tokens, width)
        self.vlln = nn.LayerNorm(config.features)
        self.vl_self_attention = SelfAttentionTransformer(config.features_attention)
        self.position_embedding = nn.Embedding(config.positions, width)
        nn.init.normal_(self.future_tokens.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def process(self, features: Tensor) -> Tensor:
        """Backbone features [B,S,F] as the DiT attends to them."""
        return self.vl_self_attention(self.vlln(features))

    def context(self, features: Tensor, state: Tensor, embodiment: Embodiment) -> Context:
        """Everything that no denoise step changes, of backbone features [B,S,F] and a state [B,state_dim]. All tokens
        are attended to, padding too: the reference takes a mask and ignores it."""
        keys_values = self.model.keys_values(self.process(features))
        return Context(keys_values, self.state_encoder(state[:, None], embodiment), embodiment)

    def tokens(self, context: Context, x: Tensor, bucket: Tensor) -> Tensor:
        """The DiT's input [B,1+future+H,W]: state, future and action tokens."""
        actions = self.action_encoder(x, bucket, context.embodiment) + self.position_embedding.weight[: x.shape[1]]
        return torch.cat([context.state, self.future_tokens.weight.expand(len(x), -1, -1), actions], 1)

    def forward(self, context: Context, x: Tensor, bucket: Tensor) -> tuple[Tensor, Tensor]:
        """(d action / d time [B,H,D], the DiT's output at the action tokens [B,H,hidden]) at noisy actions x [B,H,D]
        and time buckets int64 [B]."""
        hidden = self.model(self.tokens(context, x, bucket), context.keys_values, bucket)[:, -x.shape[1] :]
        return self.action_decoder(hidden, context.embodiment), hidden


class EmbodimentLinear(nn.Module):
    """A linear layer for every embodiment: y = x W[e] + b[e]."""

    def __init__(self, embodiments: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(embodiments, inputs, outputs))
        nn.init.normal_(self.W, std=0.02)
        self.b = nn.Parameter(torch.zeros(embodiments, outputs))

    def forward(self, x: Tensor, embodiment: Embodiment) -> Tensor:
        """[B,T,inputs] -> [B,T,outputs]."""
        return x @ self.W[embodiment] + self.b[embodiment][..., None, :]


class EmbodimentMLP(nn.Module):
    """Two layers with ReLU between."""

    def __init__(self, embodiments: int, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layer1 = EmbodimentLinear(embodiments, inputs, hidden)
        self.layer2 = EmbodimentLinear(embodiments, hidden, outputs)

    def forward(self, x: Tensor, embodiment: Embodiment) -> Tensor:
        """[B,T,inputs] -> [B,T,outputs]."""
        return self.layer2(F.relu(self.layer1(x, embodiment)), embodiment)


class ActionEncoder(nn.Module):
    """Noisy actions and their time to tokens."""

    def __init__(self, embodiments: int, actions: int, width: int) -> None:
        super().__init__()
        self.W1 = EmbodimentLinear(embodiments, actions, width)
        self.W2 = EmbodimentLinear(embodiments, 2 * width, width)
        self.W3 = EmbodimentLinear(embodiments, width, width)

    def forward(self, x: Tensor, bucket: Tensor, embodiment: Embodiment) -> Tensor:
        """[B,H,D] at buckets [B] -> [B,H,W]."""
        actions = self.W1(x, embodiment)
        half = actions.shape[-1] // 2
        angle = sinusoid_angles(bucket, half, half)
        time = torch.cat([angle.sin(), angle.cos()], -1).to(actions.dtype)
        both = torch.cat([actions, time[:, None].expand_as(actions)], -1)
        return self.W3(F.silu(self.W2(both, embodiment)), embodiment)

"""The network of GR00T N1.5: a backbone that looks and reads once per decision, and an action head for every denoise
step. Time and velocity are converted here to the convention of `policies/flow.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embodied_rl.policies.gr00t.action_head import ActionHead, Context
from embodied_rl.policies.gr00t.eagle import Eagle
from embodied_rl.policies.gr00t.sizes import NetworkConfig


@dataclass(frozen=True)
class Prefix:
    """An encoded observation of B rows."""

    features: Tensor
    """The backbone's [B,T,F]."""
    context: Context
    """The action head's."""


class Network(nn.Module):
    """Parameter names are the published ones: backbone.eagle_model.* and action_head.*."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = nn.ModuleDict({"eagle_model": Eagle(config.backbone)})
        self.action_head = ActionHead(config.head)

    @property
    def eagle(self) -> Eagle:
        """The vision-language model."""
        eagle = self.backbone["eagle_model"]
        assert isinstance(eagle, Eagle)
        return eagle

    def features(self, images: list[Tensor], tokens: Tensor, mask: Tensor) -> Tensor:
        """The backbone's features [B,T,F] of images [uint8 [B,S,S,3]] and a prompt [B,T] with its mask. No gradient is
        recorded when none of its parameters is trained."""
        frozen = not any(parameter.requires_grad for parameter in self.eagle.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            return self.eagle(images, tokens, mask)

    def encode(self, features: Tensor, state: Tensor, embodiment: int) -> Prefix:
        """What the velocity needs of features [B,T,F] and a state [B,state_dim]."""
        dtype = self.action_head.vlln.weight.dtype
        return Prefix(features, self.action_head.context(features.to(dtype), state.to(dtype), embodiment))

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(v float32 [B,H,D], the DiT's output at the action tokens [B,H,hidden]) at x [B,H,D] and t [B]."""
        return flow_velocity(self.action_head, prefix.context, x, t)

    def set_checkpointing(self, on: bool) -> None:
        """Compute the layers again in the backward pass instead of keeping what is inside them."""
        self.eagle.set_checkpointing(on)
        self.action_head.model.checkpointing = self.action_head.vl_self_attention.checkpointing = on


def flow_velocity(head: ActionHead, context: Context, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The head in flow time (1 is noise), where the velocity is noise - action."""
    v, hidden = head(context, x.to(head.vlln.weight.dtype), time_bucket(t, head.config.buckets))
    return -v.float(), hidden


def time_bucket(t: Tensor, buckets: int) -> Tensor:
    """The bucket int64 [B], 0 = noise, that flow times [B] fall into; times beyond the noise are in bucket 0."""
    # 1e-3 of a bucket more: float32 puts 1 - 0.3 a hair below 0.7, hence into the bucket before
    return ((1 - t) * buckets + 1e-3).long().clamp_min(0)

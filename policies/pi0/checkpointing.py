"""Gradient checkpointing of one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpointed(on: bool, layer: nn.Module, *arguments: Any) -> Any:
    """`layer(*arguments)`; when `on` and a gradient is recorded, what is inside is computed again in the backward pass
    instead of being kept."""
    if on and torch.is_grad_enabled():
        return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
    return layer(*arguments)

"""Augmentation of image observations, which belongs to the learner."""

from __future__ import annotations

import torch
from torch import Tensor


def random_shift(inputs: dict[str, Tensor], pixels: int) -> dict[str, Tensor]:
    """Every image uint8 [B,H,W,3] moved by up to `pixels` in both directions, each row by its own draw; its border
    fills what comes in (DrQ, arXiv 2004.13649). Everything else as it is."""
    return {name: _shift(column, pixels) if _is_image(column) else column for name, column in inputs.items()}


def _is_image(column: Tensor) -> bool:
    return column.dtype == torch.uint8 and column.ndim == 4 and column.shape[-1] == 3


def _shift(images: Tensor, pixels: int) -> Tensor:
    rows, height, width, _ = images.shape
    device = images.device
    dy, dx = torch.randint(-pixels, pixels + 1, (2, rows, 1), device=device)
    y = (torch.arange(height, device=device) + dy).clamp(0, height - 1)
    x = (torch.arange(width, device=device) + dx).clamp(0, width - 1)
    row = torch.arange(rows, device=device)[:, None, None]
    return images[row, y[:, :, None], x[:, None, :]]

"""Batch renormalisation for actors and ensembles of critics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MOMENTUM, EPS, R_MAX, D_MAX, WARMUP = 0.99, 1e-3, 3.0, 5.0, 100_000
"""CrossQ's constants (arXiv 1902.05605), as sbx has them."""
TINY = 1e-30
"""Least variance whose root is differentiated: that of a unit which is the same in the whole batch has no gradient."""


class BatchRenorm(nn.Module):
    """Batch renormalisation (arXiv 1702.03275); in an ensemble, with statistics, scale and shift per member.

    Inside `batch_statistics`, for the first `warmup` batches, plain batch normalisation; after that the batch's mean m
    and variance v are corrected towards the running ones, M and V, by what no gradient sees:

        r = sqrt((v + eps) / (V + eps)) in [1/3, 3],  d = (m - M) / sqrt(V + eps) in [-5, 5]
        y = (x - (m - d sqrt(v) / r)) / sqrt(v / r^2 + eps)

    Elsewhere (x - M) / sqrt(V + eps), in train and eval mode alike: a policy scores the same in both.
    """

    mean: Tensor
    variance: Tensor
    steps: Tensor

    def __init__(self, size: int, ensemble: int | None = None, warmup: int = WARMUP) -> None:
        super().__init__()
        shape = (1, size) if ensemble is None else (ensemble, 1, size)
        self.warmup = warmup
        self.learning = False
        self.scale = nn.Parameter(torch.ones(shape))
        self.shift = nn.Parameter(torch.zeros(shape))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """[B,size] or [E,B,size]; the same shape."""
        if not self.learning:
            return torch.addcmul(self.shift, x - self.mean, self.scale * torch.rsqrt(self.variance + EPS))
        mean = x.mean(-2, keepdim=True)
        centred = x - mean
        variance = centred.square().mean(-2, keepdim=True)  # `var_mean` takes ten times as long on a CPU
        r, d = self._corrections(mean, variance)
        offset = d * variance.clamp_min(TINY).sqrt() / r
        scale = self.scale * torch.rsqrt(variance / r.square() + EPS)
        return torch.addcmul(torch.addcmul(self.shift, offset, scale), centred, scale)

    @torch.no_grad()
    def _corrections(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """r and d; moves the running statistics."""
        deviation = (self.variance + EPS).sqrt()
        renormalised = self.steps >= self.warmup  # a tensor: nothing waits for the device
        r = torch.where(renormalised, ((variance + EPS).sqrt() / deviation).clamp(1 / R_MAX, R_MAX), 1.0)
        d = torch.where(renormalised, ((mean - self.mean) / deviation).clamp(-D_MAX, D_MAX), 0.0)
        self.mean.lerp_(mean, 1 - MOMENTUM)
        self.variance.lerp_(variance, 1 - MOMENTUM)
        self.steps += 1
        return r, d


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """What `network` computes here is normalised by the statistics of its batch, which the running ones follow."""
    layers = [layer for layer in network.modules() if isinstance(layer, BatchRenorm)]
    for layer in layers:
        layer.learning = True
    try:
        yield
    finally:
        for layer in layers:
            layer.learning = False

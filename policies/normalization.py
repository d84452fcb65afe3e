"""Dataset statistics and the maps they define between a simulator's units and a network's.

Published policies agree on neither the statistics nor the epsilons, and a wrong one is a silent error of a few
percent; so every convention has a name, and a checkpoint is used with its own.

bounds:    y = 2 (x - low) / (high - low + eps) - 1
mean_std:  y = (x - mean) / (std + eps)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rl.errors import UserError, unknown
from embodied_rl.policies.pretrained import read_json
from embodied_rl.types import Array

Statistics = Mapping[str, Sequence[float] | Array]
"""{"mean", "std", "min", "max", "q01", "q99", "mask"}: as many as the dataset gives, each one number per dimension."""

NAMES = ("mean", "std", "min", "max", "q01", "q99")
CONSTANT = 1e-4
"""A dimension that deviates less than this is taken as constant and only centred."""
PERCENTILE, EXTREME = 2.3263, 3.0
"""Deviations from the mean where a normal distribution has its 99th percentile, and where its extremes are put."""


@dataclass(frozen=True)
class Convention:
    """How one code base turns statistics into a map."""

    statistics: tuple[str, str]
    """("mean", "std"), or (low, high)."""
    epsilon: float
    """Added to the deviation or range where it normalises."""
    inverse_epsilon: float
    """The same where it un-normalises."""
    clip: bool = False
    """Normalised numbers are cut to [-1, 1]."""
    masked: bool = False
    """Dimensions with mask False pass unchanged, both ways."""
    only_zero: bool = False
    """The epsilon replaces a range of exactly 0 and nothing else."""


CONVENTIONS = {
    # openpi, src/openpi/transforms.py: Normalize and Unnormalize
    "openpi_mean_std": Convention(("mean", "std"), 1e-6, 1e-6),
    "openpi_quantile": Convention(("q01", "q99"), 1e-6, 1e-6),
    # lerobot 0.6, processor/normalize_processor.py
    "lerobot_mean_std": Convention(("mean", "std"), 1e-8, 0.0),
    "lerobot_quantile": Convention(("q01", "q99"), 1e-8, 1e-8, only_zero=True),
    "lerobot_min_max": Convention(("min", "max"), 1e-8, 1e-8, only_zero=True),
    # openvla, prismatic/vla/datasets/rlds/utils/data_utils.py and modeling_prismatic.py
    "openvla": Convention(("q01", "q99"), 1e-8, 0.0, clip=True, masked=True),
    # openvla-oft; its proprioception has no mask entry, hence no masked dimension
    "openvla_oft_bounds_q99": Convention(("q01", "q99"), 1e-8, 1e-8, clip=True, masked=True),
    "openvla_oft_bounds": Convention(("min", "max"), 1e-8, 1e-8, clip=True, masked=True),
}


class Normaliser(nn.Module):
    """The two maps of one convention for vectors [...,S]; the identity (but for epsilons) until it is fitted.

    Statistics are float64 and stay so when the module is cast, because bins and round trips depend on the last digits;
    they travel in the state dict.
    """

    statistics: Tensor
    """float64 [6,S], rows named by `NAMES`; NaN where the dataset does not tell."""
    mask: Tensor
    """bool [S], False where a masked convention leaves a dimension alone."""

    def __init__(self, convention: str, size: int) -> None:
        """Raises `UserError` for a name that is not in `CONVENTIONS`."""
        super().__init__()
        if convention not in CONVENTIONS:
            raise unknown("normalisation", convention, CONVENTIONS)
        self.name = convention
        self.convention = CONVENTIONS[convention]
        identity = torch.tensor([0.0, 1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
        self.register_buffer("statistics", identity[:, None].repeat(1, size))
        self.register_buffer("mask", torch.ones(size, dtype=torch.bool))

    def fit(self, statistics: Statistics, source: str) -> None:
        """Use these statistics from now on. Raises `UserError` naming `source` when one that the convention needs is
        missing, has another size or is not finite."""
        size = self.mask.shape[0]
        rows = torch.full((len(NAMES), size), torch.nan, dtype=torch.float64)
        for row, name in zip(rows, NAMES, strict=True):
            if name not in statistics:
                if name in self.convention.statistics:
                    raise UserError(f"{source} has no '{name}', which this policy normalises with")
                continue
            row.copy_(_vector(statistics[name], size, torch.float64, f"{source}, '{name}'"))
            if name in self.convention.statistics and not torch.isfinite(row).all():
                raise UserError(f"{source}: '{name}' is not finite; compute the statistics again")
        mask = statistics.get("mask", [True] * size)
        self.mask.copy_(_vector(mask, size, torch.bool, f"{source}, 'mask'"))
        self.statistics.copy_(rows)

    def fit_moments(self, mean: Array, std: Array) -> None:
        """Use the statistics of a normal distribution with this mean and deviation [S], those of demonstrations."""
        mean, std = np.asarray(mean, np.float64), np.where(np.asarray(std) > CONSTANT, std, 1.0)
        ends = {"min": -EXTREME, "max": EXTREME, "q01": -PERCENTILE, "q99": PERCENTILE}
        moments = {"mean": mean, "std": std, **{name: mean + at * std for name, at in ends.items()}}
        self.fit(moments, "the demonstrations' statistics")

    def fit_bounds(self, low: Sequence[float], high: Sequence[float]) -> None:
        """Map what lies between these bounds [S] to [-1, 1]; bounds that are not finite change nothing."""
        below, above = np.array(low), np.array(high)
        if np.isfinite([below, above]).all():
            moments = {"mean": (above + below) / 2, "std": (above - below) / 2}
            self.fit(moments | {"min": below, "max": above, "q01": below, "q99": above}, "the action bounds")

    def as_dict(self) -> dict[str, list[float]]:
        """The statistics as `fit` takes them."""
        known = {name: row.tolist() for name, row in zip(NAMES, self.statistics, strict=True) if not row.isnan().any()}
        return known if self.mask.all() else known | {"mask": self.mask.tolist()}

    def normalise(self, x: Tensor) -> Tensor:
        """Simulator units -> network units, float64 [...,S]."""
        x = x.double()
        first, spread = self._map(self.convention.epsilon)
        if self.convention.statistics == ("mean", "std"):
            y = (x - first) / spread
        else:
            y = 2 * (x - first) / spread - 1
        if self.convention.clip:
            y = y.clamp(-1, 1)
        return torch.where(self.mask, y, x) if self.convention.masked else y

    def unnormalise(self, y: Tensor) -> Tensor:
        """Network units -> simulator units, float64 [...,S]; differentiable."""
        y = y.double()
        first, spread = self._map(self.convention.inverse_epsilon)
        if self.convention.statistics == ("mean", "std"):
            x = y * spread + first
        else:
            x = 0.5 * (y + 1) * spread + first
        return torch.where(self.mask, x, y) if self.convention.masked else x

    def _map(self, epsilon: float) -> tuple[Tensor, Tensor]:
        """(mean or low, deviation or range) [S]."""
        first, second = (self.statistics[NAMES.index(name)] for name in self.convention.statistics)
        spread = second if self.convention.statistics == ("mean", "std") else second - first
        if self.convention.only_zero:
            return first, torch.where(spread == 0, epsilon, spread)
        return first, spread + epsilon

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Normaliser:
        """Moves between devices as any module, and keeps float64 in a cast."""
        before = self.statistics
        super()._apply(fn, recurse)
        if self.statistics.dtype != before.dtype:
            self.statistics = before.to(self.statistics.device)
        return self


def read_statistics(path: Path, *keys: str) -> dict[str, Any]:
    """The statistics found in the JSON file `path` under `keys`: ("norm_stats", "state") in openpi's norm_stats.json,
    (dataset, "action") in OpenVLA's dataset_statistics.json. Raises `UserError` naming the file and the missing key."""
    found: Any = read_json(path)
    for depth, key in enumerate(keys):
        if not isinstance(found, dict) or key not in found:
            where = " / ".join(keys[:depth])
            has = ", ".join(found) if isinstance(found, dict) else type(found).__name__
            raise UserError(f"{path}{': ' + where if where else ''} has no statistics '{key}'; it has {has or 'none'}")
        found = found[key]
    if not isinstance(found, dict):
        raise UserError(f"{path}: {' / '.join(keys)} is {type(found).__name__}, not statistics by name")
    return found


def _vector(values: Any, size: int, dtype: torch.dtype, source: str) -> Tensor:
    try:
        vector = torch.as_tensor(values, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{source} is not a list of numbers: {error}") from error
    if vector.shape != (size,):
        raise UserError(f"{source} has shape {tuple(vector.shape)}, the policy needs ({size},)")
    return vector

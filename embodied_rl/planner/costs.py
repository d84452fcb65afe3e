"""What the stages of an iteration cost, as straight lines through measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Cost:
    """Seconds of a call for some rows."""

    fixed: float = 0.0
    """However many rows there are."""
    per_row: float = 0.0
    """Of one row on one device (or in one process)."""
    cores: float = 1.0
    """That it keeps busy meanwhile (in each process): less where it waits for a device."""

    def seconds(self, rows: float, devices: float = 1) -> float:
        """Of a call for `rows`, dealt out evenly to `devices`."""
        return self.fixed + self.per_row * rows / devices

    @classmethod
    def fit(cls, rows: Sequence[float], seconds: Sequence[float], cores: float = 1.0) -> Cost:
        """Through measurements of calls for `rows` (on one device), with the least squares of relative errors and no
        negative number. Where all have equally many rows they tell nothing about what is fixed: nothing is."""
        x, y = np.asarray(rows, float), np.asarray(seconds, float)
        ones, slopes = 1 / y, x / y  # divided by what was measured: the shortest call counts as much as the longest
        if np.ptp(x) == 0:
            return cls(0.0, float(slopes.sum() / (slopes @ slopes)), cores)
        (fixed, per_row), *_ = np.linalg.lstsq(np.stack([ones, slopes], 1), np.ones_like(y))
        # The squares are convex: where the best pair has a negative number, the best allowed one has a zero there.
        if per_row < 0:
            fixed, per_row = ones.sum() / (ones @ ones), 0.0
        elif fixed < 0:
            fixed, per_row = 0.0, slopes.sum() / (slopes @ slopes)
        return cls(float(fixed), float(per_row), cores)


@dataclass(frozen=True)
class Memory:
    """Bytes on a device."""

    simulate: int = 0
    """Of one environment; 0 where simulators use no device."""
    infer: int = 0
    """Of a policy that acts."""
    train: int = 0
    """Of a learner: weights, gradients, optimizer, activations. Every device of the learner needs them."""


@dataclass(frozen=True)
class Costs:
    """Of one machine, one simulator, one policy and one algorithm."""

    simulate: Cost
    """A chunk of n environments, from sending the actions to having the observations."""
    infer: Cost
    """A decision for n rows: preparing observations, acting."""
    record: Cost = field(default_factory=Cost)
    """Storing a decision of n rows, which the simulators need not wait for."""
    train: Cost = field(default_factory=Cost)
    """Learning from a batch of n decisions."""
    sync: float = 0.0
    """Seconds to hand weights over to whoever acts."""
    switch: float = 0.0
    """Seconds to move a stage out of the memory of the devices, or back."""
    overlap: float = 1.0
    """How many times longer a process takes for everything while it collects and learns at once, cores aside: its two
    threads share one interpreter."""
    memory: Memory = field(default_factory=Memory)


@dataclass(frozen=True)
class Work:
    """What an iteration has to do."""

    costs: Costs
    rows: int
    """Environments, N."""
    decisions: int
    """Of every environment, H."""
    processes: int = 0
    """That step the environments; 0: the simulators run on the devices."""
    inside: bool = False
    """The simulators are stepped by the process that also infers and trains."""
    learned: int | None = None
    """Decisions that are learned from; none where it is all of them, N H."""

    @property
    def batch(self) -> int:
        """Decisions that are learned from."""
        return self.rows * self.decisions if self.learned is None else self.learned

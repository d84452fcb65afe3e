"""Two sides by turns, their time, work and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

Side = Callable[[], Tensor]
"""Does the work once; returns what both sides must agree on."""


class Bench:
    """Measures on one device and collects what it finds."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device = torch.device(device)
        self.precision: Literal["float32", "bfloat16"] = "float32" if device == "cpu" else "bfloat16"
        self.dtype: torch.dtype = getattr(torch, self.precision)
        self.rounds = rounds
        self.found: dict[str, Any] = {"latency_ms": {}, "tflops": {}, "share_of_peak": {}}
        self._peak = self._matrix_product()

    def compare(self, key: str, ours: Side, theirs: Side, tolerance: float) -> None:
        """Their seconds over ours, the median over the rounds. Raises AssertionError when the results differ, which in
        bfloat16 they do by rounding."""
        results = ours(), theirs()
        if self.dtype == torch.float32:
            torch.testing.assert_close(*results, rtol=0, atol=tolerance)
        pairs = [(self._seconds(ours), self._seconds(theirs)) for _ in range(self.rounds)]
        latency, other = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(theirs / ours for ours, theirs in pairs)
        with FlopCounterMode(display=False) as counter:
            ours()
        rate = counter.get_total_flops() / latency
        print(f"{key:28} ours {1e3 * latency:8.1f} ms   other {1e3 * other:8.1f} ms   ratio {ratio:.2f}", flush=True)
        self.found[key] = round(ratio, 3)
        self.found["latency_ms"][key] = round(1e3 * latency, 2)
        self.found["tflops"][key] = round(rate / 1e12, 4)
        self.found["share_of_peak"][key] = round(rate / self._peak, 3)

    def compare_memory(self, key: str, ours: Side, theirs: Side) -> None:
        """Our peak over theirs, of what a call allocates while gradients already exist."""
        for side in (ours, theirs):
            side()
        peaks = [self._peak_bytes(side) for side in (ours, theirs)]
        print(f"{key:28} ours {peaks[0] / 2**20:8.1f} MiB  other {peaks[1] / 2**20:8.1f} MiB", flush=True)
        self.found[key] = round(peaks[0] / peaks[1], 3)

    def _seconds(self, side: Side) -> float:
        self._wait()
        start = time.perf_counter()
        side()
        self._wait()
        return time.perf_counter() - start

    def _peak_bytes(self, side: Side) -> int:
        """On a CPU from the allocations and releases that torch's profiler records, on a GPU from its allocator."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            side()
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            side()
        assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
        everything: list[Any] = recorded.profiler.kineto_results.events()
        events = [event for event in everything if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak

    def _matrix_product(self) -> float:
        """FLOP/s of the best of five."""
        size = 8192 if self.device.type == "cuda" else 1024
        matrix = torch.randn(size, size, device=self.device, dtype=self.dtype)
        seconds = [self._seconds(lambda: matrix @ matrix) for _ in range(6)]
        return 2 * size**3 / min(seconds[1:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

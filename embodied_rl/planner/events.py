"""How long an iteration takes, by following every call: what closed formulas leave out.

Calls that want the same device, or more cores than there are, all go on and slow each other down in proportion
(processor sharing). Simulators take a random time, episodes end at different decisions, resets come on top.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import numpy as np

from embodied_rl.planner.placement import Placement, Seconds


@dataclass(frozen=True)
class Variation:
    """What is random."""

    spread: float = 0.0
    """Standard deviation / mean of the time of a chunk (gamma distributed)."""
    reset_chance: float = 0.0
    """That an environment of a group resets at a chunk's border."""
    reset_seconds: float = 0.0
    """That this takes, on top of the chunk."""
    tail: float = 0.0
    """Standard deviation / mean of how many decisions a group takes for its share of a batch of whole episodes."""


class Call:
    """Something that takes `seconds` where it has all it `needs` {pool: amount}; its stage is busy meanwhile."""

    def __init__(self, stage: str, seconds: float, needs: dict[str, float]) -> None:
        self.stage, self.left, self.needs = stage, seconds, needs
        self.began = 0.0


Process = Generator[Call, None, None]
"""Yields the calls whose end it waits for."""


class Clock:
    """Calls that run at once share the pools; processes go on when what they wait for ends."""

    def __init__(self, cores: float | None) -> None:
        """There is one of every pool, and so many of the pool "cores"."""
        self.capacity = defaultdict(lambda: 1.0, cores=cores or 1.0)
        self.now = 0.0
        self.busy: dict[str, float] = defaultdict(float)
        """Seconds in which at least one call of a stage ran."""
        self.lasted: dict[str, list[float]] = defaultdict(list)
        """Seconds that each call of a stage took."""
        self._running: list[Call] = []
        self._waiting: dict[Call, list[Process]] = defaultdict(list)

    def start(self, call: Call) -> Call:
        """A call that runs from now on."""
        call.began = self.now
        self._running.append(call)
        return call

    def spawn(self, process: Process) -> Call:
        """A process that runs from now on, as a call that ends when it does."""
        ended = Call("", np.inf, {})

        def whole() -> Process:
            yield from process
            ended.left = 0.0
            self._running.append(ended)

        self._resume(whole())
        return ended

    def run(self) -> None:
        """Until nothing runs."""
        while self._running:
            load: dict[str, float] = defaultdict(float)
            for call in self._running:
                for pool, amount in call.needs.items():
                    load[pool] += amount
            slow = {pool: max(1.0, amount / self.capacity[pool]) for pool, amount in load.items()}
            factors = [max((slow[pool] for pool in call.needs), default=1.0) for call in self._running]
            step = min(call.left * factor for call, factor in zip(self._running, factors, strict=True))
            for stage in {call.stage for call in self._running}:
                self.busy[stage] += step
            self.now += step
            ended, going = [], []
            for call, factor in zip(self._running, factors, strict=True):
                over = call.left * factor <= step * (1 + 1e-12)
                call.left = 0.0 if over else call.left - step / factor
                (ended if over else going).append(call)
            self._running = going
            for call in ended:
                self.lasted[call.stage].append(self.now - call.began)
                for process in self._waiting.pop(call, ()):
                    self._resume(process)

    def _resume(self, process: Process) -> None:
        for call in process:
            if call.left > 0:
                self._waiting[call].append(process)
                return


class Iteration(NamedTuple):
    """A typical one."""

    seconds: float
    busy: dict[str, float]
    """Share of them in which each stage is busy."""
    calls: dict[str, float]
    """Seconds from begin to end of a call of each stage."""


def simulate(
    decisions: int,
    placement: Placement,
    each: Seconds,
    cores: float | None = None,
    variation: Variation | None = None,
    iterations: int = 4,
    seed: int = 0,
) -> Iteration:
    """The mean of `iterations` after the first ones. Without a `variation` everything takes what `each` says."""
    vary, rng = variation or Variation(), np.random.default_rng(seed)
    pools = _pools(placement, each, cores)
    clock = Clock(cores)

    def call(stage: str, seconds: float, group: int = 0) -> Call:
        return Call(stage, seconds, pools(stage, group))

    def chunk(group: int) -> Call:
        shape = 1 / vary.spread**2 if vary.spread else 0.0
        lasts = each.simulate * (rng.gamma(shape, 1 / shape) if shape else 1.0)
        resets = vary.reset_seconds if vary.reset_chance and rng.random() < vary.reset_chance else 0.0
        return call("simulate", lasts + resets, group)

    def collect() -> Process:
        rounds = [
            max(1, round(decisions * (1 + vary.tail * rng.standard_normal()))) if vary.tail else decisions
            for _ in range(placement.groups)
        ]
        chunks: dict[int, Call] = {}
        for decision in range(max(rounds)):
            for group in [group for group, own in enumerate(rounds) if decision < own]:
                if group in chunks:
                    yield chunks[group]
                yield clock.start(call("infer", each.infer))
                chunks[group] = clock.start(chunk(group))
                yield clock.start(call("record", each.record))
        yield from chunks.values()

    def learn() -> Process:
        yield clock.start(call("train", each.train))

    marks: list[tuple[float, dict[str, float]]] = []

    def workflow() -> Process:
        waiting = 0
        for _ in range(iterations + placement.staleness + 1):
            if not waiting:
                yield from collect()
                waiting += 1
            waiting -= 1
            if placement.staleness:
                yield clock.start(call("sync", each.sync))
                learning = clock.spawn(learn())
                while waiting < placement.staleness:
                    yield from collect()
                    waiting += 1
                yield learning
            else:
                yield clock.start(call("switch", each.switch))
                yield from learn()
                yield clock.start(call("sync", each.sync))
            marks.append((clock.now, dict(clock.busy)))

    clock.spawn(workflow())
    clock.run()
    (began, before), (ended, after) = marks[-1 - iterations], marks[-1]
    lasted = ended - began
    shares = {stage: (after[stage] - before.get(stage, 0.0)) / lasted for stage in after if stage}
    calls = {stage: fmean(seconds) for stage, seconds in clock.lasted.items() if stage}
    return Iteration(lasted / iterations, shares, calls)


def _pools(placement: Placement, each: Seconds, cores: float | None) -> Callable[[str, int], dict[str, float]]:
    """What a call of a stage for a group needs: cores, and pools of those devices that do exactly the same."""
    stepping = max(1, len(placement.simulate) // placement.groups)

    def uses(device: int, stage: str, group: int) -> bool:
        if stage == "simulate":
            first = group * stepping % max(1, len(placement.simulate))
            return device in placement.simulate[first : first + stepping]
        return device in (placement.train if stage == "train" else placement.infer)

    calls = [("infer", 0), ("record", 0), ("train", 0), *(("simulate", group) for group in range(placement.groups))]
    devices = {*placement.simulate, *placement.infer, *placement.train}
    kinds = {tuple(uses(device, *call) for call in calls) for device in devices}
    needs = {
        call: {str(kind): 1.0 for kind in kinds if kind[at]} | ({"cores": each.cores[call[0]]} if cores else {})
        for at, call in enumerate(calls)
    }
    return lambda stage, group: needs.get((stage, group), {})

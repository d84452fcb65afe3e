"""Trainings one after the other, faults in each, and what is found."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fault_injection import bookkeeping
from fault_injection.faults import Fault, Injector
from fault_injection.processes import KINDS, MARK, marked, of_kind
from fault_injection.scenarios import SCENARIOS
from fault_injection.training import ENVIRONMENTS, SIMULATORS, Setup, Training

LONGEST = 600.0
"""Seconds that a training gets to start, and to end."""
LIMIT = 30.0
"""Seconds in which every fault must be dealt with."""
DEAD_SIMULATORS = {"simulator", "stopped_simulator"}
STARTING = {"rollout_worker", "stopped_rollout_worker", "node", "learner_rank", "stopped_learner_rank"}
"""Faults after which processes start that import torch, as in a training's start."""
LOSING = DEAD_SIMULATORS | {"rollout_worker", "node", "stopped_rollout_worker", "shared_memory"}
"""Faults that end episodes, so that the numbers after them are others."""


class Campaign:
    """A context manager; nothing that it started is left after it."""

    def __init__(self, folder: Path, seed: int, iterations: int) -> None:
        """`iterations`: of every training."""
        self._folder, self._seed, self._iterations = folder, seed, iterations
        self._rng = random.Random(seed)
        self._marks: list[str] = []
        self._undisturbed: dict[Setup, Training] = {}
        self._starts: dict[str, list[float]] = defaultdict(list)
        """Seconds until the first iteration of trainings, by the name of their setup."""
        self._faults: list[Fault] = []
        self._held: dict[str, list[bool]] = defaultdict(list)
        self._sums: dict[str, int] = defaultdict(int)
        self._broken: list[str] = []

    def __enter__(self) -> Campaign:
        return self

    def __exit__(self, *_: Any) -> None:
        for process in [process for mark in self._marks for process in marked(mark)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)

    def run(self, until: float, only: str = "") -> None:
        """Go through the scenarios whose description contains `only`, again and again; none begins after `until`."""
        chosen = [each for each in SCENARIOS if only in f"{each[0].name}: {' '.join(each[1])}"]
        while chosen:
            for setup, kinds in chosen:
                if time.monotonic() > until:
                    return
                if setup.small_shared_memory and os.geteuid():
                    self._sums["left_out_for_lack_of_root"] += 1
                    continue
                self._disturb(replace(setup, iterations=self._iterations), kinds)

    def _disturb(self, setup: Setup, kinds: list[str]) -> None:
        undisturbed = None if LOSING & set(kinds) else self._compare(setup)
        mark = self._new_mark()
        with _nodes(setup.nodes, mark) as cluster:
            training = self._begin(setup, mark, cluster.address if cluster else None)
            injector = Injector(self._rng, cluster)
            start = training.wait(lambda: bool(training.rows()), LONGEST) or LONGEST
            faults: list[Fault] = []
            for kind in kinds:
                if (fault := injector.inject(kind, training)) is None:
                    break
                if fault.outcome == "resumed" or kind in STARTING:
                    fault.start = min(start, fault.seconds)
                faults.append(fault)
                print(f"  {fault}", flush=True)
                if fault.outcome == "stuck":
                    break
            if all(fault.outcome != "stuck" for fault in faults):
                training.wait(lambda: False, LONGEST)
            found: dict[str, Any] = {"ended": training.finished}
            if training.finished:
                found |= self._check(training, faults)
                if undisturbed is not None:
                    found |= bookkeeping.same(training, undisturbed)
            training.kill()
        self._starts[setup.name].append(start)
        self._faults += faults
        self._note(training, faults, found)

    def _check(self, training: Training, faults: list[Fault]) -> dict[str, Any]:
        dead, rows = sum(fault.kind in DEAD_SIMULATORS for fault in faults), ENVIRONMENTS // SIMULATORS
        found: dict[str, Any] = bookkeeping.once(training, dead * rows)
        found |= bookkeeping.steps(training, dead, rows)
        ended = [fault for fault in faults if fault.kind in LOSING and fault.outcome == "went on"]
        # A simulator that dies at a border, where every episode ends, costs none.
        found["lost_episodes_are_those_of_the_dead"] = all(
            fault.lost == fault.rows or (not fault.lost and fault.kind in DEAD_SIMULATORS) for fault in ended
        )
        found["nothing_else_is_lost"] = not any(fault.lost > 0 for fault in faults if fault.kind not in LOSING)
        found["nothing_left_behind"] = not any(fault.left for fault in faults) and self._gone(training)
        return found

    def _gone(self, training: Training) -> bool:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            left = [each for kind in KINDS for each in of_kind(training.mark, kind)]
            if not (left if training.setup.nodes else marked(training.mark)):
                return True
            time.sleep(0.1)
        return False

    def _note(self, training: Training, faults: list[Fault], found: dict[str, Any]) -> None:
        for name, value in found.items():
            if isinstance(value, bool):
                self._held[name].append(value)
            else:
                self._sums[name] += value
        wrong = [name for name, value in found.items() if value is False]
        said = f"{training.folder.name} {training.setup.name}: {'NOT ' + ', '.join(wrong) if wrong else 'all held'}"
        print(said, flush=True)
        if wrong:
            self._broken.append(f"{said} ({', '.join(fault.kind for fault in faults)})")

    def _compare(self, setup: Setup) -> Training:
        """An undisturbed training of the same seed."""
        if setup not in self._undisturbed:
            training = self._undisturbed[setup] = self._begin(setup, self._new_mark())
            training.wait(lambda: False, LONGEST)
            if not training.finished:
                raise RuntimeError(f"an undisturbed training did not end: {training.log.read_text()[-2000:]}")
            print(f"{training.folder.name} {setup.name}: undisturbed", flush=True)
        return self._undisturbed[setup]

    def _begin(self, setup: Setup, mark: str, address: str | None = None) -> Training:
        return Training(setup, self._folder / f"{len(self._marks):02d}", mark, self._seed, address)

    def _new_mark(self) -> str:
        self._marks.append(secrets.token_hex(8))
        return self._marks[-1]

    def result(self) -> dict[str, Any]:
        """For the JSON object."""
        faults = self._faults
        held = {name: all(values) for name, values in self._held.items()}
        held["dealt_with_in_time"] = all(
            fault.outcome != "stuck" and fault.seconds - fault.start <= LIMIT for fault in faults
        )
        reported = [fault for fault in faults if fault.outcome == "resumed" and fault.kind != "driver"]
        held["every_end_was_reported"] = all(fault.said for fault in reported)
        return {
            "all_held": bool(faults) and all(held.values()),
            "held": held,
            "not_held": self._broken,
            "trainings": len(self._held["ended"]),
            "faults": len(faults),
            "largest_seconds": round(max((fault.seconds for fault in faults), default=0.0), 2),
            "largest_seconds_beyond_start": round(max((f.seconds - f.start for f in faults), default=0.0), 2),
            "by_kind": {kind: _summary(faults, kind) for kind in sorted({fault.kind for fault in faults})},
            "start_seconds": {name: round(statistics.median(seconds), 1) for name, seconds in self._starts.items()},
            **self._sums,
        }


def _summary(faults: list[Fault], kind: str) -> dict[str, Any]:
    mine = [fault for fault in faults if fault.kind == kind]
    seconds = sorted(fault.seconds for fault in mine)
    return {
        "count": len(mine),
        "median_seconds": round(statistics.median(seconds), 2),
        "largest_seconds": round(seconds[-1], 2),
        "largest_seconds_beyond_start": round(max(fault.seconds - fault.start for fault in mine), 2),
        "outcomes": sorted({fault.outcome for fault in mine}),
        "environments_of_the_dead": sum(fault.rows for fault in mine),
        "lost_episodes": sum(fault.lost for fault in mine),
    }


@contextlib.contextmanager
def _nodes(count: int, mark: str) -> Iterator[Any]:
    """A Ray cluster of so many nodes of one processor, which are processes of this machine; None without any."""
    if not count:
        yield None
        return
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # of this process: no file is written
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", MARK: mark}
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(count - 1):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes(180)
        yield cluster
    finally:
        cluster.shutdown()
        del os.environ[MARK]

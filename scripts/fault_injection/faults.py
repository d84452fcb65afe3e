"""The faults. Each is injected into a training that runs and waits until the training has dealt with it.

Dealt with: an iteration is logged that would not be there otherwise, or the process has ended with one line that says
why, after which the training is resumed.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_injection.processes import Process, marked, of_kind
from fault_injection.training import ENVIRONMENTS, SHARED_MEMORY, SIMULATORS, Training

PATIENCE = 240.0
"""Seconds after which a training is taken for stuck for good."""
PAUSE = (2.0, 6.0)
"""Seconds that a slow process stands still."""


@dataclass
class Fault:
    """One that was injected."""

    kind: str
    setup: str
    iteration: int
    """The newest before."""
    seconds: float
    """Until it was dealt with."""
    outcome: str
    """"went on", "resumed", or "stuck"."""
    said: str = ""
    """By a process that ended."""
    rows: int = 0
    """Environments of the dead."""
    lost: int = 0
    """Episodes that the metrics count as lost."""
    start: float = 0.0
    """Seconds of these in which processes of the training started, as they do without faults."""
    left: int = 0
    """Processes of a killed driver that outlived it by more than ten seconds."""


class Injector:
    """Injects them."""

    def __init__(self, rng: random.Random, cluster: Any = None) -> None:
        """`cluster`: the Ray cluster that trainings run on, where it is not their own."""
        self._rng = rng
        self._cluster = cluster

    def inject(self, kind: str, training: Training) -> Fault | None:
        """None where it came too late."""
        time.sleep(self._rng.uniform(0, 2))
        if not training.running or not training.rows():
            return None
        fault = Fault(kind, training.setup.name, int(training.newest("iteration")), 0.0, "")
        return getattr(self, kind)(training, fault)

    def simulator(self, training: Training, fault: Fault) -> Fault | None:
        """SIGKILL of a simulator process."""
        fault.rows = ENVIRONMENTS // SIMULATORS
        return self._kill(training, fault, self._choose(training, "simulator"))

    def rollout_worker(self, training: Training, fault: Fault) -> Fault | None:
        """SIGKILL of a rollout worker on Ray."""
        fault.rows = ENVIRONMENTS // len(of_kind(training.mark, "rollout_worker"))
        return self._kill(training, fault, self._choose(training, "rollout_worker"))

    def learner_rank(self, training: Training, fault: Fault) -> Fault | None:
        """SIGKILL of a learner rank."""
        return self._kill(training, fault, self._choose(training, "learner_rank"))

    def node(self, training: Training, fault: Fault) -> Fault | None:
        """SIGKILL of the raylet of a Ray node that has a rollout worker, but of the first, where the run is."""
        workers = of_kind(training.mark, "rollout_worker")
        head = self._cluster.head_node.all_processes["raylet"][0].process.pid
        nodes = sorted({worker.parent for worker in workers} - {head})
        node = self._rng.choice(nodes)
        theirs = ENVIRONMENTS * sum(worker.parent == node for worker in workers) // len(workers)
        # Where nobody can take the place of the dead, all rows are dealt out anew.
        fault.rows = theirs if training.setup.nodes > len(workers) else ENVIRONMENTS
        return self._kill(training, fault, Process(node, 0, "raylet"))

    def slow_simulator(self, training: Training, fault: Fault) -> Fault | None:
        """SIGSTOP of a simulator process, and SIGCONT a few seconds later."""
        return self._pause(training, fault, self._choose(training, "simulator"))

    def slow_rollout_worker(self, training: Training, fault: Fault) -> Fault | None:
        """SIGSTOP of a rollout worker, and SIGCONT a few seconds later."""
        return self._pause(training, fault, self._choose(training, "rollout_worker"))

    def slow_learner_rank(self, training: Training, fault: Fault) -> Fault | None:
        """SIGSTOP of a learner rank, and SIGCONT a few seconds later."""
        return self._pause(training, fault, self._choose(training, "learner_rank"))

    def stopped_simulator(self, training: Training, fault: Fault) -> Fault | None:
        """SIGSTOP of a simulator process for ever."""
        fault.rows = ENVIRONMENTS // SIMULATORS
        return self._kill(training, fault, self._choose(training, "simulator"), signal.SIGSTOP)

    def stopped_rollout_worker(self, training: Training, fault: Fault) -> Fault | None:
        """SIGSTOP of a rollout worker for ever."""
        fault.rows = ENVIRONMENTS // len(of_kind(training.mark, "rollout_worker"))
        return self._kill(training, fault, self._choose(training, "rollout_worker"), signal.SIGSTOP)

    def stopped_learner_rank(self, training: Training, fault: Fault) -> Fault | None:
        """SIGSTOP of a learner rank for ever."""
        return self._kill(training, fault, self._choose(training, "learner_rank"), signal.SIGSTOP)

    def driver(self, training: Training, fault: Fault) -> Fault | None:
        """SIGKILL of the process that was started by the command line."""
        others = [process.pid for process in marked(training.mark) if process.pid != training.process.pid]
        training.kill()
        deadline = time.monotonic() + 10
        while (left := _alive(training, others)) and time.monotonic() < deadline:
            time.sleep(0.05)
        fault.left = len(left)
        return self._resume(training, fault, 0.0)

    def shared_memory(self, training: Training, fault: Fault) -> Fault | None:
        """/dev/shm is full but for a page for some seconds."""
        filler = Path(f"/proc/{training.process.pid}/root/dev/shm/filler")
        began = time.monotonic()
        try:
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                for _ in range(SHARED_MEMORY // 2**16):  # what it holds, and never more
                    file.write(bytes(2**16))
            training.wait(lambda: False, self._rng.uniform(*PAUSE))
        finally:
            with contextlib.suppress(OSError):  # it went with the training
                filler.unlink()
        return self._wait(training, fault, began, lambda: training.newest("iteration") > fault.iteration + 2)

    def _choose(self, training: Training, kind: str) -> Process | None:
        found = of_kind(training.mark, kind)
        return self._rng.choice(found) if found else None

    def _kill(
        self, training: Training, fault: Fault, victim: Process | None, kind: int = signal.SIGKILL
    ) -> Fault | None:
        if victim is None:
            return None
        names = ("simulator/deaths", "learner/deaths")
        before = [training.newest(name) for name in names]
        lost = training.newest("simulator/lost_episodes")
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, kind)
        found = self._wait(
            training, fault, began, lambda: any(training.newest(n) > b for n, b in zip(names, before, strict=True))
        )
        if fault.outcome == "went on":
            fault.lost = int(training.newest("simulator/lost_episodes") - lost)
        return found

    def _pause(self, training: Training, fault: Fault, victim: Process | None) -> Fault | None:
        if victim is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGSTOP)
            training.wait(lambda: False, self._rng.uniform(*PAUSE))
            os.kill(victim.pid, signal.SIGCONT)
        newest = training.newest("iteration")
        return self._wait(training, fault, time.monotonic(), lambda: training.newest("iteration") > newest + 1)

    def _wait(self, training: Training, fault: Fault, began: float, dealt_with: Callable[[], bool]) -> Fault | None:
        waited = training.wait(dealt_with, PATIENCE)
        fault.seconds = time.monotonic() - began
        if waited is None:
            fault.outcome = "stuck"
            return fault
        if training.running or training.finished:
            if not dealt_with():  # the training was over before
                return None
            fault.outcome = "went on"
            return fault
        fault.said = training.complaint()
        return self._resume(training, fault, fault.seconds)

    def _resume(self, training: Training, fault: Fault, seconds: float) -> Fault:
        began = time.monotonic()
        training.resume()
        waited = training.wait(lambda: bool(training.rows()), PATIENCE)
        fault.outcome = "stuck" if waited is None or not (training.running or training.finished) else "resumed"
        fault.seconds = seconds + time.monotonic() - began
        return fault


def _alive(training: Training, pids: list[int]) -> list[int]:
    return sorted({process.pid for process in marked(training.mark)} & set(pids))

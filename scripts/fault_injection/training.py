"""A training by the command line in a process of its own, and what its files say of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_injection.processes import MARK

from embodied_rl.training import checkpoint
from embodied_rl.training.metrics import FILE, read_metrics

ENVIRONMENTS, SIMULATORS, DECISIONS = 8, 4, 32
BORDER = 10
"""Iterations between checkpoints."""
STEPS = ENVIRONMENTS * DECISIONS
"""Of an iteration."""
RECIPE = (
    "cartpole_ppo --training.evaluate-every 0 --evaluation.episodes 4 --logging.tensorboard false "
    f"--simulator.num-envs {ENVIRONMENTS} --simulator.workers {SIMULATORS} "
    f"--training.decisions-per-iteration {DECISIONS} --training.checkpoint-every {BORDER}"
).split()
SHARED_MEMORY = 600 * 2**20
"""Bytes of the /dev/shm that a training gets to itself where this is filled."""


@dataclass(frozen=True)
class Setup:
    """A way to run the recipe."""

    name: str
    settings: str
    iterations: int = 100
    nodes: int = 0
    """Of the Ray cluster, each with one processor; 0 for none but the training's own."""
    small_shared_memory: bool = False
    """/dev/shm is a small one that no other process sees."""

    @property
    def arguments(self) -> list[str]:
        # Half an iteration less than a whole number: what a dead simulator did not step changes not how many there are.
        budget = STEPS * self.iterations - STEPS // 2
        return [*RECIPE, *self.settings.split(), "--training.env-steps", str(budget)]


class Training:
    """One run and, after it has died, those that resume it."""

    def __init__(self, setup: Setup, folder: Path, mark: str, seed: int, address: str | None = None) -> None:
        """`mark`: of its processes (processes.py). `address`: of the Ray cluster."""
        self.setup, self.folder, self.mark = setup, folder, mark
        self.out, self.learned, self.log = folder / "run", folder / "learned.jsonl", folder / "output.log"
        folder.mkdir(parents=True)
        self._environment = os.environ | {MARK: mark, "FAULTS_LEARNED": str(self.learned)}
        place = [] if address is None else ["--pipeline.ray-address", address]
        self._start(["train", *setup.arguments, *place, "--seed", str(seed), "--out", str(self.out)])

    def resume(self) -> None:
        self._start(["train", "--resume", str(self.out)])

    def _start(self, arguments: list[str]) -> None:
        command = [sys.executable, str(Path(__file__).with_name("trainee.py")), *arguments]
        environment = self._environment
        if self.setup.small_shared_memory:
            environment = environment | {"RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION": "0.01"}
            mount = f"mount -t tmpfs -o size={SHARED_MEMORY} tmpfs /dev/shm"
            command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *command]
        self.began = time.monotonic()
        self._kept = checkpoint.latest(self.out / "checkpoints")
        self._file = self._identity()
        with self.log.open("ab") as log:
            log.write(f"\n--- {' '.join(arguments)}\n".encode())
            log.flush()
            self.printed = log.tell()
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        """At once."""
        self.process.kill()
        self.process.wait()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def finished(self) -> bool:
        return self.process.poll() == 0

    def rows(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl; none as long as the process that runs has not written any."""
        if self._identity() == self._file:
            return []
        kept = int(self._kept.name) if self._kept else 0
        rows = read_metrics(self.out / FILE)
        return rows if rows and rows[-1]["iteration"] > kept else []

    def newest(self, name: str) -> float:
        """In the metrics of the newest iteration; 0 where there is none."""
        rows = self.rows()
        return rows[-1].get(name, 0) if rows else 0

    def wait(self, condition: Callable[[], bool], longest: float) -> float | None:
        """Seconds until `condition` or the end of the process; None when neither comes."""
        began = time.monotonic()
        while time.monotonic() < began + longest:
            if condition() or not self.running:
                return time.monotonic() - began
            time.sleep(0.05)
        return None

    def complaint(self) -> str:
        """What the last process ended with: the line that begins with "error: ", or nothing."""
        with self.log.open("rb") as log:
            log.seek(self.printed)
            lines = log.read().decode(errors="replace").splitlines()
        return next((line for line in lines if line.startswith("error: ")), "")

    def state(self) -> dict[str, Any]:
        """The newest checkpoint."""
        newest = checkpoint.latest(self.out / "checkpoints")
        assert newest, f"{self.out} has no checkpoint"
        return checkpoint.load(newest)

    def _identity(self) -> int | None:
        """Of metrics.jsonl, which every process writes anew."""
        path = self.out / FILE
        return path.stat().st_ino if path.exists() else None

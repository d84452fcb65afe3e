"""What the mjlab adapter costs: chunks through it against mjlab's own `env.step`, in one process, taking turns.

Both step as many environments with the same actions and reset what ends: mjlab within its step, ours at the border of a
chunk. What worker processes add is measured by `transport.py`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

TASKS = ("Mjlab-Cartpole-Balance", "Mjlab-Lift-Cube-Yam")
NUM_ENVS, CHUNK, CHUNKS = 64, 8, 2
"""Chunks per round and side."""
ROUNDS, SMOKE_ROUNDS = 15, 3
TIMEOUT = 1800.0
"""Seconds per task; the first run of a task compiles its kernels."""


def measure(smoke: bool) -> dict[str, Any]:
    """{"mjlab_overhead": by how much stepping through the adapter is slower, a fraction (0.03 = 3 %)}, the mean of
    `TASKS`, and each task's own."""
    import embodied_rl
    from embodied_rl.simulators import interpreters

    overheads: dict[str, float] = {}
    for task in TASKS:
        command = [interpreters.interpreter("mjlab"), "-P", __file__, task, str(SMOKE_ROUNDS if smoke else ROUNDS)]
        environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(embodied_rl.__file__).parent.parent)}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=TIMEOUT)
        if done.returncode:
            raise RuntimeError(f"{task}: {done.stderr[-2000:]}")
        ratio, rate = json.loads(done.stdout.splitlines()[-1])
        overheads[task] = round(ratio - 1, 4)
        print(f"{task}, {NUM_ENVS} environments: {100 * (ratio - 1):+.1f} % over mjlab's own {rate:.0f} steps/s")
    mean = sum(overheads.values()) / len(overheads)
    return {"mjlab_overhead": round(mean, 4), "mjlab_overhead_by_task": overheads}


def compare(task: str, rounds: int) -> tuple[float, float]:
    """Medians over `rounds`: (our seconds over theirs, their steps per second). Runs in mjlab's Python."""
    import torch
    from mjlab.envs import ManagerBasedRlEnv

    from embodied_rl.simulators.chunk import BatchedSimulator
    from embodied_rl.simulators.mjlab import seeded
    from embodied_rl.simulators.mjlab.environment import MjlabEnvironment
    from embodied_rl.simulators.reset_schedule import RandomSchedule

    cfg = seeded.settings(task, NUM_ENVS)
    cfg.auto_reset = True
    plain = ManagerBasedRlEnv(cfg, device="cpu")
    ours = BatchedSimulator(MjlabEnvironment(NUM_ENVS, task), RandomSchedule(0))
    plain.reset()
    ours.reset(tickets=np.arange(NUM_ENVS))
    random = np.random.default_rng(0)
    ratios, rates = [], []
    for index in range(rounds + 1):
        shape = (CHUNKS, NUM_ENVS, CHUNK, ours.action_spec.dim)
        actions = random.uniform(-1, 1, shape).astype(np.float32)
        seconds = {}
        for side in ("plain", "ours") if index % 2 else ("ours", "plain"):
            start = time.perf_counter()
            for i, chunk in enumerate(actions):
                if side == "ours":
                    ours.step(chunk, next_tickets=np.arange(NUM_ENVS) + (index * CHUNKS + i + 1) * NUM_ENVS)
                else:
                    for k in range(CHUNK):
                        plain.step(torch.from_numpy(chunk[:, k].copy()))
            seconds[side] = time.perf_counter() - start
        if index:  # the first round warms up
            ratios.append(seconds["ours"] / seconds["plain"])
            rates.append(NUM_ENVS * CHUNKS * CHUNK / seconds["plain"])
    return statistics.median(ratios), statistics.median(rates)


if __name__ == "__main__":
    print(json.dumps(compare(sys.argv[1], int(sys.argv[2]))))

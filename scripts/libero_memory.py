"""Does a LIBERO worker grow?

One worker process resets through tasks of several suites, more of them than it keeps built, so that scenes are built,
evicted and built again; every episode is observed with both cameras. Prints the worker's resident memory on the way,
and its growth from after the warm-up to the end.

    EMBODIED_RL_LIBERO_ASSETS=... python scripts/libero_memory.py     # ten minutes

The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from embodied_rl.simulators.libero import assets, suites
from embodied_rl.simulators.libero.config import LiberoConfig
from embodied_rl.simulators.reset_schedule import RandomSchedule
from embodied_rl.simulators.workers import WorkerSimulator

SUITES = ("libero_spatial", "libero_object", "libero_10", "libero_90")
PER_SUITE = 2
BUILT = 4
STEPS = 2


def resident(pid: int) -> float:
    """Resident memory of a process, MB."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1000


def chosen() -> tuple[int, ...]:
    """The first tasks of every suite that the assets allow, as numbers of LIBERO-130."""
    every = suites.suite_tasks("libero_130")
    able = [i for i, task in enumerate(every) if not assets.missing(task)]
    return tuple(i for suite in SUITES for i in [i for i in able if every[i].suite == suite][:PER_SUITE])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resets", type=int, default=300)
    parser.add_argument("--warm-up", type=int, default=60)
    parser.add_argument("--image-size", type=int, default=128)
    options = parser.parse_args()
    config = LiberoConfig(
        "libero_130", chosen(), image_size=options.image_size, num_envs=1, workers=1, settle_steps=2, built_tasks=BUILT
    )
    schedule = RandomSchedule(0, config.num_tasks, num_states=config.num_states)
    used: list[float] = []
    with config.build(schedule) as simulator:
        assert isinstance(simulator, WorkerSimulator)
        start = time.perf_counter()
        for ticket in range(options.resets):
            simulator.reset(tickets=np.array([ticket]))
            simulator.step(np.zeros((1, STEPS, 7), np.float32))
            used.append(resident(simulator.pids[0]))
            if (ticket + 1) % 20 == 0:
                seconds = (time.perf_counter() - start) / (ticket + 1)
                print(f"{ticket + 1:4} resets  {used[-1]:6.0f} MB  {seconds:.2f} s per reset", flush=True)
    # Medians: memory goes up and down with what is built at the moment.
    before = statistics.median(used[options.warm_up - 20 : options.warm_up + 20])
    after = statistics.median(used[-40:])
    growth = after / before - 1
    print(f"{config.num_tasks} tasks, {BUILT} kept built: {before:.0f} MB, at the end {after:.0f} MB, {growth:+.1%}")
    print(json.dumps({"libero_memory": {"after_warm_up_mb": before, "end_mb": after, "growth": round(growth, 4)}}))


if __name__ == "__main__":
    main()

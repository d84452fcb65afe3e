"""How much memory does a rollout take beside the images that it collects?

    uv run python scripts/benchmark_memory.py            # a minute
    uv run python scripts/benchmark_memory.py segment    # one way alone

At least 1 GB of uint8 images (two cameras of 224 x 224 x 3) is collected through simulator processes, in a fresh
process per way; the proportional set sizes (PSS) of all processes of the run, of Ray's too, are added up before, during
and after.

    segment, episodes             by rollout workers in the run's process: a segment, whole episodes
    ray_segment, ray_episodes     by two rollout workers on Ray

NAME is the growth over the rollout / bytes of images, NAME_peak the largest growth while it goes on / bytes of images.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WAYS = ("segment", "episodes", "ray_segment", "ray_episodes")
ENVIRONMENTS, WORKERS = 8, 2
LEAST = 10**9
"""Bytes of images."""
BETWEEN = 0.1
"""Seconds between looks at the memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", help=f"default: all of {', '.join(WAYS)}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON object to this file")
    parser.add_argument("--here", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if wrong := set(options.ways) - set(WAYS):
        parser.error(f"unknown way {', '.join(sorted(wrong))}; choose from {', '.join(WAYS)}")
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    if options.here:
        print(json.dumps(measure(options.here)))
        return
    found: dict[str, float] = {}
    for way in options.ways or WAYS:
        command = [sys.executable, __file__, "--here", way]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=900, check=True).stdout
        found |= json.loads(output.splitlines()[-1])
        print(f"{way:14} {found[way]:.2f} after, {found[f'{way}_peak']:.2f} at most", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


def measure(way: str) -> dict[str, float]:
    """Of one rollout, in this process."""
    import torch
    from pipeline_benchmarks.learned import Sleeping
    from pipeline_benchmarks.simulated import CAMERAS, LONGEST, SIZE, SimulatedConfig

    from embodied_rl.config import PipelineConfig
    from embodied_rl.pipeline.executor import collector, start
    from embodied_rl.pipeline.tickets import TicketCounter
    from embodied_rl.simulators.reset_schedule import RandomSchedule
    from embodied_rl.specs import connect

    torch.set_num_threads(1)
    on_ray = way.startswith("ray")
    pipeline = PipelineConfig(executor="ray", rollout_workers=WORKERS) if on_ray else PipelineConfig()
    frame = len(CAMERAS) * SIZE * SIZE * 3
    with start(SimulatedConfig(ENVIRONMENTS, WORKERS, 0.0), pipeline, RandomSchedule(0)) as simulator:
        seen, told = simulator.observation_spec, simulator.action_spec
        policy: Any = Sleeping(seen, told, 0.0, 0.0)
        connection = connect(seen, told, policy.observation_spec, policy.action_spec)
        worker = collector(simulator, policy, connection, seed=0)
        worker.restart(TicketCounter(0))
        worker.collect(2, 0)  # until all has been loaded that will be
        before = memory()
        with looking() as looks:
            if way.endswith("segment"):
                batch: Any = worker.collect(-(-LEAST // (frame * ENVIRONMENTS)), 0)
            else:  # whose episodes are half of the longest in the mean
                batch = worker.collect_episodes(range(int(2.5 * LEAST / (frame * LONGEST))), 0)
        after = memory()
        images = sum(tensor.nbytes for name, tensor in batch.inputs.items() if name.startswith("image."))
        if images < LEAST:
            raise RuntimeError(f"only {images} bytes of images were collected")
    return {way: round((after - before) / images, 3), f"{way}_peak": round((max(looks) - before) / images, 3)}


def memory() -> int:
    """Bytes of this process and of all that it started, directly or not."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents.setdefault(int(path.read_text().rpartition(") ")[2].split()[1]), []).append(int(path.parent.name))
    total, waiting = 0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        waiting += parents.get(pid, [])
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


@contextlib.contextmanager
def looking() -> Iterator[list[int]]:
    """What `memory` is meanwhile."""
    looks, done = [memory()], threading.Event()

    def look() -> None:
        while not done.wait(BETWEEN):
            looks.append(memory())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield looks
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()

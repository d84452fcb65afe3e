"""What the Isaac Lab adapter costs: `WorkerSimulator` over it against Isaac Lab's own `env.step` in a plain loop.

Two processes of Isaac Lab's Python, one a worker of ours and one that runs this file, take turns; each steps the same
number of environments with the same actions while the other one waits. Both reset what ends: Isaac Lab within its step,
ours at the border of a chunk.
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

TASKS = {"Isaac-Cartpole-Direct": 1, "Isaac-Reach-Franka": 7}
"""Task: size of its action."""
NUM_ENVS, CHUNK = 64, 8
CHUNKS = {"Isaac-Cartpole-Direct": 8, "Isaac-Reach-Franka": 3}
"""Per round and side."""
ROUNDS = 15


class PlainLoop:
    """Isaac Lab's own environment, stepped in a process of its own over a pipe."""

    def __init__(self, python: str, assets: Path, task: str) -> None:
        self._process = subprocess.Popen(
            [python, "-P", __file__, task, str(NUM_ENVS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "ISAACSIM_ASSET_ROOT": str(assets)},
        )
        self._answer()

    def seconds(self, steps: int) -> tuple[float, float]:
        """(what `steps` steps took, what the same number of steps of its physics alone took)."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        whole, physics = self._answer()
        return whole, physics

    def close(self) -> None:
        self._process.kill()
        self._process.wait(30)

    def _answer(self) -> list[float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError("the plain loop ended; run this file with Isaac Lab's Python to see why")


def compare(task: str, rounds: int) -> tuple[float, float, float]:
    """Medians over `rounds`: (ours over theirs, their steps per second, bare physics over theirs)."""
    import numpy as np

    from embodied_rl.simulators import interpreters
    from embodied_rl.simulators.isaaclab.config import IsaacLabConfig
    from embodied_rl.simulators.isaaclab.tasks import ASSETS
    from embodied_rl.simulators.reset_schedule import RandomSchedule

    plain = PlainLoop(interpreters.interpreter("isaaclab"), ASSETS, task)
    random, chunks = np.random.default_rng(0), CHUNKS[task]
    shape = (NUM_ENVS, CHUNK, TASKS[task])
    ratios, rates, bare = [], [], []
    with IsaacLabConfig(task, num_envs=NUM_ENVS).build(RandomSchedule(0)) as simulator:
        tickets = np.arange(NUM_ENVS)
        simulator.reset(tickets=tickets)
        # Some chunks first, so that episodes are at different places and rows end at different times.
        for index in range((rounds + 1) * chunks):
            if index % chunks == 0:
                start = time.perf_counter()
            tickets = tickets + NUM_ENVS
            simulator.step(random.uniform(-1, 1, shape).astype(np.float32), next_tickets=tickets)
            if (index + 1) % chunks == 0:
                ours = time.perf_counter() - start
                theirs, physics = plain.seconds(chunks * CHUNK)
                if index > chunks:
                    ratios.append(ours / theirs)
                    rates.append(NUM_ENVS * chunks * CHUNK / theirs)
                    bare.append(physics / theirs)
    plain.close()
    return statistics.median(ratios), statistics.median(rates), statistics.median(bare)


def measure(smoke: bool) -> dict[str, Any]:
    """{"isaaclab_overhead": by how much stepping through the worker is slower, a fraction (0.03 = 3 %)}, the mean of
    `TASKS`, and each task's own."""
    overheads: dict[str, float] = {}
    for task in TASKS:
        ratio, rate, bare = compare(task, 3 if smoke else ROUNDS)
        overheads[task] = round(ratio - 1, 4)
        print(f"{task}, {NUM_ENVS} environments: {100 * (ratio - 1):+.1f} % over Isaac Lab's own {rate:.0f} steps/s")
        print(f"    of which bare physics takes {100 * bare:.0f} %")
    mean = sum(overheads.values()) / len(overheads)
    return {"isaaclab_overhead": round(mean, 4), "isaaclab_overhead_by_task": overheads}


def serve(task: str, num_envs: int) -> None:
    """Answer every line "<steps>" with the seconds that so many steps took, and the physics of so many."""
    import gymnasium
    import torch
    from isaaclab.app import launch_simulation
    from isaaclab_tasks.utils import parse_env_cfg

    cfg: Any = parse_env_cfg(task, device="cpu", num_envs=num_envs, overrides=["physics=newton_mjwarp"])
    cfg.seed = 0
    if getattr(cfg, "commands", None):
        cfg.commands.ee_pose.debug_vis = False
        cfg.observations.policy.enable_corruption = False  # ours has no noise either
    with launch_simulation(cfg, {}):
        env: Any = gymnasium.make(task, cfg=cfg).unwrapped
        env.reset(seed=0)
        size = env.single_action_space.shape[0]
        env.step(torch.zeros(num_envs, size))
        print("answer [0, 0]", flush=True)
        for line in sys.stdin:
            start = time.perf_counter()
            for _ in range(int(line)):
                env.step(2 * torch.rand(num_envs, size) - 1)
            whole = time.perf_counter() - start
            start = time.perf_counter()
            few = max(int(line) // 8, 1)
            for _ in range(few * cfg.decimation):
                env.sim.step(render=False)
            physics = (time.perf_counter() - start) * int(line) / few
            print(f"answer [{whole}, {physics}]", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        serve(sys.argv[1], int(sys.argv[2]))
    else:
        print(measure(smoke="--smoke" in sys.argv))

"""PPO on HalfCheetah-v5 with both cores of a machine: what overlaps, against what computes in two threads."""

from __future__ import annotations

from typing import Any

import torch
from algorithm_benchmarks.measuring import Side, race, repeat
from algorithm_benchmarks.ppo import SEGMENT, ours, stable_baselines3


def measure(rounds: int, smoke: bool) -> dict[str, Any]:
    """Environment steps per second: environments in a process of their own and learning beside collecting (staleness
    1), one thread each; stable-baselines3 with one and with two threads."""
    iterations = 2 if smoke else 4
    steps = iterations * SEGMENT
    workflow, simulator = ours(workers=1, staleness=1)
    with simulator:
        model = stable_baselines3()

        def peer(threads: int) -> None:
            torch.set_num_threads(threads)
            model.learn(steps, reset_num_timesteps=False)
            torch.set_num_threads(1)

        mine = Side(repeat(lambda: workflow.iterate(border=False), iterations), steps)
        others = {f"sb3, {threads} threads": Side(lambda threads=threads: peer(threads), steps) for threads in (1, 2)}
        return race("ppo_two_cores", "steps", mine, others, rounds)

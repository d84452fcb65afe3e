"""PPO on HalfCheetah-v5 with both cores of a machine: what overlaps, against what computes in two threads."""

from __future__ import annotations

from typing import Any

import torch
from algorithm_benchmarks.measuring import Side, race, repeat
from algorithm_benchmarks.ppo import SEGMENT, ours, stable_baselines3

from embodied_rl.config import PipelineConfig
from embodied_rl.pipeline.learner_ranks import LearnerRanks
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.simulators.worker import Specs


def measure(rounds: int, smoke: bool) -> dict[str, Any]:
    """Environment steps per second: learning beside collecting (staleness 1) in a process of its own, one thread each;
    stable-baselines3 with one and with two threads."""
    iterations = 2 if smoke else 4
    steps = iterations * SEGMENT
    workflow, simulator = ours(staleness=1)
    with simulator, LearnerRanks(1, torch.device("cpu")) as learner:
        specs = Specs(simulator.observation_spec, simulator.action_spec, ())
        learner.build(workflow.algorithm, GaussianMLPConfig(), specs, 0, PipelineConfig(learner_process=True))
        learner.take_over(workflow.algorithm)
        model = stable_baselines3()

        def peer(threads: int) -> None:
            torch.set_num_threads(threads)
            model.learn(steps, reset_num_timesteps=False)
            torch.set_num_threads(1)

        mine = Side(repeat(lambda: workflow.iterate(border=False), iterations), steps)
        others = {f"sb3, {threads} threads": Side(lambda threads=threads: peer(threads), steps) for threads in (1, 2)}
        return race("ppo_two_cores", "steps", mine, others, rounds)

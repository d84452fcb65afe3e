"""Rollout workers on Ray for tests, and policies that let them suffer there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from pipeline_toys import Additive
from training_toys import ReachConfig, worker_pids

from embodied_rl.config import PipelineConfig
from embodied_rl.errors import UserError
from embodied_rl.pipeline.executor import collector
from embodied_rl.pipeline.ray_actors import RolloutActors
from embodied_rl.pipeline.ray_rollouts import RayRolloutWorker
from embodied_rl.policies.base import Inputs
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import connect
from embodied_rl.training.streams import Streams
from embodied_rl.types import ActionSample

STREAMS = Streams(3, 1, 4, 4)
CPUS = 0.1
"""Of a rollout worker, so that many fit into the cluster of the tests."""


def on_ray(workers: int, **more: Any) -> PipelineConfig:
    return PipelineConfig(executor="ray", rollout_workers=workers, rollout_cpus=CPUS, **more)


def actors(num_envs: int, workers: int, log_dir: Path | None = None, **pipeline: Any) -> RolloutActors:
    """Reaching, with a simulator process next to every worker."""
    simulator = ReachConfig(num_envs=num_envs, workers=workers)
    return RolloutActors(simulator, on_ray(workers, **pipeline), STREAMS, log_dir)


def ray_worker(simulator: RolloutActors, policy: Any = None) -> RayRolloutWorker:
    seen, told = simulator.observation_spec, simulator.action_spec
    policy = policy or Additive(seen, told)
    connection = connect(seen, told, policy.observation_spec, policy.action_spec)
    worker = collector(simulator, policy, connection, seed=5)
    assert isinstance(worker, RayRolloutWorker)
    return worker


class Suffering(Additive):
    """Does something terrible when it decides for `ticket`, where nobody has left the file `mark` yet."""

    ticket = -2
    mark = Path()
    deed = ""

    def act(self, inputs: Inputs, deterministic: bool = False, noise: RowNoise | None = None) -> ActionSample:
        assert noise is not None
        if self.ticket in noise._key[1] and not self.mark.exists():
            self.mark.touch()
            getattr(self, self.deed)()
        return super().act(inputs, deterministic, noise)

    def dies(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def dies_always(self) -> None:
        self.mark.unlink()
        print("it was too much", flush=True)
        self.dies()

    def loses_its_simulator(self) -> None:
        os.kill(worker_pids()[0], signal.SIGKILL)

    def hangs(self) -> None:
        time.sleep(1000)

    def is_misused(self) -> None:
        raise UserError("this policy wants to be treated well")

    def breaks(self) -> None:
        raise ZeroDivisionError(torch.ones(3))

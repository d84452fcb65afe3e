"""Learning beside collecting: the numbers of one after the other, and every way to end."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
import training_toys
from pipeline_toys import in_groups, make_worker

from embodied_rl.algorithms.base import OnPolicyAlgorithm
from embodied_rl.algorithms.ppo import PPO, PPOConfig
from embodied_rl.pipeline.learning import Beside, Replica
from embodied_rl.pipeline.rollout import RolloutWorker
from embodied_rl.pipeline.tickets import TicketCounter
from embodied_rl.training.on_policy import SegmentWorkflow
from embodied_rl.types import Trajectory

DECISIONS = 5


def ppo(worker: RolloutWorker, staleness: int) -> PPO:
    config = PPOConfig(epochs=2, minibatches=2, critic_warmup=0, staleness=staleness, learning_rate=1e-2)
    return config.build(worker.policy, 0)


def one_after_the_other(worker: RolloutWorker, staleness: int, borders: list[bool]) -> tuple[list[Any], Any]:
    """What `SegmentWorkflow` does, without a thread and without a replica: collect first, then learn."""
    algorithm, generator = ppo(worker, staleness), torch.Generator().manual_seed(7)
    waiting: deque[Trajectory] = deque()
    version, found, tickets = 0, [], TicketCounter(0)
    worker.restart(tickets)
    for border in borders:
        while len(waiting) <= (0 if border else staleness):
            waiting.append(copy.deepcopy(worker.collect(DECISIONS, version)))
        for _ in range(len(waiting) if border else 1):
            batch = waiting.popleft()
            found.append((version - batch.version, algorithm.learn(batch, generator)["policy_loss"]))
            version += 1
        if border:
            worker.restart(tickets)
    return found, worker.policy.state_dict()


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_learning_beside_gives_the_numbers_of_one_after_the_other(staleness: int) -> None:
    borders = [False, False, False, True, True, False, False, True]
    with in_groups(4) as simulator:
        expected, weights = one_after_the_other(make_worker(simulator), staleness, borders)
    with in_groups(2, 2) as simulator:
        worker, tickets, found = make_worker(simulator), TicketCounter(0), []
        algorithm = ppo(worker, staleness)
        learn = algorithm.learn

        def noting(trajectory: Trajectory, generator: torch.Generator) -> Any:
            metrics = learn(trajectory, generator)
            found.append((workflow.version - trajectory.version, metrics["policy_loss"]))
            return metrics

        algorithm.learn = noting  # type: ignore[method-assign]
        workflow = SegmentWorkflow(worker, algorithm, DECISIONS, torch.Generator().manual_seed(7))
        workflow.restart(tickets)
        for border in borders:
            metrics = workflow.iterate(border)
            assert metrics.get("train/staleness", 0) <= staleness
            assert worker.policy is algorithm.policy
            if border:
                assert not workflow.waiting
                workflow.restart(tickets)
    assert found == expected and max(behind for behind, _ in found) == staleness
    assert all(torch.equal(weights[name], tensor) for name, tensor in worker.policy.state_dict().items())


class Learner(OnPolicyAlgorithm):
    staleness = 1
    policy: Any = torch.nn.Linear(1, 1)

    def __init__(self, call: Any) -> None:
        self.call = call

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {}

    def learn(self, trajectory: Trajectory, generator: torch.Generator) -> Any:
        self.call()
        return {}


class Worker:
    """Collects by calling `decide` for every decision."""

    check: Any = None
    intervene = None

    def __init__(self, decide: Any) -> None:
        self.decide, self.segments = decide, 0

    def collect(self, decisions: int, version: int) -> Any:
        self.segments += 1
        for _ in range(decisions if self.segments > 1 else 0):
            self.check()
            self.decide()
        return type("Batch", (), {"version": version, "episodes": []})


def workflow_of(learn: Any, decide: Any, decisions: int = 1) -> SegmentWorkflow:
    return SegmentWorkflow(Worker(decide), Learner(learn), decisions, torch.Generator())  # type: ignore[arg-type]


def test_both_happen_at_once() -> None:
    both = threading.Barrier(2, timeout=20)
    workflow_of(both.wait, both.wait).iterate(border=False)


def explode() -> None:
    raise ZeroDivisionError("the learner broke")


def test_what_the_learner_raises_ends_the_run_at_once_with_its_own_traceback() -> None:
    workflow = workflow_of(explode, lambda: time.sleep(0.001), decisions=20_000)
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="the learner broke") as raised:
        workflow.iterate(border=False)
    assert time.monotonic() - began < 10, "not after the whole segment"
    assert any(frame.name == "explode" for frame in traceback.extract_tb(raised.tb))
    with pytest.raises(ZeroDivisionError):  # also when the segment is there first
        workflow_of(lambda: (time.sleep(0.1), explode()), lambda: None).iterate(border=False)


@pytest.mark.parametrize("waiting", [True, False], ids=["waiting", "collecting"])
def test_ctrl_c_does_not_wait_for_an_update(waiting: bool) -> None:
    learners: list[threading.Thread] = []

    def learn_for_minutes() -> None:
        learners.append(threading.current_thread())
        time.sleep(0.3)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        for _ in range(10_000):
            time.sleep(0.01)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
    try:
        began = time.monotonic()
        workflow = workflow_of(learn_for_minutes, lambda: time.sleep(0 if waiting else 0.01), 1 if waiting else 10**9)
        with pytest.raises(KeyboardInterrupt):
            workflow.iterate(border=False)
    finally:
        signal.signal(signal.SIGINT, before)
    learners[0].join(10)
    assert not any(thread.name == "learner" for thread in threading.enumerate())
    assert time.monotonic() - began < 15
    assert workflow.worker.policy is workflow.algorithm.policy


INTERRUPTED = """
import signal, sys
from dataclasses import replace
from pathlib import Path
import training_toys
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import PipelineConfig
from embodied_rl.training.run import train
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
config = training_toys.on_policy(checkpoint_every=1000, evaluate_every=0)
config = replace(config, algorithm=PPOConfig(epochs=10**7, staleness=1), pipeline=PipelineConfig(env_groups=2))
train(config, Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_ctrl_c_ends_a_run_that_learns_beside_collecting(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(training_toys.__file__).parent)}
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "run")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as child:
        try:
            deadline = time.monotonic() + 120
            while not list((tmp_path / "run" / "checkpoints").glob("*")) and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(3)  # the segments are there; the update goes on
            os.kill(child.pid, signal.SIGINT)
            began = time.monotonic()
            _, error = child.communicate(timeout=60)
        finally:
            child.kill()
    assert time.monotonic() - began < 30
    assert error.rstrip().endswith("KeyboardInterrupt") and "_Stopped" not in error, error


def test_a_batch_that_is_too_old_is_never_learned_from() -> None:
    workflow = workflow_of(lambda: None, lambda: None)
    workflow.iterate(border=False)
    workflow.version += 1
    with pytest.raises(RuntimeError, match="version 2 would learn from what version 0 collected"):
        workflow.iterate(border=False)


def test_a_thread_that_ended_is_left_alone() -> None:
    with pytest.raises(KeyboardInterrupt), Beside(lambda: 5) as beside:
        assert beside.result() == 5
        raise KeyboardInterrupt


def test_a_replica_keeps_its_weights_and_shares_what_is_frozen() -> None:
    policy: Any = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    policy[0].bias.requires_grad_(False)
    replica = Replica(policy)
    assert replica.policy[0].bias is policy[0].bias
    assert replica.policy[0].weight is not policy[0].weight
    before = copy.deepcopy(policy.state_dict())
    with torch.no_grad():
        policy[0].weight.add_(1)
    policy(torch.randn(4, 3))
    assert all(torch.equal(replica.policy.state_dict()[name], value) for name, value in before.items())
    replica.follow()
    assert all(torch.equal(replica.policy.state_dict()[name], value) for name, value in policy.state_dict().items())

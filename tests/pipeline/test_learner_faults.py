"""What goes wrong in a learner rank is told, and nothing waits for ever."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_toys import SPECS, ImpatientConfig, built, learn, segment

from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import PipelineConfig
from embodied_rl.errors import LearnerDied, UserError
from embodied_rl.pipeline.learner_ranks import LearnerRanks
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig

pytestmark = pytest.mark.slow
POLICY = GaussianMLPConfig(chunk=2, hidden=(8,), value_hidden=(8,))
PPO = PPOConfig(epochs=2, minibatches=2, critic_warmup=0)


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def ended(learning: Callable[[LearnerRanks], Any], error: type[Exception], match: str) -> Exception:
    """What comes of it, within 30 seconds of the start of learning, and with no process left."""
    with LearnerRanks(2, torch.device("cpu")) as ranks:
        pids, began = ranks.pids, time.monotonic()
        with pytest.raises(error, match=match) as caught:
            learning(ranks)
        assert time.monotonic() - began < 30
        assert gone(pids)
        with pytest.raises(LearnerDied, match="have ended"):
            ranks.optimizers()
    return caught.value


def test_what_one_rank_raises_is_raised_with_its_traceback() -> None:
    policy = ImpatientConfig(chunk=2, hidden=(8,), value_hidden=(8,))
    batch = segment(built(POLICY, PPO).policy, 0, 0)
    error = ended(lambda ranks: learn(policy, PPO, [batch], ranks), LearnerDied, "learner rank 1 of 2:")
    assert "in evaluate_actions" in str(error) and str(error).endswith("RuntimeError: no more patience\n")


def test_what_a_user_can_fix_is_one_line() -> None:
    batch = segment(built(POLICY, PPO).policy, 0, 0)
    broken = dataclasses.replace(batch, reward=batch.reward * torch.inf)
    error = ended(lambda ranks: learn(POLICY, PPO, [broken], ranks), UserError, "value_loss is nan in update 0")
    assert "\n" not in str(error)


def test_a_rank_that_stands_still_is_noticed() -> None:
    batch = segment(built(POLICY, PPO).policy, 0, 0)

    def learning(ranks: LearnerRanks) -> None:
        os.kill(ranks.pids[1], signal.SIGSTOP)
        learn(POLICY, PPO, [batch], ranks)

    ended(learning, LearnerDied, "learner rank 1 of 2 gave no sign of life for 20 seconds")


OWNER = """
import time, torch
from embodied_rl.pipeline.learner_ranks import LearnerRanks
ranks = LearnerRanks(2, torch.device("cpu"))
print(*ranks.pids, flush=True)
time.sleep(600)
"""


def test_ranks_end_with_the_run() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pids = list(map(int, run.stdout.readline().split()))
        assert len(pids) == 2 and not gone(pids)
        run.kill()
    deadline = time.monotonic() + 10
    while not gone(pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_policy_that_cannot_be_built_elsewhere_is_refused() -> None:
    class Local(GaussianMLPConfig):
        """Of this function."""

    def learning(ranks: LearnerRanks) -> None:
        ranks.build(built(POLICY, PPO), Local(chunk=2), SPECS, 0, PipelineConfig(learners=2))

    ended(learning, UserError, "cannot be imported by other processes")

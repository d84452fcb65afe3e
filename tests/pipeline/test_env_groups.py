"""Groups of environments take turns, and nothing that is collected shows it."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipeline_toys import in_groups, make_worker, same, snapshot
from reach import LIMIT
from simulator_toys import assert_same  # type: ignore[import-not-found]
from training_toys import ReachConfig, off_policy, on_policy

from embodied_rl.config import PipelineConfig, override
from embodied_rl.errors import UserError
from embodied_rl.pipeline.env_groups import EnvGroups, build_simulator
from embodied_rl.pipeline.rollout import RolloutWorker
from embodied_rl.pipeline.tickets import TicketCounter
from embodied_rl.simulators.base import WAIT
from embodied_rl.simulators.check import check
from embodied_rl.training.metrics import read_metrics
from embodied_rl.training.run import train
from embodied_rl.training.streams import Streams

GROUPINGS = [(2, 3), (1, 1, 3), (4, 1)]


def test_groups_keep_the_contract_of_a_simulator() -> None:
    with in_groups(2, 1, 2) as simulator:
        check(simulator)


@pytest.mark.parametrize("observe", ["last", "all"])
def test_groups_do_as_one_simulator_of_all_rows(observe: Any) -> None:
    rng = np.random.default_rng(0)
    with in_groups(5) as whole, in_groups(1, 3, 1) as groups:
        tickets = np.array([4, WAIT, 7, 9, 11])
        assert_same(whole.reset(tickets=tickets), groups.reset(tickets=tickets))
        some = np.array([4, 0, 1])
        for at in range(20):
            actions, following = rng.uniform(-1, 1, (5, 2, 2)), rng.integers(0, 99, 5)
            assert_same(*(each.step(actions, observe, following) for each in (whole, groups)))
            if at == 9:
                assert_same(*(each.reset(some, np.array([70, 71, 72])) for each in (whole, groups)))


@pytest.mark.parametrize("sizes", GROUPINGS, ids=str)
@pytest.mark.parametrize("retry", [0.0, 0.5])
def test_what_is_collected_does_not_depend_on_groups(sizes: tuple[int, ...], retry: float) -> None:
    with in_groups(5) as one, in_groups(*sizes) as several:
        whole, grouped = make_worker(one), make_worker(several)
        counters = TicketCounter(0, retry), TicketCounter(0, retry)
        whole.restart(counters[0])
        grouped.restart(counters[1])
        for version in range(3):
            same(whole.collect(9, version), grouped.collect(9, version))
        assert whole.env_steps == grouped.env_steps > 0
        assert counters[0].state_dict() == counters[1].state_dict()
        same(whole.collect_episodes(range(30, 43), 4), grouped.collect_episodes(range(30, 43), 4))
        same(whole.collect_episodes(range(3), 5), grouped.collect_episodes(range(3), 5))


def test_a_group_is_stepped_while_the_policy_decides_for_another() -> None:
    with in_groups(1, 1) as simulator:
        worker, log = make_worker(simulator), []
        worker.restart(TicketCounter(0))
        for index, group in enumerate(worker.groups):
            for name in ("begin", "finish"):
                method = getattr(group, name)
                setattr(group, name, lambda m=method, n=name, i=index: (log.append((n, i)), m())[1])
        worker.collect(3, version=0)
    turns = [("finish", 0), ("begin", 0), ("finish", 1), ("begin", 1)]
    assert log == [("begin", 0), ("begin", 1), *turns, *turns, ("finish", 0), ("finish", 1)]


def test_processes_of_all_groups_are_real_and_outlived(tmp_path: Path) -> None:
    streams = Streams(3, 1, 4, 4)
    with in_groups(3) as one, build_simulator(ReachConfig(num_envs=3, workers=2), 2, streams, tmp_path) as several:
        assert isinstance(several, EnvGroups) and [group.num_envs for group in several.groups] == [1, 2]
        assert sorted(path.name for path in tmp_path.glob("*/*.log")) == ["worker-0.log"] * 2
        whole, grouped = make_worker(one), make_worker(several)
        for worker in (whole, grouped):
            worker.restart(TicketCounter(0))
        same(whole.collect(LIMIT, 0), grouped.collect(LIMIT, 0))
        last = grouped.groups[1]
        finish, finished = last.finish, []

        def killing_finish() -> Any:
            finished.append(1)
            if len(finished) == 4:
                os.kill(several.groups[1].pids[0], signal.SIGKILL)  # type: ignore[attr-defined]
            return finish()

        last.finish = killing_finish  # type: ignore[method-assign]
        trajectory = grouped.collect(LIMIT, 1)
        lost = trajectory.tickets[3, 1:]
        assert several.deaths == 1 and grouped.lost_episodes == 2
        assert not trajectory.valid[:4, 1:][trajectory.tickets[:4, 1:] == lost].any()
        assert trajectory.valid[:, 0].any(-1).all(), "the other group noticed nothing"


def test_a_segment_that_is_kept_is_not_written_again_and_one_that_is_not_is() -> None:
    with in_groups(2, 2) as simulator:
        worker = make_worker(simulator)
        worker.restart(TicketCounter(0))
        first = worker.collect(4, 0)
        kept, state = snapshot(first), first.inputs["state"][2:]  # a view keeps the memory as well
        address = first.inputs["state"].data_ptr()
        second = worker.collect(4, 1)
        assert all(torch.equal(a, b) for a, b in zip(kept, snapshot(first), strict=True))
        del first
        assert worker.collect(4, 2).inputs["state"].data_ptr() != address
        assert torch.equal(state, kept[0][2:])
        del state
        third = worker.collect(4, 3)
        assert address == third.inputs["state"].data_ptr() != second.inputs["state"].data_ptr()


def test_a_run_in_groups_is_the_run(tmp_path: Path) -> None:
    config = on_policy(env_steps=200)
    train(config, tmp_path / "one")
    train(override(config, ["--pipeline.env-groups", "2"]), tmp_path / "two")
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) > 2 and [row["env_steps"] for row in one] == [row["env_steps"] for row in two]
    for mine, theirs in zip(one, two, strict=True):  # the matrix products of fewer rows may round differently
        for name in ("loss/value_loss", "loss/value", "loss/return"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5)


def test_groups_that_cannot_be_are_refused(tmp_path: Path) -> None:
    streams = Streams(3, 1, 4, 4)
    with pytest.raises(UserError, match=r"env_groups 3 .*simulator\.workers"):
        build_simulator(ReachConfig(workers=2), 3, streams)
    with pytest.raises(UserError, match=r"env_groups 3 .*simulator\.num_envs"):
        build_simulator(ReachConfig(num_envs=2, workers=3), 3, streams)
    with pytest.raises(UserError, match="at least 1, not 0"):
        PipelineConfig(0)
    with pytest.raises(UserError, match="leave it at 1"):
        train(replace(off_policy(), pipeline=PipelineConfig(2)), tmp_path / "run")
    assert isinstance(make_worker(in_groups(2)), RolloutWorker)

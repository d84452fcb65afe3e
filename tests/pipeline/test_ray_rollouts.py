"""Rollout workers on Ray collect what one process does, whatever happens to them. One cluster serves all tests."""

from __future__ import annotations

import ast
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_toys import in_groups, make_worker, same
from ray_toys import STREAMS, Suffering, actors, on_ray, ray_worker
from training_toys import metrics_of, on_policy

import embodied_rl
from embodied_rl.algorithms.grpo import DAPOConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import PipelineConfig
from embodied_rl.errors import SimulatorDied, UserError
from embodied_rl.pipeline import ray_actor, ray_actors
from embodied_rl.pipeline import ray_cluster as ray_cluster_module
from embodied_rl.pipeline.ray_actors import RolloutActors
from embodied_rl.pipeline.ray_cluster import cluster, reserve
from embodied_rl.pipeline.ray_rollouts import RayRolloutWorker
from embodied_rl.pipeline.tickets import TicketCounter
from embodied_rl.training.metrics import MetricLogger, read_metrics
from embodied_rl.training.run import train

ENVIRONMENTS = 5
DAPO = DAPOConfig(group_size=3, groups_per_iteration=2, epochs=1, score="success", further_groups=4, staleness=1)
ASYNC = PPOConfig(epochs=1, minibatches=2, critic_warmup=1, staleness=1)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with cluster(None):
        yield


@pytest.fixture(scope="module")
def two(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutActors]:
    with actors(ENVIRONMENTS, 2, tmp_path_factory.mktemp("logs")) as workers:
        yield workers


def without_rows(batch: Any) -> Any:
    """Which row ran an episode is all that may depend on who did."""
    batch.episodes = [replace(episode, env_id=0) for episode in batch.episodes]
    return batch


def compare(far: RayRolloutWorker, retry: float) -> None:
    with in_groups(ENVIRONMENTS) as simulator:
        near = make_worker(simulator)
        counters = TicketCounter(0, retry), TicketCounter(0, retry)
        for worker, counter in zip((near, far), counters, strict=True):
            worker.restart(counter)
        for version in range(4):
            same(near.collect(9, version), far.collect(9, version))
            with torch.no_grad():
                for worker in (near, far):
                    policy: Any = worker.policy
                    policy.gain += 0.1
            if version == 1:
                for worker, counter in zip((near, far), counters, strict=True):
                    worker.restart(counter)
        assert near.env_steps == far.env_steps > 0
        assert counters[0].state_dict() == counters[1].state_dict()
        for tickets in (range(30, 43), range(1)):
            same(*(without_rows(worker.collect_episodes(tickets, 9)) for worker in (near, far)))


def test_two_workers_collect_what_one_process_collects(two: RolloutActors) -> None:
    compare(ray_worker(two), retry=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "groups"), [(1, 1), (2, 2), (5, 1)])
def test_any_number_of_workers_and_groups_collects_what_one_process_collects(
    workers: int, groups: int, ray_cluster: None
) -> None:
    simulator = replace(on_policy().simulator, num_envs=ENVIRONMENTS, workers=max(workers * groups, 2))
    with RolloutActors(simulator, on_ray(workers, env_groups=groups), STREAMS) as simulators:
        compare(ray_worker(simulators), retry=0.0)


def suffering(simulator: RolloutActors, deed: str, ticket: int, mark: Path) -> RayRolloutWorker:
    policy: Any = Suffering(simulator.observation_spec, simulator.action_spec)
    policy.deed, policy.ticket, policy.mark = deed, ticket, mark
    return ray_worker(simulator, policy)


def test_a_worker_that_dies_loses_its_running_episodes_and_nothing_comes_twice(
    two: RolloutActors, tmp_path: Path
) -> None:
    far, deaths = suffering(two, "dies", 14, tmp_path / "mark"), two.deaths
    pids = two.pids
    counters = TicketCounter(0), TicketCounter(0)
    with in_groups(ENVIRONMENTS) as simulator:
        near = make_worker(simulator)
        near.restart(counters[0])
        far.restart(counters[1])
        segments = [(near.collect(7, version), far.collect(7, version)) for version in range(6)]
    assert (tmp_path / "mark").exists() and two.deaths == deaths + 1
    assert far.lost_episodes == 3, "ticket 14 is of row 4, whose worker has rows 2 to 4"
    assert [a == b for a, b in zip(two.pids, pids, strict=True)] == [True, False]
    assert far.env_steps == sum(int(theirs.valid.sum()) for _, theirs in segments)
    died = next(at for at, (mine, theirs) in enumerate(segments) if not torch.equal(mine.tickets, theirs.tickets))
    for at, (mine, theirs) in enumerate(segments):
        assert theirs.valid.any(-1).all(), "every segment is whole"
        rows = 2 if at >= died else ENVIRONMENTS
        assert torch.equal(mine.reward[:, :rows], theirs.reward[:, :rows]), "the others noticed nothing"
    tickets = torch.cat([theirs.tickets for _, theirs in segments])
    for row in range(ENVIRONMENTS):
        order = tickets[:, row].unique_consecutive()
        assert (order.diff() >= ENVIRONMENTS).all(), "no ticket runs twice"
        assert (order.diff() > ENVIRONMENTS).any() == (row >= 2), "those that were lost do not come back"
    ended = [episode.ticket for _, theirs in segments for episode in theirs.episodes]
    assert len(set(ended)) == len(ended)


@pytest.mark.slow
def test_episodes_of_a_worker_that_dies_are_run_again(two: RolloutActors, tmp_path: Path) -> None:
    far, deaths = suffering(two, "dies", 105, tmp_path / "mark"), two.deaths
    with in_groups(ENVIRONMENTS) as simulator:
        near = make_worker(simulator)
        same(*(without_rows(worker.collect_episodes(range(100, 112), 0)) for worker in (near, far)))
    assert two.deaths == deaths + 1 and far.lost_episodes > 0


@pytest.mark.slow
def test_without_a_place_for_another_worker_those_that_are_left_have_its_environments(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_groups(ENVIRONMENTS) as local, actors(ENVIRONMENTS, 2, tmp_path) as workers:
        near, far = make_worker(local), suffering(workers, "dies", 14, tmp_path / "mark")
        far.restart(TicketCounter(0))
        with monkeypatch.context() as patch:
            patch.setattr(ray_cluster_module, "there", lambda *_: False)
            batches = [far.collect(7, version) for version in range(5)]
        assert (tmp_path / "mark").exists() and workers.rows == {0: slice(0, ENVIRONMENTS)}
        assert (workers.deaths, far.lost_episodes) == (1, ENVIRONMENTS)
        assert far.env_steps == sum(int(batch.valid.sum()) for batch in batches)
        assert all(batch.valid.any(-1).all() for batch in batches), "every segment is whole"
        tickets = torch.cat([batch.tickets for batch in batches])
        for row in tickets.T:
            assert (row.unique_consecutive().diff() >= ENVIRONMENTS).all(), "no ticket runs twice"
        deadline = time.monotonic() + 240
        while not workers.prepare(2):
            assert time.monotonic() < deadline
            far.collect(1, 5)  # goes on meanwhile
        workers.scale(2)
        assert list(workers.rows) == [0, 1] and len(set(workers.pids)) == 2
        for worker in (near, far):
            worker.restart(TicketCounter(10**6))
        same(near.collect(7, 6), far.collect(7, 6))
        same(*(without_rows(worker.collect_episodes(range(30, 43), 7)) for worker in (near, far)))


def test_a_simulator_process_that_dies_next_to_a_worker_is_replaced(two: RolloutActors, tmp_path: Path) -> None:
    far, deaths = suffering(two, "loses_its_simulator", 13, tmp_path / "mark"), two.deaths
    far.restart(TicketCounter(0))
    pids = two.pids
    batches = [far.collect(7, version) for version in range(4)]
    assert two.deaths == deaths + 1 and two.pids == pids and far.lost_episodes == 3
    valid = torch.cat([batch.valid.any(-1) for batch in batches])
    assert valid[:, :2].all() and not valid[:, 2:].all() and valid[-7:].all()


@pytest.mark.parametrize(("deed", "error"), [("is_misused", UserError), ("breaks", ZeroDivisionError)])
def test_what_a_policy_raises_in_a_worker_arrives_as_itself(
    two: RolloutActors, deed: str, error: Any, tmp_path: Path
) -> None:
    far = suffering(two, deed, 3, tmp_path / "mark")
    far.restart(TicketCounter(0))
    with pytest.raises(error) as raised:
        far.collect(4, 0)
    assert type(raised.value) is error and f"in {deed}" in str(raised.value.__cause__), "where it was raised"
    if error is UserError:
        assert str(raised.value) == "this policy wants to be treated well"
    far.restart(TicketCounter(0))
    assert far.collect(4, 0).valid.any(-1).all()


def test_what_is_collected_by_nobody_is_not_waited_for(two: RolloutActors) -> None:
    far = ray_worker(two)

    def check() -> None:
        raise RuntimeError("the learner failed")

    far.restart(TicketCounter(0))
    far.check = check
    with pytest.raises(RuntimeError, match="the learner failed"):
        far.collect(4, 0)


def test_a_cluster_without_room_is_refused_at_once(ray_cluster: None) -> None:
    with pytest.raises(UserError, match=r"3 rollout workers of 500 CPU do not fit into the Ray cluster, which holds 0"):
        reserve(3, 500.0, 0.0)
    with pytest.raises(UserError, match=r"1 rollout workers of 0.5 CPU and 64 GPU do not fit"):
        reserve(1, 0.5, 64.0)
    with pytest.raises(UserError, match="rollout_workers 9 needs as many environments"):
        actors(8, 9)
    with pytest.raises(UserError, match="rollout_workers 4 with env_groups 2 needs 8 environments and processes"):
        actors(8, 4, env_groups=2)
    with pytest.raises(UserError, match="rollout_workers >= 1"):
        PipelineConfig(executor="ray", rollout_workers=0)
    with pytest.raises(UserError, match="set executor"):
        PipelineConfig(rollout_workers=2)


def test_a_run_on_ray_is_the_run(ray_cluster: None, tmp_path: Path) -> None:
    config = on_policy(env_steps=200)
    near = train(config, tmp_path / "near")
    far = train(replace(config, pipeline=on_ray(1)), tmp_path / "far")
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("near", "far")]
    assert len(rows[0]) > 2
    for mine, theirs in zip(*rows, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"wall_seconds"}:
            assert name.startswith("time/") or mine[name] == theirs[name], name
    assert near["evaluations"] == far["evaluations"]
    assert (tmp_path / "far" / "logs" / "rollout-worker-0" / "worker-0.log").exists()


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_ends_the_run_with_its_last_words(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_actors, "MAX_DEATHS", 1)
    with actors(2, 1, tmp_path) as simulator:
        far = suffering(simulator, "dies_always", 0, tmp_path / "mark")
        far.restart(TicketCounter(0))
        with pytest.raises(SimulatorDied, match=r"(?s)2 deaths .*worker 0 \(environments 0-1\).*died.*it was too much"):
            far.collect(3, 0)


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_actors, "LONGEST", 4.0)
    monkeypatch.setattr(ray_actor, "_BEAT", 0.5)
    with actors(2, 1, tmp_path) as simulator:
        far = suffering(simulator, "hangs", 5, tmp_path / "mark")
        far.restart(TicketCounter(0))
        batches = [far.collect(7, version) for version in range(4)]
    assert simulator.deaths == 1 and far.lost_episodes == 2
    assert all(batch.valid.any(-1).all() for batch in batches)


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_replaced(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_actor, "SILENCE", 3.0)
    monkeypatch.setattr(ray_actor, "_BEAT", 0.5)
    with actors(2, 1, tmp_path) as simulator:
        far = suffering(simulator, "hangs", 10**6, tmp_path / "mark")  # that is, not at all
        far.restart(TicketCounter(0))
        far.collect(2, 0)
        os.kill(simulator.pids[0], signal.SIGSTOP)
        batch = far.collect(2, 1)
    assert simulator.deaths == 1 and far.lost_episodes == 2
    assert batch.valid.any(-1).all()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [DAPO, ASYNC], ids=["dapo", "async_ppo"])
def test_a_run_on_ray_that_broke_goes_on_exactly(
    algorithm: Any, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_policy(env_steps=1000, checkpoint_every=2, evaluate_every=3)
    config = replace(config, algorithm=algorithm, pipeline=on_ray(2))
    train(config, tmp_path / "whole")

    def breaking(self: MetricLogger, row: dict[str, Any], log: Any = MetricLogger.log) -> None:
        log(self, row)
        if row.get("iteration") == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricLogger, "log", breaking)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "broken")
    train(config, tmp_path / "broken", resume=True)
    whole, broken = (metrics_of(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("whole", "broken"))
    assert len(whole) > 3 and whole == broken
    assert {row["train/staleness"] for row in whole} == {0, 1}


def test_nothing_imports_ray_before_it_is_asked_for() -> None:
    root = Path(embodied_rl.__file__).parent
    for path in (path for path in root.rglob("*.py") if not path.parent.is_symlink()):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom) and node.col_offset == 0:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not any(name.split(".")[0] == "ray" for name in names), path

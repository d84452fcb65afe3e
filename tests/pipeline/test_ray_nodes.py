"""Rollout workers on several machines: Ray nodes that are processes of this one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pipeline_toys import in_groups, make_worker, same
from ray_toys import STREAMS, ray_worker
from training_toys import ReachConfig

from embodied_rl.config import PipelineConfig
from embodied_rl.errors import UserError
from embodied_rl.pipeline.ray_actors import RolloutActors
from embodied_rl.pipeline.tickets import TicketCounter

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes() -> Iterator[Any]:
    """Three of one processor each."""
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes(180)
        yield cluster
    finally:
        cluster.shutdown()


def test_a_node_that_is_lost_takes_its_worker_and_no_more(nodes: Any) -> None:
    pipeline = PipelineConfig(executor="ray", rollout_workers=2, ray_address=nodes.address)
    simulator = ReachConfig(num_envs=4, workers=2)
    with pytest.raises(UserError, match="4 rollout workers of 1 CPU do not fit into the Ray cluster, which holds 3"):
        RolloutActors(simulator, PipelineConfig(executor="ray", rollout_workers=4, ray_address=nodes.address), STREAMS)
    with in_groups(4) as local, RolloutActors(simulator, pipeline, STREAMS) as actors:
        used = set(actors.nodes)
        assert len(used) == 2, "they spread over nodes"
        near, far = make_worker(local), ray_worker(actors)
        near.restart(TicketCounter(0))
        far.restart(TicketCounter(0))
        batches = [(near.collect(6, 0), far.collect(6, 0))]
        lost = next(node for node in nodes.worker_nodes if node.node_id in used)
        nodes.remove_node(lost, allow_graceful=False)
        batches += [(near.collect(6, version), far.collect(6, version)) for version in (1, 2)]
        assert actors.deaths == 1 and far.lost_episodes == 2
    for _, theirs in batches:
        assert theirs.valid.any(-1).all()
    same = [torch.equal(mine.reward, theirs.reward) for mine, theirs in batches]
    assert same == [True, False, False]


def test_without_a_place_the_others_share_the_environments_until_there_is_one_again(nodes: Any) -> None:
    pipeline = PipelineConfig(executor="ray", rollout_workers=9, elastic=True, ray_address=nodes.address)
    with in_groups(9) as local, RolloutActors(ReachConfig(num_envs=9, workers=9), pipeline, STREAMS) as actors:
        assert len(actors.pids) == 3, "as many as fit"
        near, far = make_worker(local), ray_worker(actors)
        far.restart(TicketCounter(0))
        batches = [far.collect(6, 0)]
        lost = next(node for node in nodes.worker_nodes if node.node_id in actors.nodes)
        nodes.remove_node(lost, allow_graceful=False)
        batches += [far.collect(6, version) for version in (1, 2)]
        assert (len(actors.pids), actors.deaths, far.lost_episodes) == (2, 1, 9)
        assert all(batch.valid.any(-1).all() for batch in batches), "every segment is whole"
        tickets = torch.cat([batch.tickets for batch in batches])
        assert all((row.unique_consecutive().diff() > 0).all() for row in tickets.T), "no ticket runs twice"
        with pytest.raises(UserError, match="3 rollout workers of 1 CPU do not fit into the Ray cluster, which holds"):
            actors.prepare(3)
        nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes(180)
        deadline = time.monotonic() + 240
        while not actors.prepare(3):
            assert time.monotonic() < deadline
            far.collect(2, 3)  # goes on meanwhile
        actors.scale(3)
        for worker in (near, far):
            worker.restart(TicketCounter(10**6))
        same(near.collect(6, 4), far.collect(6, 4))
        assert len(actors.pids) == 3 and actors.deaths == 1


def test_a_cluster_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(UserError, match=r"no Ray cluster answers at pipeline.ray_address 127.0.0.1:1 \(.*refused"):
        RolloutActors(ReachConfig(), PipelineConfig(executor="ray", ray_address="127.0.0.1:1"), STREAMS)

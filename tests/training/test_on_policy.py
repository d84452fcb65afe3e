"""Loops of on-policy algorithms: whole groups, replaced groups, stale batches, and that all of it repeats."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reach import LIMIT
from training_toys import ReachConfig, metrics_of, on_policy, worker_pids

from embodied_rl.algorithms.base import EpisodicAlgorithm
from embodied_rl.algorithms.grpo import DAPOConfig, GRPOConfig, ReinforcePlusPlusConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import RunConfig
from embodied_rl.errors import UserError
from embodied_rl.pipeline.rollout import RolloutWorker
from embodied_rl.pipeline.tickets import TicketCounter
from embodied_rl.specs import connect
from embodied_rl.training.metrics import MetricLogger, read_metrics
from embodied_rl.training.on_policy import EpisodeWorkflow, SegmentWorkflow
from embodied_rl.training.run import train
from embodied_rl.training.streams import Streams
from embodied_rl.types import Episode, EpisodeBatch


class Listening(EpisodicAlgorithm):
    """Groups of three; remembers what it learns from. Groups in `dull` say nothing."""

    group_size = 3
    policy = torch.nn.Linear(1, 1)

    def __init__(self, groups: int, further: int = 0, dull: tuple[int, ...] = (), staleness: int = 0) -> None:
        self.groups_per_iteration, self.further_groups, self.dull = groups, further, dull
        self.staleness = staleness
        self.batches: list[EpisodeBatch] = []

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {}

    def informative(self, episodes: Any) -> np.ndarray:
        return np.array([episode.ticket // 3 not in self.dull for episode in episodes])

    def learn(self, batch: EpisodeBatch, generator: torch.Generator) -> dict[str, float]:
        self.batches.append(batch)
        return {}


class Calls:
    """Collects a decision per episode, and remembers what was asked for."""

    intervene = None

    def __init__(self) -> None:
        self.simulator = SimpleNamespace(num_envs=7)
        self.asked: list[tuple[range, int]] = []

    def restart(self, tickets: TicketCounter) -> None:
        self.asked.append((range(0), -1))

    def collect(self, decisions: int, version: int) -> Any:
        self.asked.append((range(decisions), version))
        return SimpleNamespace(version=version, episodes=[])

    def collect_episodes(self, tickets: range, version: int) -> EpisodeBatch:
        self.asked.append((tickets, version))
        number = torch.tensor(list(tickets))
        episodes = [Episode(ticket, 0, 0, 1, 0.0, False, False, False) for ticket in tickets]
        column = number.float()[:, None]
        return EpisodeBatch({"x": column}, {}, column, column, column >= 0, number, version, episodes)


def loop(algorithm: Any, kind: Any = EpisodeWorkflow) -> tuple[Any, Calls]:
    worker, arguments = Calls(), () if kind is EpisodeWorkflow else (8,)
    workflow = kind(worker, algorithm, *arguments, torch.Generator())
    workflow.restart(TicketCounter(0))
    return workflow, worker


def test_an_iteration_learns_from_whole_groups() -> None:
    algorithm = Listening(groups=2)
    workflow, worker = loop(algorithm)
    for _ in range(2):
        workflow.iterate(border=False)
    assert [tickets for tickets, _ in worker.asked] == [range(6), range(6, 12)]
    assert [batch.tickets.tolist() for batch in algorithm.batches] == [list(range(6)), list(range(6, 12))]


def test_groups_that_say_nothing_are_replaced_until_there_are_enough() -> None:
    algorithm = Listening(groups=3, further=10, dull=(0, 2, 4))
    workflow, worker = loop(algorithm)
    workflow.iterate(border=False)
    # 2 of 3 are missing, and 7 rows hold two groups of three; then one is missing
    assert [len(tickets) // 3 for tickets, _ in worker.asked] == [3, 2, 2]
    assert sorted({ticket // 3 for ticket in algorithm.batches[0].tickets.tolist()}) == [1, 3, 5, 6]
    assert len(algorithm.batches[0].episodes) == 21, "metrics are of all episodes"


def test_the_budget_of_further_groups_is_kept() -> None:
    algorithm = Listening(groups=2, further=3, dull=tuple(range(100)))
    workflow, worker = loop(algorithm)
    workflow.iterate(border=False)
    assert sum(len(tickets) // 3 for tickets, _ in worker.asked) == 2 + 3
    assert len(algorithm.batches[0].tickets) == 0 and len(algorithm.batches[0].episodes) == 15


@pytest.mark.parametrize("kind", [EpisodeWorkflow, SegmentWorkflow])
@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_weights_that_collect_are_as_far_behind_as_they_may(kind: Any, staleness: int) -> None:
    algorithm = Listening(groups=1, staleness=staleness)
    workflow, worker = loop(algorithm, kind)
    for _ in range(6):
        workflow.iterate(border=False)
    learned = [batch.version for batch in algorithm.batches]
    assert learned == [max(0, i - staleness) for i in range(6)]
    workflow.iterate(border=True)
    assert not workflow.waiting, "a border leaves nothing to remember"
    assert len(algorithm.batches) == len([asked for asked in worker.asked if asked[1] >= 0])
    fresh = workflow.version
    workflow.iterate(border=True)
    assert algorithm.batches[-1].version == fresh and workflow.version == fresh + 1


def test_failed_episodes_are_not_attempted_again_in_groups() -> None:
    with pytest.raises(UserError, match="retry_failed"):
        EpisodeWorkflow(Calls(), Listening(1), torch.Generator()).restart(TicketCounter(0, retry=0.5))  # type: ignore[arg-type]


def test_training_tickets_come_in_groups_and_stay_apart_from_the_others() -> None:
    streams = Streams(3, 2, 4, 20, num_states=5, group_size=3)
    states = [streams.state(ticket) for ticket in range(30)]
    groups = [states[i : i + 3] for i in range(0, 30, 3)]
    assert all(group[0] == group[1] == group[2] for group in groups)
    assert len({group[0].seed for group in groups}) == 10
    others = {streams.state(ticket).seed for name in ("development", "test") for ticket in streams.episodes(name)}
    assert others.isdisjoint(state.seed for state in states)
    single = Streams(3, 2, 4, 20, num_states=5)
    assert [single.state(i) for i in range(10)] == [group[0] for group in groups]
    assert [single.state(i) for i in single.episodes("test")] == [streams.state(i) for i in streams.episodes("test")]


def test_whole_episodes_are_collected_also_when_a_worker_dies() -> None:
    config = on_policy()
    with replace(ReachConfig(), num_envs=5).build(Streams(3, 1, 4, 4, group_size=4)) as simulator:
        policy = config.policy.build(simulator.observation_spec, simulator.action_spec)
        connection = connect(
            simulator.observation_spec, simulator.action_spec, policy.observation_spec, policy.action_spec
        )
        worker = RolloutWorker(simulator, policy, connection, seed=5)
        begin, begun = worker.begin, []

        def killing_begin(*args: Any, **kwargs: Any) -> None:
            begin(*args, **kwargs)
            begun.append(1)
            if len(begun) == 3:
                os.kill(worker_pids()[0], signal.SIGKILL)

        batch = worker.collect_episodes(range(12), version=4)
        worker.begin = killing_begin  # type: ignore[method-assign]
        again = worker.collect_episodes(range(12), version=4)
    assert simulator.deaths == 1 and worker.lost_episodes > 0
    for found in (batch, again):
        assert [episode.ticket for episode in found.episodes] == found.tickets.unique_consecutive().tolist()
        assert [episode.ticket for episode in found.episodes] == list(range(12))
        for episode in found.episodes:
            mine = found.tickets == episode.ticket
            assert int(found.valid[mine].sum()) == episode.length <= LIMIT
            assert bool(found.valid[mine].any(1).all()), "rows that wait cost no memory"
            assert float(found.reward[mine].sum()) == pytest.approx(episode.episode_return, rel=1e-5)
    first = {ticket: batch.inputs["state"][batch.tickets == ticket][0].tolist() for ticket in range(12)}
    for ticket in range(12):
        assert (first[ticket] == first[ticket // 4 * 4]) and (first[ticket] != first[(ticket + 4) % 12])
    for ticket in range(12):  # the same noise, whatever was run before
        states = [found.inputs["state"][found.tickets == ticket] for found in (batch, again)]
        assert torch.equal(*states)


def run_with(algorithm: Any, **changes: Any) -> RunConfig:
    return replace(on_policy(**changes), algorithm=algorithm)


SMALL = {"group_size": 3, "groups_per_iteration": 2, "epochs": 1, "minibatches": 2, "learning_rate": 1e-3}
DAPO = DAPOConfig(**SMALL, score="success", further_groups=4, staleness=1, kl_coefficient=0.1)
ASYNC = PPOConfig(epochs=1, minibatches=2, critic_warmup=1, staleness=1, clip_low=0.3, clip_high=0.3)


@pytest.mark.parametrize(("algorithm", "steps"), [(DAPO, 1000), (ASYNC, 400)], ids=["dapo", "async_ppo"])
def test_a_run_that_broke_goes_on_exactly(
    algorithm: Any, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_with(algorithm, env_steps=steps, checkpoint_every=2, evaluate_every=3)
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


@pytest.mark.parametrize("staleness", [1, 3])
def test_every_batch_that_was_collected_is_learned_from(
    staleness: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: dict[str, list[int]] = {"collect": [], "_improve": []}

    def note(name: str, call: Any) -> None:
        def noting(self: Any, *batch: Any) -> Any:
            result = call(self, *batch)
            batches[name].append((batch or (result,))[0].version)
            return result

        monkeypatch.setattr(SegmentWorkflow, name, noting)

    note("collect", SegmentWorkflow.collect)
    note("_improve", SegmentWorkflow._improve)
    train(run_with(replace(ASYNC, staleness=staleness), evaluate_every=0, checkpoint_every=4), tmp_path / "run")
    assert len(batches["collect"]) % 4, "the last ones lie beyond the last checkpoint"
    assert batches["_improve"] == batches["collect"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [
        GRPOConfig(granularity="action", mean_over="episodes"),
        DAPOConfig(granularity="action"),
        ReinforcePlusPlusConfig(granularity="action"),
        ReinforcePlusPlusConfig(
            granularity="action", advantage="reinforce++_baseline", group_size=8, groups_per_iteration=8
        ),
    ],
    ids=["grpo", "dapo", "reinforce++", "reinforce++_baseline"],
)
def test_success_rises_by_half_of_the_episodes(algorithm: Any, tmp_path: Path) -> None:
    algorithm = replace(algorithm, score="success", learning_rate=1e-3, epochs=3, minibatches=4)
    config = run_with(algorithm, env_steps=60_000, evaluate_every=0, checkpoint_every=1000)
    config = replace(config, simulator=ReachConfig(num_envs=16), evaluation=replace(config.evaluation, episodes=100))
    result = train(config, tmp_path / "run")
    assert result["final_success"] >= result["initial_success"] + 0.5, result["evaluations"]

"""The bookkeeping of the rollout worker and of what the workflows make of it, on a toy task in real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reach import LIMIT
from training_toys import ReachConfig, off_policy, on_policy, worker_pids

from embodied_rl.data.replay_buffer import ReplayBuffer
from embodied_rl.errors import UserError
from embodied_rl.pipeline.rollout import Decision, RolloutWorker
from embodied_rl.pipeline.tickets import TicketCounter
from embodied_rl.randomness import RowNoise
from embodied_rl.simulators.base import WAIT
from embodied_rl.specs import connect
from embodied_rl.training.on_policy import SegmentWorkflow
from embodied_rl.training.streams import Streams
from embodied_rl.training.workflows import OffPolicyWorkflow
from embodied_rl.types import Observation

STREAMS = Streams(3, 1, 4, 4)


def make_worker(config: Any, **simulator: Any) -> RolloutWorker:
    built = replace(ReachConfig(), **simulator).build(STREAMS)
    torch.manual_seed(0)
    policy = config.policy.build(built.observation_spec, built.action_spec)
    connection = connect(built.observation_spec, built.action_spec, policy.observation_spec, policy.action_spec)
    return RolloutWorker(built, policy, connection, seed=5)


@pytest.fixture
def worker() -> Iterator[RolloutWorker]:
    made = make_worker(on_policy())
    with made.simulator:
        made.restart(TicketCounter(0))
        yield made


@pytest.fixture
def off_policy_worker() -> Iterator[RolloutWorker]:
    made = make_worker(off_policy())
    with made.simulator:
        made.restart(TicketCounter(0))
        yield made


def test_noise_of_a_row_is_one_philox_stream_keyed_by_seed_ticket_and_decision() -> None:
    tickets, decisions = np.array([0, 2**41 + 5, WAIT]), np.array([3, 0, 7])
    noise = RowNoise(11, tickets, decisions).copies(2)
    drawn = noise.normal(2), noise.integers(9), noise.uniform(3), noise.normal(1)
    for row in range(6):
        key = np.array([11, tickets[row // 2]]).view(np.uint64)
        counter = np.array([0, decisions[row // 2], row % 2, 0], np.uint64)
        stream = np.random.Generator(np.random.Philox(key=key, counter=counter))
        alone: list[Any] = [stream.standard_normal(2, dtype=np.float32), stream.integers(9)]
        alone += [stream.random(3, dtype=np.float32), stream.standard_normal(1, dtype=np.float32)]
        for batch, expected in zip(drawn, alone, strict=True):
            np.testing.assert_array_equal(batch[row], expected)


def test_every_ticket_runs_one_episode_and_steps_are_counted(worker: RolloutWorker) -> None:
    trajectory = worker.collect(40, version=0)
    tickets = [episode.ticket for episode in trajectory.episodes]
    assert len(set(tickets)) == len(tickets) > 10
    assert worker.env_steps == int(trajectory.valid.sum())
    running = set(worker.tickets.tolist())
    assert running.isdisjoint(tickets)
    assert set(tickets) | running == set(trajectory.tickets.unique().tolist()) | running
    for episode in trajectory.episodes:
        mine = trajectory.tickets == episode.ticket
        assert int(trajectory.valid[mine].sum()) == episode.length
        assert float(trajectory.reward[mine].sum()) == pytest.approx(episode.episode_return, rel=1e-5)


def test_a_truncated_episode_bootstraps_from_its_true_last_observation(worker: RolloutWorker) -> None:
    steps: list[Decision] = []
    finish = worker.finish

    def remember() -> Decision:
        steps.append(finish())
        return steps[-1]

    worker.finish = remember  # type: ignore[method-assign]
    trajectory = worker.collect(30, version=0)
    cut = (trajectory.truncated & ~trajectory.terminated).any(-1)
    assert cut.any()
    assert torch.equal(trajectory.final_value != 0, trajectory.truncated.any(-1))
    for t, row in cut.nonzero().tolist():
        final = steps[t].final_inputs
        assert final is not None
        at = steps[t].result.final_rows.tolist().index(row)
        state = final["state"][at : at + 1]
        torch.testing.assert_close(trajectory.final_value[t, row], worker.policy.value({"state": state})[0])
        # the last observation belongs to the old episode: its target is the one acted on, not the next episode's
        assert torch.equal(state[0, 2:], steps[t].inputs["state"][row, 2:])
    torch.testing.assert_close(trajectory.last_value, worker.policy.value(steps[-1].next_inputs))


def test_scores_of_a_trajectory_can_be_recomputed(worker: RolloutWorker) -> None:
    trajectory = worker.collect(6, version=0)
    flat = {name: tensor.flatten(0, 1) for name, tensor in trajectory.inputs.items()}
    trace = {name: tensor.flatten(0, 1) for name, tensor in trajectory.trace.items()}
    score = worker.policy.evaluate_actions(flat, trace)
    torch.testing.assert_close(score.log_prob, trajectory.log_prob.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_all_decisions_of_a_lost_episode_are_invalid(worker: RolloutWorker) -> None:
    begin, count = worker.begin, []

    def killing_begin(*args: Any, **kwargs: Any) -> None:
        begin(*args, **kwargs)
        count.append(1)
        if len(count) == 3:  # every row is in an episode that began before
            os.kill(worker_pids()[0], signal.SIGKILL)

    worker.begin = killing_begin  # type: ignore[method-assign]
    finish, lost = worker.finish, []

    def noticing_finish() -> Decision:
        decision = finish()
        lost.append(decision.result.lost.copy())
        return decision

    worker.finish = noticing_finish  # type: ignore[method-assign]
    trajectory = worker.collect(LIMIT // 2 + 3, version=0)
    assert worker.simulator.deaths == 1
    found = np.argwhere(np.stack(lost))
    assert len(found) == worker.lost_episodes == 2
    for t, row in found:  # the kill may come just after the worker's answer: t is 2 or 3
        began = int((trajectory.tickets[: t + 1, row] == trajectory.tickets[t, row]).nonzero()[0])
        assert not trajectory.valid[began : t + 1, row].any()
        assert trajectory.valid[t + 1, row].any(), "the episode starts again"
    for episode in trajectory.episodes:
        assert int(trajectory.valid[trajectory.tickets == episode.ticket].sum()) == episode.length


def test_shaping_telescopes_to_success_plus_the_last_potential(
    off_policy_worker: RolloutWorker, tmp_path: Path
) -> None:
    config = off_policy()
    algorithm = config.algorithm.build(off_policy_worker.policy, 0)
    workflow = OffPolicyWorkflow(off_policy_worker, algorithm, 12, torch.Generator().manual_seed(0), 0, None, tmp_path)
    algorithm.config = replace(algorithm.config, learning_starts=10**9)
    workflow.iterate(border=True)
    buffer = workflow.buffer
    assert len(buffer) == 12 * 4, "every decision has a successor after a border"
    sample = buffer.sample(4000, np.random.default_rng(0))
    keys = zip(sample["ticket"].tolist(), sample["inputs"]["state"], strict=True)
    unique = {(ticket, bytes(state)): i for i, (ticket, state) in enumerate(keys)}
    index = np.array(sorted(unique.values()))
    assert len(index) == len(buffer)
    for ticket in np.unique(sample["ticket"][index]):
        mine = index[sample["ticket"][index] == ticket]
        shaping = sample["next_potential"][mine] - sample["potential"][mine]
        ended = sample["terminated"][mine] | sample["truncated"][mine]
        assert ended.sum() == 1
        last = sample["next_potential"][mine][ended]
        assert shaping.sum() == pytest.approx(float(last[0]), abs=1e-5)
        assert sample["reward"][mine].sum() == float(sample["success"][mine].any())


def halves(observation: Observation, proposed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A scripted person who lets row 0 alone and takes over the second action in the others, where the point is left of
    the middle."""
    instead = np.zeros(proposed.shape[:2], bool)
    instead[1:, 1] = observation.state[1:, 0] < 0
    return np.full_like(proposed, 0.25), instead


def test_what_a_person_does_is_executed_recorded_and_drawn_with_the_demonstrations(
    off_policy_worker: RolloutWorker, tmp_path: Path
) -> None:
    worker = off_policy_worker
    worker.intervene = halves
    algorithm = replace(off_policy().algorithm, learning_starts=10_000).build(worker.policy, 0)
    known = ReplayBuffer(40, 4)
    workflow = OffPolicyWorkflow(worker, algorithm, 25, torch.Generator().manual_seed(0), 0, known, tmp_path)
    metrics = workflow.iterate(border=True)
    buffer = workflow.buffer
    everything = buffer.sample(4000, np.random.default_rng(0))
    human = (everything["actions"][:, 1] == 0.25).all(1)
    assert human.any() and not human.all()
    assert not (everything["actions"][:, 0] == 0.25).all(1).any()
    assert (everything["inputs"]["state"][human, 0] < 0).all()
    assert 0 < buffer.intervened == metrics["replay/intervened"] < len(buffer)

    offline: Any = workflow.demonstrations
    only = offline.sample(64, np.random.default_rng(0))
    assert (only["actions"][:, 1] == 0.25).all() and only["inputs"]["state"].shape == (64, 4)
    restored = ReplayBuffer(buffer.num_envs * 200, buffer.num_envs)
    restored.load_state_dict(buffer.state_dict())
    assert restored.intervened == buffer.intervened


def test_interventions_that_cannot_be_learned_from_are_refused(worker: RolloutWorker) -> None:
    worker.intervene = halves
    algorithm = on_policy().algorithm.build(worker.policy, 0)
    with pytest.raises(UserError, match="interventions need sac"):
        SegmentWorkflow(worker, algorithm, 1, torch.Generator())
    worker.intervene = lambda observation, proposed: (proposed[:, :1], np.ones(len(proposed), bool))
    with pytest.raises(UserError, match=r"intervene gave actions \[4, 1, 2\] and a mask \[4\] where \[4, 2, 2\]"):
        worker.begin()

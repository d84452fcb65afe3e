"""Demonstrations as decisions, for algorithms that learn from rewards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embodied_rl.data.demonstrations import DemonstrationEpisode
from embodied_rl.data.replay_buffer import Inputs, ReplayBuffer
from embodied_rl.errors import UserError


def demonstration_replay(
    episodes: Sequence[DemonstrationEpisode], inputs: Inputs, chunk: int, shaped: bool
) -> ReplayBuffer:
    """Every `chunk` successive actions of every episode as a decision, so that `chunk` interleaved sequences of
    decisions cover each episode, up to its first end. One that was neither terminated nor truncated counts as
    truncated.

    `inputs` [M,...]: of all observations, T+1 per episode. `shaped`: success is the reward, and the reward of the step
    before an observation its potential. Raises `UserError` when an episode has no rewards.
    """
    steps = sum(len(episode) for episode in episodes)
    buffer = ReplayBuffer(steps + chunk * len(episodes), 1)
    first = ticket = 0
    for number, episode in enumerate(episodes):
        if episode.rewards is None:
            raise UserError(f"episode {number} was recorded without rewards: it can only be imitated")
        ends = np.flatnonzero(episode.terminated | episode.truncated)
        length = int(ends[0]) + 1 if len(ends) else len(episode)
        seen = {name: column[first : first + length + 1] for name, column in inputs.items()}
        for offset in range(min(chunk, length)):
            for start in range(offset, length, chunk):
                _add(buffer, episode, seen, start, min(start + chunk, length), length, chunk, shaped, ticket)
            ticket += 1
        first += len(episode) + 1
    return buffer


def _add(
    buffer: ReplayBuffer,
    episode: DemonstrationEpisode,
    seen: Inputs,
    start: int,
    stop: int,
    length: int,
    chunk: int,
    shaped: bool,
    ticket: int,
) -> None:
    """The decision from step `start` to before `stop` of an episode of `length` steps."""
    done, last = slice(start, stop), stop == length
    success = np.zeros(stop - start, bool) if episode.success is None else episode.success[done]
    assert episode.rewards is not None
    reward = success if shaped else episode.rewards[done]
    potential = np.concatenate([[0], episode.rewards]) if shaped else np.zeros(len(episode) + 1)
    terminated = np.array([episode.terminated[done].any()])
    short = chunk - (stop - start)
    buffer.add(
        inputs={name: column[start : start + 1] for name, column in seen.items()},
        actions=np.pad(episode.actions[done], ((0, short), (0, 0)))[None],
        reward=np.pad(reward.astype(np.float32), (0, short))[None],
        valid=np.arange(chunk)[None] < stop - start,
        terminated=terminated,
        truncated=np.array([last]) & ~terminated,
        success=np.array([success.any()]),
        final_inputs={name: column[stop : stop + 1] for name, column in seen.items()} if last else None,
        final_rows=np.flatnonzero([last]),
        tickets=np.array([ticket]),
        lost=np.zeros(1, bool),
        potential=potential[start : start + 1],
        final_potential=potential[stop : stop + 1] if last else None,
    )

"""Reset schedules: pure functions from tickets to initial states.

Seeds come from a hash of (stream, seed, counter), never from a generator with state: any process can ask for any
ticket in any order, and a resumed run needs nothing but the number of the next ticket.

A *stream* says what the episodes are for. The seeds of "training", "development" and "test" lie in three disjoint
quarters of [0, 2**31), so that no training episode can ever start from a test seed. Other names share the last quarter,
each with its own sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from embodied_rl.simulators.base import InitialState

STREAMS = ("training", "development", "test")
_QUARTER = 2**29


def draw_seed(stream: str, seed: int, counter: int) -> int:
    """The `counter`-th seed of a stream, in [0, 2**31)."""
    quarter = STREAMS.index(stream) if stream in STREAMS else len(STREAMS)
    return quarter * _QUARTER + _hash("seed", stream, seed, counter) % _QUARTER


@dataclass(frozen=True)
class RandomSchedule:
    """Every ticket its own random seed, a random one of `num_tasks` tasks and of its `num_states` recorded initial
    states (0: there are none)."""

    seed: int
    num_tasks: int = 1
    stream: str = "training"
    num_states: int = 0

    def state(self, ticket: int) -> InitialState:
        """The initial state of `ticket` >= 0."""
        task = _hash("task", self.stream, self.seed, ticket) % self.num_tasks
        index = _hash("index", self.stream, self.seed, ticket) % self.num_states if self.num_states else None
        return InitialState(task, draw_seed(self.stream, self.seed, ticket), index)


@dataclass(frozen=True)
class GroupSchedule:
    """Groups of identical initial states: tickets g*G .. g*G+G-1 share one random state, G = `group_size`."""

    seed: int
    group_size: int
    num_tasks: int = 1
    stream: str = "training"
    num_states: int = 0

    def state(self, ticket: int) -> InitialState:
        """The initial state of `ticket` >= 0."""
        states = RandomSchedule(self.seed, self.num_tasks, self.stream, self.num_states)
        return states.state(ticket // self.group_size)


@dataclass(frozen=True)
class FixedSchedule:
    """The given states over and over: ticket t starts from states[t % len(states)]."""

    states: Sequence[InitialState]

    def state(self, ticket: int) -> InitialState:
        """The initial state of `ticket` >= 0."""
        return self.states[ticket % len(self.states)]


@dataclass(frozen=True)
class OrderedSchedule:
    """A finite list of episodes, each run once: ticket t starts from (tasks[t], seeds[t], indices[t]). For evaluation.

    `indices` may be empty: no recorded initial states.
    """

    seeds: Sequence[int]
    tasks: Sequence[int]
    indices: Sequence[int] = ()

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.tasks) or len(self.indices) not in (0, len(self.seeds)):
            raise ValueError(f"{len(self.seeds)} seeds for {len(self.tasks)} tasks, {len(self.indices)} indices")

    @classmethod
    def draw(cls, stream: str, count: int, num_tasks: int = 1, seed: int = 0, num_states: int = 0) -> OrderedSchedule:
        """`count` episodes with seeds of `stream`: every task from its recorded state 0, then every task from state 1,
        and so on (task 0, task 1, ... when nothing is recorded), from the start again when all are used."""
        seeds = [draw_seed(stream, seed, i) for i in range(count)]
        indices = [i // num_tasks % num_states for i in range(count)] if num_states else []
        return cls(seeds, [i % num_tasks for i in range(count)], indices)

    def __len__(self) -> int:
        return len(self.seeds)

    def state(self, ticket: int) -> InitialState:
        """The initial state of `ticket`; raises IndexError outside [0, len)."""
        if not 0 <= ticket < len(self):
            raise IndexError(f"ticket {ticket} of a schedule of {len(self)} episodes")
        index = self.indices[ticket] if self.indices else None
        return InitialState(self.tasks[ticket], self.seeds[ticket], index)


def _hash(purpose: str, stream: str, seed: int, counter: int) -> int:
    # blake2b, not hash(): the same on every machine and in every process.
    digest = hashlib.blake2b(f"{purpose}/{seed}/{counter}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")

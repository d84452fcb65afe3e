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
    """Every ticket its own random seed and a random one of `num_tasks` tasks."""

    seed: int
    num_tasks: int = 1
    stream: str = "training"

    def state(self, ticket: int) -> InitialState:
        """The initial state of `ticket` >= 0."""
        task = _hash("task", self.stream, self.seed, ticket) % self.num_tasks
        return InitialState(task=task, seed=draw_seed(self.stream, self.seed, ticket))


@dataclass(frozen=True)
class GroupSchedule:
    """Groups of identical initial states: tickets g*G .. g*G+G-1 share one random state, G = `group_size`."""

    seed: int
    group_size: int
    num_tasks: int = 1
    stream: str = "training"

    def state(self, ticket: int) -> InitialState:
        """The initial state of `ticket` >= 0."""
        return RandomSchedule(self.seed, self.num_tasks, self.stream).state(ticket // self.group_size)


@dataclass(frozen=True)
class FixedSchedule:
    """The given states over and over: ticket t starts from states[t % len(states)]."""

    states: Sequence[InitialState]

    def state(self, ticket: int) -> InitialState:
        """The initial state of `ticket` >= 0."""
        return self.states[ticket % len(self.states)]


@dataclass(frozen=True)
class OrderedSchedule:
    """A finite list of episodes, each run once: ticket t starts from (tasks[t], seeds[t]). For evaluation."""

    seeds: Sequence[int]
    tasks: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.tasks):
            raise ValueError(f"{len(self.seeds)} seeds for {len(self.tasks)} tasks")

    @classmethod
    def draw(cls, stream: str, count: int, num_tasks: int = 1, seed: int = 0) -> OrderedSchedule:
        """`count` episodes with seeds of `stream`, tasks taking turns."""
        return cls([draw_seed(stream, seed, i) for i in range(count)], [i % num_tasks for i in range(count)])

    def __len__(self) -> int:
        return len(self.seeds)

    def state(self, ticket: int) -> InitialState:
        """The initial state of `ticket`; raises IndexError outside [0, len)."""
        if not 0 <= ticket < len(self):
            raise IndexError(f"ticket {ticket} of a schedule of {len(self)} episodes")
        return InitialState(task=self.tasks[ticket], seed=self.seeds[ticket])


def _hash(purpose: str, stream: str, seed: int, counter: int) -> int:
    # blake2b, not hash(): the same on every machine and in every process.
    digest = hashlib.blake2b(f"{purpose}/{seed}/{counter}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")

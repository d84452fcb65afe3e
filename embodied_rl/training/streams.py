"""One schedule for everything a run does with its simulator: training, demonstrations and two kinds of evaluation.

A run keeps a single simulator (starting one costs seconds to minutes), so a ticket says what its episode is for: its
high bits name the stream, its low bits count within it.
"""

from __future__ import annotations

from embodied_rl.pipeline.tickets import ATTEMPT
from embodied_rl.simulators.base import InitialState, ResetSchedule
from embodied_rl.simulators.reset_schedule import GroupSchedule, OrderedSchedule, RandomSchedule

_BITS = 40


class Streams:
    """A `ResetSchedule` of named streams with disjoint seeds.

    "training" and "demonstrations" are endless and depend on the run's seed; "development" and "test" are finite lists
    of episodes, tasks taking turns, the same for every run. Where a simulator ships recorded initial states
    (`num_states` per task > 0), all streams share these, as published benchmarks do.

    Training tickets g*G to g*G+G-1 share an initial state, G = `group_size`: the stream comes first, so its tickets
    count from 0.
    """

    def __init__(
        self,
        seed: int,
        num_tasks: int,
        development: int,
        test: int,
        test_seed: int = 0,
        num_states: int = 0,
        group_size: int = 1,
    ) -> None:
        self._schedules: dict[str, ResetSchedule] = {
            "training": GroupSchedule(seed, group_size, num_tasks, "training", num_states),
            "demonstrations": RandomSchedule(seed, num_tasks, "demonstrations", num_states),
            "development": OrderedSchedule.draw("development", development, num_tasks, num_states=num_states),
            "test": OrderedSchedule.draw("test", test, num_tasks, test_seed, num_states),
        }
        self._counts = {"development": development, "test": test}

    def state(self, ticket: int) -> InitialState:
        """The initial state of `ticket`, the same for all attempts at it."""
        ticket %= ATTEMPT
        stream = list(self._schedules.values())[ticket >> _BITS]
        return stream.state(ticket & ((1 << _BITS) - 1))

    def first(self, stream: str) -> int:
        """The first ticket of `stream`."""
        return list(self._schedules).index(stream) << _BITS

    def episodes(self, stream: str) -> range:
        """All tickets of a finite stream."""
        first = self.first(stream)
        return range(first, first + self._counts[stream])

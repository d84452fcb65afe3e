"""Which row runs which ticket, and that no ticket runs twice."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embodied_rl.pipeline.tickets import ATTEMPT, REMEMBERED, TicketCounter, TicketList
from embodied_rl.randomness import RowNoise
from embodied_rl.simulators.base import WAIT
from embodied_rl.training.streams import Streams

STREAMS = Streams(3, 1, 4, 4)


def test_a_list_is_issued_once_to_whoever_asks_and_ends_in_waiting() -> None:
    one, other = TicketList(range(10, 16, 2)).rows(2)
    assert [one.issue(), one.issue(), other.issue(), other.issue(), one.issue()] == [10, 12, 14, WAIT, WAIT]


@given(st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), max_size=12)), max_size=5))
def test_no_ticket_is_issued_twice_and_rows_do_not_depend_on_each_other(borders: list[tuple[int, list[int]]]) -> None:
    counter, issued = TicketCounter(7), [6]
    for num_envs, asking in borders:
        first, rows = counter.next, counter.rows(num_envs)
        assert first == max(issued) + 1
        taken = dict.fromkeys(range(num_envs), 0)
        for row in asking:
            row %= num_envs
            issued.append(rows[row].issue())
            assert issued[-1] == first + row + num_envs * taken[row]
            taken[row] += 1
    assert len(set(issued)) == len(issued)
    assert counter.take(3) == range(max(issued) + 1, max(issued) + 4) and counter.next == max(issued) + 4


def test_a_failed_ticket_is_attempted_again_by_its_row_from_the_same_state_with_other_noise() -> None:
    counter = TicketCounter(STREAMS.first("training"), retry=0.25)
    mine, other = counter.rows(2)
    first = mine.issue()
    mine.failed(first)
    again = [ticket for ticket in (mine.issue() for _ in range(6)) if ticket >= ATTEMPT]
    assert again == [first + ATTEMPT]
    assert max(other.issue() for _ in range(9)) < ATTEMPT
    assert STREAMS.state(again[0]) == STREAMS.state(first)
    noise = RowNoise(0, np.array([first, again[0]]), np.zeros(2, np.int64)).normal(3)
    assert not np.array_equal(noise[0], noise[1])


def test_what_is_to_be_attempted_again_outlasts_borders_and_resumption() -> None:
    counter = TicketCounter(100, retry=0.25)
    for row in counter.rows(2):
        for _ in range(3):
            row.failed(row.issue())
        for ticket in range(2 * REMEMBERED):
            row.failed(ticket)

    def all_that_follows(counter: TicketCounter) -> list[Any]:
        return [[row.issue() for _ in range(50)] for row in counter.rows(2)]

    restored = TicketCounter(0, retry=0.25)
    restored.load_state_dict(counter.state_dict())
    follows = all_that_follows(restored)
    assert follows == all_that_follows(counter)
    assert [ticket - ATTEMPT for ticket in follows[0] if ticket >= ATTEMPT] == list(range(REMEMBERED, REMEMBERED + 13))
    assert restored.next == counter.next == 106 + 2 * 37

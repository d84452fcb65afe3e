"""Who runs which ticket.

A training row has a stream of tickets of its own, so what it runs depends on nothing that another row does: processes
and machines deal with their rows alone, and the segment is the same. Of a finite list of episodes each is run once, by
whichever row is free first: results are put in the order of their tickets, which does not show who ran them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from embodied_rl.simulators.base import WAIT

ATTEMPT = 1 << 48
"""What a further attempt adds to a ticket; a `ResetSchedule` of a run ignores the bits from here on."""
REMEMBERED = 32
"""Failed episodes of a row that wait for another attempt, at most."""


class Source(Protocol):
    """Where a row takes its tickets from."""

    def issue(self) -> int:
        """The next ticket, or `WAIT`."""
        ...

    def failed(self, ticket: int) -> None:
        """The episode of `ticket` did not succeed."""
        ...


class Tickets(Protocol):
    """What a rollout worker begins with."""

    def rows(self, num_envs: int) -> Sequence[Source]:
        """Where the rows of `num_envs` environments take their tickets from until the next border."""
        ...


class TicketList:
    """Every one of `tickets` once, then `WAIT`, for whichever row asks."""

    def __init__(self, tickets: range) -> None:
        self._left = iter(tickets)

    def rows(self, num_envs: int) -> list[TicketList]:
        return [self] * num_envs

    def issue(self) -> int:
        return next(self._left, WAIT)

    def failed(self, ticket: int) -> None:
        """It is not tried again."""


class Dealt:
    """Sources of which others know."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    def rows(self, num_envs: int) -> Sequence[Source]:
        return self._sources


@dataclass
class RowTickets:
    """The stream of one row: `next`, `next` + `stride` and so on.

    A share `retry` of its tickets are further attempts at initial states where an episode of this row failed, oldest
    first: the attempt is counted in the high bits of a ticket, so its noise is new and its initial state is not.
    """

    next: int
    stride: int
    retry: float = 0.0
    due: float = 0.0
    """Further attempts owed to the tickets issued so far."""
    waiting: deque[int] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    """Failed tickets."""

    def issue(self) -> int:
        self.due += self.retry
        if self.due >= 1:
            self.due -= 1
            if self.waiting:
                return self.waiting.popleft() + ATTEMPT
        self.next += self.stride
        return self.next - self.stride

    def failed(self, ticket: int) -> None:
        if self.retry:
            self.waiting.append(ticket)


class TicketCounter:
    """Endless tickets from `first`. Between two borders row r of N runs n + r, n + r + N and so on, where n is beyond
    everything issued before; `retry` is that of `RowTickets`, whose failed episodes outlast a border."""

    def __init__(self, first: int, retry: float = 0.0) -> None:
        self.retry = retry
        self._first = first
        self._rows: list[RowTickets] = []

    @property
    def next(self) -> int:
        """The first ticket that is beyond all issued ones."""
        return max([self._first, *(row.next - len(self._rows) + 1 for row in self._rows)])

    def rows(self, num_envs: int) -> list[RowTickets]:
        """A border: fresh streams."""
        self._first, old = self.next, self._rows
        self._rows = [RowTickets(self._first + row, num_envs, self.retry) for row in range(num_envs)]
        for mine, before in zip(self._rows, old, strict=False):
            mine.due, mine.waiting = before.due, before.waiting
        return self._rows

    def take(self, count: int) -> range:
        """`count` consecutive tickets, for whoever runs a list of them."""
        first = self.next
        self._first = first + count
        return range(first, first + count)

    def state_dict(self) -> dict[str, Any]:
        rows = [{"due": row.due, "waiting": list(row.waiting)} for row in self._rows]
        return {"next": self.next, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`, read at a border."""
        self._first = state["next"]
        self._rows = [
            RowTickets(self._first, 1, self.retry, row["due"], deque(row["waiting"], maxlen=REMEMBERED))
            for row in state["rows"]
        ]

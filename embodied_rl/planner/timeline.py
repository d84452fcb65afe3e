"""Who does what when: spans of the stages of a run, taken at the calls of a worker and a learner as they are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Any, NamedTuple

SHARES = {"simulate": "simulating", "infer": "deciding", "wait": "waiting", "train": "learning"}
"""What metrics call the stages: a group's simulators execute a chunk, until somebody comes for it; the policy decides;
the rollout worker waits for simulators; the learner learns."""


NOTICED = 1e-4
"""Seconds of a wait for a chunk that was not there yet."""


class Span(NamedTuple):
    stage: str
    track: str
    """Who: "rollout", "learner", "simulator 0"..."""
    start: float
    """Seconds of `time.perf_counter`."""
    seconds: float
    cpu: float
    """Seconds of those in which the thread computed; 0 for what other processes do."""


class Timeline:
    """Spans in the order in which they ended. Recording one takes microseconds."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    @contextmanager
    def watching(self, worker: Any) -> Iterator[None]:
        """Record what the groups of a `RolloutWorker` and their simulators do meanwhile; of a worker whose environments
        are elsewhere, that it waits for them."""
        with ExitStack() as watched:
            for index, group in enumerate(getattr(worker, "groups", ())):
                watched.enter_context(self._watching_group(group, f"simulator {index}"))
            if not hasattr(worker, "groups"):
                for name in ("collect", "collect_episodes"):
                    watched.enter_context(self._watching_calls(worker, name, "wait", "rollout"))
            yield

    @contextmanager
    def watching_learner(self, algorithm: Any) -> Iterator[None]:
        """Record meanwhile when `algorithm` learns from a batch."""
        with self._watching_calls(algorithm, "learn" if hasattr(algorithm, "learn") else "update", "train", "learner"):
            yield

    @contextmanager
    def _watching_calls(self, owner: Any, name: str, stage: str, track: str) -> Iterator[None]:
        call = getattr(owner, name)

        def watched(*arguments: Any, **more: Any) -> Any:
            with self.span(stage, track):
                return call(*arguments, **more)

        setattr(owner, name, watched)
        try:
            yield
        finally:
            delattr(owner, name)

    @contextmanager
    def span(self, stage: str, track: str) -> Iterator[None]:
        """What the block does."""
        start = _now()
        try:
            yield
        finally:
            self._add(stage, track, start, _now())

    def of(self, stage: str) -> list[Span]:
        """All spans of a stage."""
        return [span for span in self.spans if span.stage == stage]

    @contextmanager
    def _watching_group(self, group: Any, track: str) -> Iterator[None]:
        begin, finish, send, receive = group.begin, group.finish, group.simulator.send, group.simulator.receive
        sent = received = _now()

        def watched_send(*arguments: Any, **more: Any) -> None:
            nonlocal sent
            sent = _now()
            send(*arguments, **more)
            self._add("wait", "rollout", sent, _now())

        def watched_receive() -> Any:
            nonlocal received
            start = _now()
            result = receive()
            received = _now()
            self._add("wait", "rollout", start, received)
            self._add("simulate", track, (sent[0], 0.0), (received[0], 0.0))
            return result

        def watched_begin(*arguments: Any, **more: Any) -> None:
            start = _now()
            begin(*arguments, **more)
            self._add("infer", "rollout", start, sent)

        def watched_finish() -> Any:
            decision = finish()
            self._add("infer", "rollout", received, _now())
            return decision

        group.begin, group.finish = watched_begin, watched_finish
        group.simulator.send, group.simulator.receive = watched_send, watched_receive
        try:
            yield
        finally:  # the methods of the classes again
            del group.begin, group.finish, group.simulator.send, group.simulator.receive

    def _add(self, stage: str, track: str, start: Moment, end: Moment) -> None:
        self.spans.append(Span(stage, track, start[0], end[0] - start[0], end[1] - start[1]))


def calls(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds of a call of each stage. How long a chunk takes that nobody waited for is not known: of simulators that
    most chunks are not waited for nothing is said."""
    waited = {round(_end(span), 6) for span in spans if span.stage == "wait" and span.seconds > NOTICED}
    chunks = [span for span in spans if span.stage == "simulate"]
    timed = [chunk.seconds for chunk in chunks if round(_end(chunk), 6) in waited]
    learned = [span.seconds for span in spans if span.stage == "train"]
    found = {"train": fmean(learned)} if learned else {}
    if chunks:  # a decision is made in two parts
        found["infer"] = sum(span.seconds for span in spans if span.stage == "infer") / len(chunks)
    if 2 * len(timed) > len(chunks):
        found["simulate"] = fmean(timed)
    return found


def _end(span: Span) -> float:
    return span.start + span.seconds


Moment = tuple[float, float]
"""Seconds of the clock, and those that this thread has computed."""


def _now() -> Moment:
    return time.perf_counter(), time.thread_time()

"""What a run's stages do while it goes on: shares of every iteration as metrics, and a trace when it is asked for."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from embodied_rl.errors import UserError
from embodied_rl.planner.prediction import Prediction
from embodied_rl.planner.timeline import SHARES, Timeline, calls


class Watch:
    """Of a worker and a learner. A context manager."""

    def __init__(
        self, worker: Any, algorithm: Any, prediction: Prediction | None = None, trace: Path | None = None
    ) -> None:
        """`prediction`: compared with steady iterations. `trace`: the file to write, or to go on with."""
        self.timeline = Timeline()
        self.prediction = prediction
        self.trace = trace
        self._watched = ExitStack()
        self._watched.enter_context(self.timeline.watching(worker))
        self._watched.enter_context(self.timeline.watching_learner(algorithm))
        self._simulators = max(1, len(getattr(worker, "groups", ())))
        self._named: set[str] = set()
        """Tracks whose name the trace has."""

    def iteration(self, seconds: float, steady: bool) -> dict[str, float]:
        """Metrics of the iteration that ends now after `seconds`; `steady`: it neither filled nor drained what
        overlaps. Shares of it in which the simulators had something to do (mean of the groups), the policy decided,
        the rollout worker waited for simulators and the learner learned."""
        began = time.perf_counter() - seconds
        spans = [span for span in self.timeline.spans if span.start >= began]  # earlier ones: of an evaluation
        totals = dict.fromkeys(SHARES, 0.0)
        for span in spans:
            if span.stage in totals:
                totals[span.stage] += span.seconds
        totals["simulate"] /= self._simulators
        self._write()
        metrics = {f"time/{SHARES[stage]}": total / seconds for stage, total in totals.items()}
        return metrics | (self.prediction.compare(seconds, calls(spans)) if self.prediction and steady else {})

    def _write(self) -> None:
        """Add the spans to the trace and forget them."""
        spans = self.timeline.spans[:]
        del self.timeline.spans[: len(spans)]
        if self.trace is None:
            return
        offset = time.time() - time.perf_counter()
        events: list[dict[str, Any]] = []
        for span in spans:
            number = _number(span.track)
            if span.track not in self._named:
                self._named.add(span.track)
                name = {"name": span.track}
                events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": name})
            times = {"ts": round(1e6 * (span.start + offset)), "dur": round(1e6 * span.seconds)}
            events.append({"name": span.stage, "ph": "X", "pid": 1, "tid": number, **times})
        try:
            with self.trace.open("a") as file:  # the bracket that the format lets one leave out is left out
                file.write("" if file.tell() else "[\n")
                file.writelines(json.dumps(event) + ",\n" for event in events)
        except OSError as error:
            raise UserError(f"cannot write {self.trace}: {error.strerror}; free disk space and resume") from error

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._watched.close()
        self._write()


def _number(track: str) -> int:
    """The same in all parts of a trace, however many simulators a part has."""
    kind, _, index = track.partition(" ")
    return {"rollout": 1, "learner": 2, "simulator": 3}[kind] + int(index or 0)

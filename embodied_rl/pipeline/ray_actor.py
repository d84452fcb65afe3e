"""The near side of one rollout worker on Ray: where it is, which environments are its own, and whether it lives."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from embodied_rl.config import PipelineConfig
from embodied_rl.errors import SimulatorDied
from embodied_rl.pipeline.rollout_actor import Order, RolloutActor
from embodied_rl.simulators.base import ResetSchedule
from embodied_rl.simulators.worker import Specs

START = 900.0
"""Seconds that a rollout worker and its simulators get to start."""
FETCH = 600.0
"""Seconds that a result gets to come from where it was made."""
_BEAT = 5.0
"""Seconds between questions whether a rollout worker gets on."""
SILENCE = 20.0
"""Seconds without an answer, which comes from a thread of its own, after which a rollout worker is taken for stuck."""


class Actor:
    """One rollout worker through its incarnations."""

    def __init__(
        self, index: int, place: Any, pipeline: PipelineConfig, schedule: ResetSchedule, log_dir: Path | None
    ) -> None:
        self.index = index
        self.place = place
        """Its placement group."""
        self.share: tuple[slice, Any] | None = None
        """(its rows, a simulator configuration with as many environments) that it has started, or begun to."""
        self.epoch = 0
        """The incarnation."""
        self.handle: Any = None
        self.pid = 0
        self.node = ""
        """The id of its Ray node."""
        self.deaths = 0
        """Of processes of the simulators that it has now."""
        self.seen = 0.0
        """When it last got on."""
        self._pipeline = pipeline
        self._schedule = schedule
        self._log = log_dir and log_dir / f"rollout-worker-{index}.log"
        self._logs = log_dir and log_dir / f"rollout-worker-{index}"
        self._starting: Any = None
        self._chunks = 0
        self._beat: Any = None
        """A question how many chunks there were."""
        self._asked = 0.0

    @property
    def rows(self) -> slice:
        """Its environments."""
        assert self.share is not None
        return self.share[0]

    @property
    def name(self) -> str:
        where = f" (environments {self.rows.start}-{self.rows.stop - 1})" if self.share else ""
        return f"rollout worker {self.index}{where}"

    def start(self, share: tuple[slice, Any]) -> None:
        """Begin to start the environments of `share`, in place of those it has; in a new process where there is none.
        Nothing else may be asked of it before it is `started`."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        pipeline, self.share, self.seen = self._pipeline, share, time.monotonic()
        if self.handle is None:
            decorate: Any = ray.remote
            self.epoch, self._beat, self._chunks = self.epoch + 1, None, 0
            self.handle = (
                decorate(concurrency_groups={"watch": 1})(RolloutActor)
                .options(
                    num_cpus=pipeline.rollout_cpus,
                    num_gpus=pipeline.rollout_gpus,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(self.place, 0),
                    max_restarts=0,
                    max_task_retries=0,
                )
                .remote(self.index, self.epoch, self._log, sys.path)
            )
        device = "cuda" if pipeline.rollout_gpus else "cpu"
        self._starting = self.handle.start.remote(share[1], pipeline.env_groups, self._schedule, self._logs, device)

    def started(self, patience: float = 0.0) -> Specs | None:
        """What its environments are, or None when they are not there within `patience` seconds. Raises what stopped
        them, a `RayError` when it died, and `SimulatorDied` when it has had its time."""
        import ray

        if not ray.wait([self._starting], timeout=max(0.0, patience))[0]:
            if time.monotonic() - self.seen > START:
                raise SimulatorDied(f"{self.name} did not start within {START:.0f} seconds; {self._last_words()}")
            return None
        specs, self.pid, self.node = get(self._starting)
        return specs

    def run(self, order: Order) -> Any:
        """A reference to its reply."""
        self.seen = time.monotonic()
        return self.handle.run.remote(order)

    def look_after(self, longest: float) -> None:
        """Kill it when it has not made a chunk for `longest` seconds, or does not answer."""
        import ray
        from ray.exceptions import RayError

        now = time.monotonic()
        if now - self.seen > longest:
            ray.kill(self.handle)
        elif self._beat is None and now - self._asked > _BEAT:
            self._asked = now
            self._beat = self.handle.progress.options(concurrency_group="watch").remote()
        elif self._beat is not None and ray.wait([self._beat], timeout=0)[0]:
            beat, self._beat = self._beat, None
            try:
                chunks = get(beat)
            except RayError:  # the order that is waited for says so, too
                return
            if chunks != self._chunks:
                self._chunks, self.seen = chunks, now
        elif self._beat is not None and now - self._asked > SILENCE:
            ray.kill(self.handle)

    def end(self) -> None:
        """Make sure that there is no process of it; may be called twice."""
        import ray

        if self.handle is not None:
            ray.kill(self.handle)  # who cannot be reached may still be there
            self.handle = None

    def obituary(self, error: BaseException) -> str:
        """How it ended."""
        reason = str(error).strip().partition("\n")[0]
        return f"{self.name}, process {self.pid or '?'}: {reason} {self._last_words()}"

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").splitlines()[-30:] if self._log else []
        except OSError:
            return f"its output is in {self._log} on its own machine"
        return "its last output:\n" + ("\n".join(lines) or "(none)")


def get(reference: Any) -> Any:
    """The result of a call that is done. Raises what it raised, with the worker's traceback as its cause."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(reference, timeout=FETCH)
    except RayTaskError as error:
        raise error.cause from error

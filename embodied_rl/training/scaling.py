"""How many rollout workers and learner ranks a run has, and how that changes while it trains.

What is new starts beside what goes on. When it is there, the next iteration ends with a checkpoint, and behind that,
where no episode runs and nothing is left to learn from, the environments and the optimizers' states change hands. So a
change is seen by nothing but the clock, and a run that is resumed after it has the new numbers.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from embodied_rl.algorithms.base import Metrics
from embodied_rl.algorithms.optimization import Differentiation
from embodied_rl.algorithms.policy_gradient import PolicyGradient
from embodied_rl.config import PipelineConfig, RunConfig, to_dict
from embodied_rl.errors import UserError
from embodied_rl.files import write_atomic
from embodied_rl.simulators.worker import Specs
from embodied_rl.training import scale_request
from embodied_rl.training.scale_request import DONE, REFUSED, Request

if TYPE_CHECKING:
    from embodied_rl.pipeline.learner_ranks import LearnerRanks


class Scaling:
    """Of one run, whose pipeline is `config.pipeline` at any time. A context manager: leaving it ends the ranks."""

    def __init__(self, config: RunConfig, simulator: Any, out: Path) -> None:
        """`simulator`: what `executor.start` gave."""
        self.config = config
        self.learners: LearnerRanks | None = None
        """Processes that learn in place of this one."""
        self._simulator = simulator
        self._out = out
        self._coming: LearnerRanks | None = None
        """Learners to be."""
        self._introduced: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "scaling")
        self._request: Request | None = None
        self._wanted: PipelineConfig | None = None
        """What the request asks for."""
        self._vain = 0
        """Rollout workers that there was room for, but that did not start."""
        self._told = self._numbers

    def begin(self, algorithm: Any) -> None:
        """`algorithm` learns from now on, in as many processes, and as precisely, as `config.pipeline` says. Raises
        `UserError` when it cannot."""
        self._algorithm, pipeline = algorithm, self.config.pipeline
        self._check(pipeline)
        ranks = self._ranks(pipeline.learner_ranks) if pipeline.learner_ranks else None
        if ranks is not None:
            self._introduce(ranks)
        self._learn_in(ranks)

    def optimizers(self) -> dict[str, Any]:
        """The states of the algorithm's optimizers, whole, by name."""
        if self.learners is not None:
            return self.learners.optimizers()
        return {name: each.state_dict() for name, each in self._algorithm.optimizers().items()}

    def due(self) -> bool:
        """Whether the iteration that comes next should end with a border, and `change` there."""
        self._read()
        wanted, now = self._wanted or self.config.pipeline, self.config.pipeline
        workers = self._workers(wanted)
        if (workers, wanted.learners) == self._numbers:
            self._forget()
            if self._wanted is not None:
                self._settle(wanted)
            return False
        try:
            if wanted.learner_ranks not in (now.learner_ranks, 0) and self._coming is None:
                self._coming = self._ranks(wanted.learner_ranks)
                self._introduced = self._thread.submit(self._introduce, self._coming)
            ready = self._simulator.prepare(workers) if wanted.executor == "ray" else True
            if self._introduced is not None:
                if not self._introduced.done():
                    return False
                self._introduced.result()
            return ready
        except Exception as error:  # whatever it is, the run goes on without
            self._vain = workers if self._wanted is None else 0
            self._refuse(str(error))
            return False

    def change(self) -> Metrics:
        """Go over to what is `due`, behind a border and before a restart; its metrics."""
        began, wanted = time.monotonic(), self._wanted or self.config.pipeline
        if (workers := self._workers(wanted)) != self._numbers[0]:
            self._simulator.scale(workers)
        if wanted.learners != self.config.pipeline.learners:
            states = self.optimizers()
            for name, optimizer in self._algorithm.optimizers().items():
                optimizer.load_state_dict(states[name])
            coming, self._coming, self._introduced = self._coming, None, None
            self._learn_in(coming)
        self._settle(wanted)
        return {"time/scaling": time.monotonic() - began}

    def metrics(self) -> Metrics:
        """The numbers of processes, where they are others than when they were asked for last."""
        if self._told == self._numbers:
            return {}
        self._told = self._numbers
        return {"scale/rollout_workers": self._told[0], "scale/learners": self._told[1]}

    def __enter__(self) -> Scaling:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._forget()
        self._end()
        self._thread.shutdown()
        if kind is None and (request := scale_request.newest(self._out)):
            request.answer(REFUSED + "the run has ended")

    @property
    def _numbers(self) -> tuple[int, int]:
        """Of rollout workers and learners now."""
        workers = len(self._simulator.rows) if self.config.pipeline.executor == "ray" else 1
        return workers, self.config.pipeline.learners

    def _workers(self, wanted: PipelineConfig) -> int:
        """How many rollout workers there should be."""
        now = self._numbers[0]
        if not wanted.elastic:
            return wanted.rollout_workers if self._wanted is not None else now
        room = max(1, min(wanted.rollout_workers, self._simulator.room))
        return room if self._wanted is not None else now if room == self._vain else max(now, room)

    def _read(self) -> None:
        """Look for a new request."""
        found = scale_request.newest(self._out)
        if found is None or found == self._request:
            return
        self._request, self._wanted = found, None
        self._forget()
        try:
            wanted = replace(self.config.pipeline, **found.numbers())
            self._check(wanted)
        except UserError as error:
            return self._refuse(str(error))
        self._wanted, self._vain = wanted, 0

    def _check(self, pipeline: PipelineConfig) -> None:
        algorithm = self._algorithm
        used = (pipeline.learner_ranks, pipeline.precision) != (0, "float32")
        if used and not isinstance(algorithm, PolicyGradient):
            name = type(algorithm).__name__
            raise UserError(
                f"pipeline.learners, .learner_process and .precision do nothing for {name}: leave them as they are"
            )

    def _learn_in(self, ranks: LearnerRanks | None) -> None:
        """Learn in `ranks` from now on, or in this process, from where the algorithm is."""
        self._end()
        self.learners = ranks
        if ranks is not None:
            ranks.take_over(self._algorithm)
        elif isinstance(self._algorithm, PolicyGradient):
            self._algorithm.improve_elsewhere = None
            self._algorithm.differentiation = Differentiation(getattr(torch, self.config.pipeline.precision))

    def _ranks(self, count: int) -> LearnerRanks:
        from embodied_rl.pipeline.learner_ranks import LearnerRanks  # torch.distributed, for those who need it

        return LearnerRanks(count, self._algorithm.policy.device, self._out / "logs")

    def _introduce(self, ranks: LearnerRanks) -> None:
        """Wait for `ranks` and for what they will learn with."""
        ranks.meet()
        specs = Specs(self._simulator.observation_spec, self._simulator.action_spec, ())
        ranks.build(self._algorithm, self.config.policy, specs, self.config.seed, self.config.pipeline)

    def _end(self) -> None:
        if self.learners is not None:
            self.learners.close()

    def _settle(self, wanted: PipelineConfig) -> None:
        """It is so now."""
        self.config = replace(self.config, pipeline=wanted)
        write_atomic(self._out / "config.json", json.dumps(to_dict(self.config), indent=2))
        if self._request is not None and self._wanted is not None:
            workers, learners = self._numbers
            self._request.answer(f"{DONE}rollout workers: {workers}, learners: {learners}")
        self._request = self._wanted = None

    def _refuse(self, reason: str) -> None:
        """The run goes on as it is."""
        self._forget()
        text = " ".join(reason.split())
        if self._request is not None:
            self._request.answer(REFUSED + text)
            self._request = self._wanted = None
        print(f"the run goes on as it is: {text}", file=sys.stderr)

    def _forget(self) -> None:
        if self._coming is not None:
            self._coming.close()
            self._coming = self._introduced = None
        if self.config.pipeline.executor == "ray":
            self._simulator.forget()

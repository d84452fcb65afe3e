"""`WorkerSimulator`: environments in supervised processes, arrays in shared memory, one message per chunk."""

from __future__ import annotations

import json
import os
import sys
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embodied_rl.errors import SimulatorDied, UserError
from embodied_rl.simulators.base import WAIT, ResetSchedule, Simulator
from embodied_rl.simulators.chunk import Frame, Ledger, check_reset, check_send
from embodied_rl.simulators.local_worker import LocalWorker
from embodied_rl.simulators.rows import Block, block_fields
from embodied_rl.simulators.shared_arrays import SharedMemory
from embodied_rl.simulators.worker import Kind, Message, Specs
from embodied_rl.simulators.worker_process import CANNOT_IMPORT, EnvironmentFailed, WorkerDied, WorkerProcess
from embodied_rl.types import ChunkResult, Observation

_GRACE = 5.0
"""Seconds that workers get to close their simulators."""


class WorkerSimulator(Simulator):
    """N environments `target` in `workers` processes that outlive the death of any of them, or in this process.

    A worker that dies or hangs is replaced and its rows start their tickets again (`ChunkResult.lost`). An observation
    that a call returned stays intact until the second call after it, intermediate and final ones until the next.
    Results do not depend on `workers`.
    """

    def __init__(
        self,
        target: str,
        kwargs: dict[str, Any],
        num_envs: int,
        workers: int | None,
        schedule: ResetSchedule,
        *,
        log_dir: Path | None = None,
        python: str | None = None,
        python_path: Sequence[str] = (),
        timeout: float = 120.0,
        start_timeout: float = 300.0,
        max_deaths: int = 3,
    ) -> None:
        """`target` is the "module:class" of an `Environment`, constructed with `kwargs` (plain JSON values), or of a
        `BatchedEnvironment`, of which each worker constructs one with `num_envs` besides. Without `workers` (None) the
        environments are in this process, which then knows no other `python` and no time limits.

        `python` is another interpreter that has the simulator and numpy; its modules are looked up in `python_path` and
        its own path, those of the default interpreter also wherever this process finds its modules. What workers print
        goes to log_dir/worker-<i>.log. `timeout` bounds every reset and chunk, `start_timeout` the construction, in
        seconds. Raises `UserError` for a target that cannot be loaded, `SimulatorDied` when a worker dies while
        it starts, or after more than `max_deaths` deaths in all.
        """
        if workers is not None and not 1 <= workers <= num_envs:
            raise UserError(f"{workers} workers for {num_envs} environments: choose between 1 and {num_envs}")
        order = {"target": target, "kwargs": kwargs, "path": [*python_path, *([] if python else sys.path)]}
        try:
            json.dumps(order)
        except TypeError as error:
            raise UserError(f"the arguments of {target} must be plain JSON values: {error}") from error
        self.num_envs = num_envs
        self.timeout = timeout
        self.start_timeout = start_timeout
        self.max_deaths = max_deaths
        self._sequence = 0
        self._in_flight: tuple[int, np.ndarray, bool] | None = None  # K, next tickets, every
        self._memory = SharedMemory()
        count, kind = (1, LocalWorker) if workers is None else (workers, WorkerProcess)
        bounds = [num_envs * i // count for i in range(count + 1)]
        eager = count < (os.cpu_count() or 1)  # one core is left to wait on
        self._workers = [
            kind(i, slice(bounds[i], bounds[i + 1]), order, python or sys.executable, log_dir, eager)
            for i in range(count)
        ]
        # Also when the last reference goes, and when the interpreter exits.
        self._release = weakref.finalize(self, _close, self._workers, self._memory)
        try:
            specs = self._start(self._workers)
            self.observation_spec, self.action_spec, self.tasks = specs.observation, specs.action, specs.tasks
            self._ledger = Ledger(num_envs, self.tasks, schedule)
            self._robbed = np.zeros(num_envs, bool)  # rows that lost their episode outside of a chunk
            self._buffer = 0
            self._allocate(chunk=16, every=False)
        except BaseException:
            for worker in self._workers:
                worker.kill(WorkerDied("was not needed"))
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now, in the order of their rows."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def reset(self, env_ids: np.ndarray | None = None, tickets: np.ndarray | None = None) -> Observation:
        """As in `Simulator`. A reset of all rows also abandons a chunk in flight."""
        self._check_open()
        rows, tickets, everything = check_reset(self.num_envs, env_ids, tickets)
        if self._in_flight and not everything:
            raise RuntimeError("reset of some rows between send and receive")
        states = self._ledger.scheduled(tickets)
        self._in_flight = None
        self._ledger.start(rows, tickets, states)
        self._robbed[rows] = False
        untouched = np.ones(self.num_envs, bool)
        untouched[rows] = False
        self._buffer = 1 - self._buffer
        dead = self._order_reset(self._workers, ~untouched)
        for worker in dead:
            self._robbed[worker.rows] |= untouched[worker.rows] & (self._ledger.tickets[worker.rows] != WAIT)
        self._replace(dead)
        frame = self._block.frames[self._buffer]
        if everything:
            return self._ledger.observation(frame)
        return self._ledger.observation({name: array[rows] for name, array in frame.items()}, rows)

    def send(
        self,
        actions: np.ndarray,
        observe: Literal["last", "all"] = "last",
        next_tickets: np.ndarray | None = None,
    ) -> None:
        self._check_open()
        if self._in_flight:
            raise RuntimeError("send before the last chunk was received")
        actions, tickets = check_send(self.num_envs, self.action_spec.dim, actions, next_tickets)
        states = self._ledger.scheduled(tickets)
        chunk, every = actions.shape[1], observe == "all"
        self._allocate(chunk, every)
        self._buffer = 1 - self._buffer
        self._block.actions[:, :chunk] = actions
        self._block.run[:] = (self._ledger.tickets != WAIT) & ~self._robbed
        self._block.states[:] = states
        self._in_flight = chunk, tickets, every
        self._send(self._workers, Message(Kind.CHUNK, self._next(), self._buffer, every, chunk))

    def receive(self) -> ChunkResult:
        self._check_open()
        if self._in_flight is None:
            raise RuntimeError("receive without send")
        # What can be prepared is, while the workers run.
        chunk, next_tickets, every = self._in_flight
        steps, frame = self._block.steps[self._buffer][:, :chunk], self._block.frames[self._buffer]
        observation, lost = self._ledger.observation(frame), self._robbed.copy()
        dead = self._collect(self._workers)
        self._in_flight = None
        self._robbed[:] = False
        for worker in dead:
            steps[worker.rows].clear()
            lost[worker.rows] = self._ledger.tickets[worker.rows] != WAIT
        intermediate: list[Frame] | None = None
        if every:
            intermediate = [{name: array[k] for name, array in self._block.every.items()} for k in range(chunk)]
        result = self._ledger.close_chunk(steps, next_tickets, observation, self._block.final, lost, intermediate)
        self._replace(dead)
        for worker in dead:
            for name, array in self._block.every.items() if every else ():
                array[:chunk, worker.rows] = frame[name][worker.rows]
        return result

    def close(self) -> None:
        """End the workers, by force after a few seconds; may be called twice."""
        self._release()

    def _order_reset(self, workers: Sequence[WorkerProcess], which: np.ndarray) -> list[WorkerProcess]:
        """Let `workers` reset those of their rows that are in `which` [N] and run a ticket; returns the dead."""
        for worker in workers:
            rows = worker.rows
            self._block.run[rows] = which[rows] & (self._ledger.tickets[rows] != WAIT)
            self._block.states[rows] = self._ledger.states[rows]
        self._send(workers, Message(Kind.RESET, self._next(), self._buffer))
        return self._collect(workers)

    def _replace(self, dead: list[WorkerProcess]) -> None:
        """Start new processes for `dead` workers, which start the tickets of their rows again."""
        while dead:
            self.deaths += len(dead)
            if self.deaths > self.max_deaths:
                raise SimulatorDied(f"{self.deaths} worker deaths; the last: {dead[-1].obituary()}")
            self._start(dead)
            self._send(dead, self._map)
            dead = self._order_reset(dead, np.ones(self.num_envs, bool))

    def _start(self, workers: Sequence[WorkerProcess]) -> Specs:
        """Start `workers` all at once; returns their common specs."""
        for worker in workers:
            worker.spawn(self._memory.descriptor)
        deadline = time.monotonic() + self.start_timeout
        sequence = self._next()
        for worker in workers:
            worker.send(Message(Kind.BUILD, sequence, payload=json.dumps(worker.order).encode()), self.start_timeout)
        specs: list[Specs] = []
        for worker in workers:
            try:
                specs.append(Specs.from_json(worker.answer(sequence, deadline).payload))
            except WorkerDied as death:
                worker.kill(death)
                if worker.exit_code == CANNOT_IMPORT:
                    raise UserError(worker.tail().splitlines()[-1]) from None
                raise SimulatorDied(f"at start-up: {worker.obituary()}") from None
        if any(each != specs[0] for each in specs):
            raise UserError(f"{workers[0].order['target']} has different specs in different workers")
        return specs[0]

    def _allocate(self, chunk: int, every: bool) -> None:
        """Make room for chunks of `chunk` actions, with intermediate observations when `every`."""
        have = self._block.actions.shape[1] if hasattr(self, "_block") else 0
        had_every = bool(have) and bool(self._block.every)
        if chunk <= have and (had_every or not every):
            return
        # The intermediate observations are large, so room for them is not made before they are asked for.
        every = every or had_every
        fields = block_fields(self.observation_spec, self.action_spec.dim, self.num_envs, max(chunk, have), every)
        start, arrays = self._memory.allocate(fields)
        block = Block(arrays)
        if have:
            for name, array in self._block.frames[self._buffer].items():
                block.frames[self._buffer][name][:] = array
        self._block = block
        self._map = Message(Kind.MAP, 0, payload=json.dumps({"start": start, "fields": fields}).encode())
        self._send(self._workers, self._map)

    def _send(self, workers: Iterable[WorkerProcess], message: Message) -> None:
        for worker in workers:
            worker.send(message, self.timeout)

    def _collect(self, workers: Iterable[WorkerProcess]) -> list[WorkerProcess]:
        """Wait for the answers to the last message; returns the workers that died instead. Raises what an environment
        raised, after all have answered."""
        deadline = time.monotonic() + self.timeout
        dead: list[WorkerProcess] = []
        failure: Exception | None = None
        for worker in workers:
            try:
                worker.answer(self._sequence, deadline)
            except WorkerDied as death:
                worker.kill(death)
                dead.append(worker)
            except (EnvironmentFailed, UserError) as error:
                failure = failure or error
        if failure:
            raise failure
        return dead

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    def _check_open(self) -> None:
        if not self._release.alive:
            raise RuntimeError("the simulator is closed")


def _close(workers: list[WorkerProcess], memory: SharedMemory) -> None:
    for worker in workers:
        worker.send(Message(Kind.CLOSE, 0), _GRACE)
    deadline = time.monotonic() + _GRACE
    for worker in workers:
        worker.close(deadline)
    memory.close()

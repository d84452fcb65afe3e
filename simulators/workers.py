"""`WorkerSimulator`: environments in supervised processes, arrays in shared memory, one message per chunk."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

import embodied_rl
from embodied_rl.errors import SimulatorDied, UserError
from embodied_rl.simulators.base import WAIT, ResetSchedule, Simulator
from embodied_rl.simulators.chunk import Frame, Ledger, check_reset, check_send
from embodied_rl.simulators.rows import Block, block_fields
from embodied_rl.simulators.shared_arrays import SharedMemory
from embodied_rl.simulators.worker import Channel, Kind, Message, ProtocolError, Specs
from embodied_rl.types import ChunkResult, Observation

_CANNOT_IMPORT = 78
# The package is loaded from its folder alone: the folder around it may hold another Python's site-packages.
_BOOTSTRAP = f"""
import importlib.util, sys
folder, *numbers = sys.argv[1:]
try:
    spec = importlib.util.spec_from_file_location(
        "embodied_rl", folder + "/__init__.py", submodule_search_locations=[folder])
    sys.modules["embodied_rl"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["embodied_rl"])
    from embodied_rl.simulators.worker import main
except ImportError as error:
    print(f"{{sys.executable}} cannot run a simulator worker: {{error}}", file=sys.stderr)
    sys.exit({_CANNOT_IMPORT})
main(*map(int, numbers))
"""
_GRACE = 5.0
"""Seconds that workers get to close their simulators."""


class EnvironmentFailed(RuntimeError):
    """An environment raised an exception in its worker; the message holds the worker's traceback."""


class _Died(Exception):
    """A worker ended, hangs, or talks nonsense."""


class WorkerSimulator(Simulator):
    """N environments `target` in `workers` processes that outlive the death of any of them.

    A worker that dies or hangs is replaced and its rows start their tickets again (`ChunkResult.lost`). An observation
    that a call returned stays intact until the second call after it, intermediate and final ones until the next.
    Results do not depend on `workers`.
    """

    def __init__(
        self,
        target: str,
        kwargs: dict[str, Any],
        num_envs: int,
        workers: int,
        schedule: ResetSchedule,
        *,
        log_dir: Path | None = None,
        python: str | None = None,
        python_path: Sequence[str] = (),
        timeout: float = 120.0,
        start_timeout: float = 300.0,
        max_deaths: int = 3,
    ) -> None:
        """`target` is the "module:class" of an `Environment`, constructed with `kwargs` (plain JSON values).

        `python` is another interpreter that has the simulator and numpy; its modules are looked up in `python_path` and
        its own path, those of the default interpreter also wherever this process finds its modules. What workers print
        goes to log_dir/worker-<i>.log. `timeout` bounds every reset and chunk, `start_timeout` the construction, in
        seconds. Raises `UserError` for a target that cannot be loaded, `SimulatorDied` when a worker dies while
        it starts, or after more than `max_deaths` deaths in all.
        """
        if not 1 <= workers <= num_envs:
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
        self._closed = False
        self._memory = SharedMemory()
        bounds = [num_envs * i // workers for i in range(workers + 1)]
        self._workers = [
            _Worker(i, slice(bounds[i], bounds[i + 1]), order, python or sys.executable, log_dir)
            for i in range(workers)
        ]
        try:
            specs = self._start(self._workers)
            self.observation_spec, self.action_spec, self.tasks = specs.observation, specs.action, specs.tasks
            self._ledger = Ledger(num_envs, self.tasks, schedule)
            self._robbed = np.zeros(num_envs, bool)  # rows that lost their episode outside of a chunk
            self._buffer = 0
            self._allocate(chunk=16, every=False)
        except BaseException:
            self.close()
            raise

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
        dead = self._collect(self._workers)
        (chunk, next_tickets, every), self._in_flight = self._in_flight, None
        steps, frame = self._block.steps[self._buffer][:, :chunk], self._block.frames[self._buffer]
        lost = self._robbed.copy()
        self._robbed[:] = False
        for worker in dead:
            steps[worker.rows].clear()
            lost[worker.rows] = self._ledger.tickets[worker.rows] != WAIT
        intermediate: list[Frame] | None = None
        if every:
            intermediate = [{name: array[k] for name, array in self._block.every.items()} for k in range(chunk)]
        result = self._ledger.close_chunk(steps, next_tickets, frame, self._block.final, lost, intermediate)
        self._replace(dead)
        for worker in dead:
            for name, array in self._block.every.items() if every else ():
                array[:chunk, worker.rows] = frame[name][worker.rows]
        return result

    def close(self) -> None:
        """End the workers, by force after a few seconds; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._send(self._workers, Message(Kind.CLOSE, self._next()))
        deadline = time.monotonic() + _GRACE
        for worker in self._workers:
            worker.close(deadline)
        self._memory.close()

    def _order_reset(self, workers: Sequence[_Worker], which: np.ndarray) -> list[_Worker]:
        """Let `workers` reset those of their rows that are in `which` [N] and run a ticket; returns the dead."""
        for worker in workers:
            rows = worker.rows
            self._block.run[rows] = which[rows] & (self._ledger.tickets[rows] != WAIT)
            self._block.states[rows] = self._ledger.states[rows]
        self._send(workers, Message(Kind.RESET, self._next(), self._buffer))
        return self._collect(workers)

    def _replace(self, dead: list[_Worker]) -> None:
        """Start new processes for `dead` workers, which start the tickets of their rows again."""
        while dead:
            self.deaths += len(dead)
            if self.deaths > self.max_deaths:
                raise SimulatorDied(f"{self.deaths} worker deaths; the last: {dead[-1].obituary()}")
            self._start(dead)
            self._send(dead, self._map)
            dead = self._order_reset(dead, np.ones(self.num_envs, bool))

    def _start(self, workers: Sequence[_Worker]) -> Specs:
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
            except _Died as death:
                worker.kill(death)
                if worker.exit_code == _CANNOT_IMPORT:
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

    def _send(self, workers: Iterable[_Worker], message: Message) -> None:
        for worker in workers:
            worker.send(message, self.timeout)

    def _collect(self, workers: Iterable[_Worker]) -> list[_Worker]:
        """Wait for the answers to the last message; returns the workers that died instead. Raises what an environment
        raised, after all have answered."""
        deadline = time.monotonic() + self.timeout
        dead: list[_Worker] = []
        failure: Exception | None = None
        for worker in workers:
            try:
                worker.answer(self._sequence, deadline)
            except _Died as death:
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
        if self._closed:
            raise RuntimeError("the simulator is closed")


@dataclass
class _Process:
    """One incarnation of a worker."""

    popen: subprocess.Popen[bytes]
    channel: Channel


class _Worker:
    """The parent's handle of one worker: its rows, its current process and what that printed."""

    def __init__(self, index: int, rows: slice, order: dict[str, Any], python: str, log_dir: Path | None) -> None:
        self.rows = rows
        self.order = order | {"first": rows.start, "count": rows.stop - rows.start}
        self.exit_code: int | None = None
        self._name = f"worker {index} (environments {rows.start}-{rows.stop - 1})"
        self._python = python
        self._epoch = 0
        self._process: _Process | None = None
        self._death: _Died | None = None
        self._log: BinaryIO
        if log_dir is None:
            self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115
        else:
            log_dir.mkdir(parents=True, exist_ok=True)
            self._log = open(log_dir / f"worker-{index}.log", "a+b")  # noqa: SIM115 - lives as long as the worker

    def spawn(self, memory: int) -> None:
        """Start a process; returns at once."""
        self._epoch += 1
        ours, theirs = socket.socketpair()
        numbers = [theirs.fileno(), memory, self._epoch, os.getpid()]
        command = [self._python, "-c", _BOOTSTRAP, str(Path(embodied_rl.__file__).parent), *map(str, numbers)]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        try:
            popen = _spawn(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(theirs.fileno(), memory),
                env=os.environ | threads | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # so that whatever the simulator starts can be killed with it
            )
        except OSError as error:
            ours.close()
            raise UserError(f"the simulator's interpreter {self._python} cannot be started: {error}") from error
        finally:
            theirs.close()
        self._process = _Process(popen, Channel(ours, self._epoch))

    def send(self, message: Message, timeout: float) -> None:
        """A dead worker is noticed by `answer`."""
        if self._process:
            with contextlib.suppress(OSError):
                self._process.channel.send(message, timeout)

    def answer(self, sequence: int, deadline: float) -> Message:
        """The answer to message `sequence`. Raises `_Died`, or what the environment raised."""
        if self._process is None:
            raise self._death or _Died("never started")
        try:
            message = self._process.channel.receive(deadline)
            while message.sequence < sequence:  # to a call that was abandoned
                message = self._process.channel.receive(deadline)
            if message.sequence > sequence or message.kind not in (Kind.DONE, Kind.ERROR):
                raise ProtocolError(f"{message.kind.name} number {message.sequence}")
        except TimeoutError:
            raise _Died("did not answer in time") from None
        except (EOFError, OSError):
            raise _Died("ended") from None
        except ProtocolError as error:
            raise _Died(f"does not keep to the protocol ({error})") from None
        if message.kind is Kind.ERROR:
            error = json.loads(message.payload)
            raise UserError(error["text"]) if error["user"] else EnvironmentFailed(f"{self._name}:\n{error['text']}")
        return message

    def kill(self, death: _Died) -> None:
        """Make sure that the process and all it started are gone."""
        if self._process is None:
            return
        self._death = death
        pid = self._process.popen.pid
        with contextlib.suppress(ProcessLookupError):
            if str(death).startswith("did not"):
                os.kill(pid, signal.SIGUSR1)  # faulthandler writes to the log where it hangs
                time.sleep(0.1)
        self._end()

    def close(self, deadline: float) -> None:
        """Wait for the process until `deadline`, then kill it; release everything."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.popen.wait(max(0.0, deadline - time.monotonic()))
            self._end()
        self._log.close()

    def tail(self) -> str:
        """The last lines that the worker printed."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4000))
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-30:])

    def obituary(self) -> str:
        """How the last process ended."""
        code = self.exit_code
        end = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return f"{self._name} {self._death} ({end}); its last output:\n{self.tail() or '(none)'}"

    def _end(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.popen.pid, signal.SIGKILL)
        self.exit_code = self._process.popen.wait()
        self._process.channel.close()
        self._process = None


class _Spawner:
    """Starts processes from one thread that lives as long as this process: Linux kills a worker (PR_SET_PDEATHSIG) when
    the *thread* that started it ends, and a simulator may well be built in a thread that ends early."""

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)  # a fork has no such thread

    def __call__(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return self._thread.submit(lambda: subprocess.Popen[bytes](command, **options)).result(timeout=60)

    def _renew(self) -> None:
        self._thread = ThreadPoolExecutor(1, "simulator-spawner")


_spawn = _Spawner()

"""The parent's side of one simulator worker: its process, its socket, its log."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import embodied_rl
from embodied_rl.errors import UserError
from embodied_rl.simulators.worker import Channel, Kind, Message, ProtocolError

CANNOT_IMPORT = 78
"""Exit code of an interpreter that lacks numpy or cannot load this package."""

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
    sys.exit({CANNOT_IMPORT})
main(*map(int, numbers))
"""


class EnvironmentFailed(RuntimeError):
    """An environment raised an exception in its worker; the message holds the worker's traceback."""


class WorkerDied(Exception):
    """A worker ended, hangs, or talks nonsense."""


class WorkerHangs(WorkerDied):
    """A worker that runs, but not for us."""


def checked(message: Message, name: str) -> Message:
    """`message`, unless it says that an environment of the worker `name` failed: then raises what that raised."""
    if message.kind is not Kind.ERROR:
        return message
    error = json.loads(message.payload)
    raise UserError(error["text"]) if error["user"] else EnvironmentFailed(f"{name}:\n{error['text']}")


@dataclass
class _Process:
    """One incarnation of a worker."""

    popen: subprocess.Popen[bytes]
    channel: Channel
    built: bool = False


class WorkerProcess:
    """The parent's handle of one worker: its rows, its current process and what that printed."""

    def __init__(
        self, index: int, rows: slice, order: dict[str, Any], python: str, log_dir: Path | None, eager: bool
    ) -> None:
        """`eager`: see `Channel`."""
        self.rows = rows
        self.order = order | {"first": rows.start, "count": rows.stop - rows.start}
        self.exit_code: int | None = None
        self._name = f"worker {index} (environments {rows.start}-{rows.stop - 1})"
        self._python = python
        self._eager = eager
        self._epoch = 0
        self._process: _Process | None = None
        self._death: WorkerDied | None = None
        self._log: BinaryIO
        if log_dir is None:
            self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115
        else:
            log_dir.mkdir(parents=True, exist_ok=True)
            self._log = open(log_dir / f"worker-{index}.log", "a+b")  # noqa: SIM115 - lives as long as the worker

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._process.popen.pid if self._process else None

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
        self._process = _Process(popen, Channel(ours, self._epoch, eager=self._eager, runs=self._runs))
        self._pulse = Pulse(popen.pid)

    def send(self, message: Message, timeout: float) -> None:
        """A dead worker is noticed by `answer`."""
        if self._process:
            with contextlib.suppress(OSError):
                self._process.channel.send(message, timeout)

    def answer(self, sequence: int, deadline: float) -> Message:
        """The answer to message `sequence`. Raises `WorkerDied`, or what the environment raised."""
        if self._process is None:
            raise self._death or WorkerDied("never started")
        try:
            message = self._process.channel.receive(deadline)
            while message.sequence < sequence:  # to a call that was abandoned
                message = self._process.channel.receive(deadline)
            if message.sequence > sequence or message.kind not in (Kind.DONE, Kind.ERROR):
                raise ProtocolError(f"{message.kind.name} number {message.sequence}")
        except TimeoutError:
            raise WorkerHangs("did not answer in time, or stood still") from None
        except (EOFError, OSError):
            raise WorkerDied("ended") from None
        except ProtocolError as error:
            raise WorkerDied(f"does not keep to the protocol ({error})") from None
        self._process.built = True
        return checked(message, self._name)

    def kill(self, death: WorkerDied) -> None:
        """Make sure that the process and all it started are gone."""
        if self._process is None:
            return
        self._death = death
        if isinstance(death, WorkerHangs):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.popen.pid, signal.SIGUSR1)  # faulthandler writes to the log where it hangs
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

    def _runs(self) -> bool:
        """Whether an answer may still come. While a simulator is built it may wait for others, as for a lock."""
        return self._process is None or not self._process.built or self._pulse()

    def _end(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.popen.pid, signal.SIGKILL)
        self.exit_code = self._process.popen.wait()
        self._process.channel.close()
        self._process = None


class Pulse:
    """Asked twice, whether a process, or any of its session, has run in between; where there is no /proc to tell, it
    has. A simulator that computes or polls runs; one that was stopped, or waits for itself, does not."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seen = 0

    def __call__(self) -> bool:
        before, self._seen = self._seen, self._nanoseconds()
        return self._seen != before or self._seen == 0

    def _nanoseconds(self) -> int:
        """On a processor, of all threads."""
        total = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # ended just now
                if int(stat.read_text().rpartition(")")[2].split()[3]) == self._pid:
                    total += sum(int(task.read_text().split()[0]) for task in stat.parent.glob("task/*/schedstat"))
        return total


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

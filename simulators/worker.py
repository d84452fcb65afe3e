"""The child side of `WorkerSimulator`: a process that runs a few environments.

Started as a plain subprocess with two inherited descriptors: a socket for small messages and a file for the arrays.
Nothing is pickled: messages are a fixed header and at times JSON. Every message carries the epoch (the incarnation of
the worker) and a sequence number that the answer repeats, so an old answer can never be taken for a current one.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import math
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, NamedTuple, cast

from embodied_rl.errors import UserError
from embodied_rl.simulators.base import BatchedEnvironment
from embodied_rl.simulators.batched_rows import BatchedRows
from embodied_rl.simulators.rows import Rows
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec, TaskSpec

_MAGIC = b"erl1"
_HEADER = struct.Struct("<4sIQBBBxII")  # magic, epoch, sequence, kind, buffer, every, chunk, payload length
_LONGEST = 2**26
_PR_SET_PDEATHSIG = 1
_SOON = 1e-3
"""Seconds."""
_BEAT = 10.0
"""Seconds between questions whether the other side still runs."""


class Kind(IntEnum):
    """What a message says."""

    BUILD = 1
    """To the worker: construct the environments; the answer holds their specs."""
    MAP = 2
    """To the worker: where in the file the arrays are; not answered."""
    RESET = 3
    CHUNK = 4
    CLOSE = 5
    DONE = 6
    """From the worker: the arrays hold the result."""
    ERROR = 7
    """From the worker: {"user": bool, "text": message or traceback}."""


_KINDS = {int(kind): kind for kind in Kind}


class ProtocolError(Exception):
    """The other side sent bytes that are no message of this conversation."""


class Message(NamedTuple):
    kind: Kind
    sequence: int
    buffer: int = 0
    """Which of the two sets of result arrays to fill."""
    every: bool = False
    """Observe after every action."""
    chunk: int = 0
    """K."""
    payload: bytes = b""


class Channel:
    """Messages over a stream socket, every wait with a deadline."""

    def __init__(
        self,
        connection: socket.socket,
        epoch: int,
        *,
        deadlines: bool = True,
        eager: bool = False,
        runs: Callable[[], bool] = lambda: True,
    ) -> None:
        """`deadlines` only where one is given to every call; without, waiting is one system call. `eager` to stay awake
        for a message when the last one came within `_SOON`: going to sleep and waking up takes as long as what a cheap
        simulator does. `runs`, asked now and then in a long wait: whether the other side does anything."""
        self._socket = connection
        self._socket.setblocking(not deadlines)
        self._poll = select.poll()
        self._epoch = epoch
        self._eager = eager
        self._runs = runs
        self._soon = False  # whether the last message came within `_SOON`

    def send(self, message: Message, timeout: float | None) -> None:
        """Raises OSError when the other side is gone or does not read within `timeout` seconds."""
        header = _HEADER.pack(
            _MAGIC,
            self._epoch,
            message.sequence,
            message.kind,
            message.buffer,
            message.every,
            message.chunk,
            len(message.payload),
        )
        deadline = None if timeout is None else time.monotonic() + timeout
        rest = memoryview(header + message.payload)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)

    def receive(self, deadline: float | None) -> Message:
        """The next message. Raises TimeoutError after `deadline` (`time.monotonic`) or when the other side does nothing
        any more, EOFError or another OSError when
        the other side is gone, ProtocolError when what came is no message of this epoch."""
        header = self._read(_HEADER.size, deadline)
        magic, epoch, sequence, kind, buffer, every, chunk, length = _HEADER.unpack(header)
        if magic != _MAGIC or epoch != self._epoch or kind not in _KINDS or length > _LONGEST:
            raise ProtocolError(f"unexpected bytes {header[:16].hex()}")
        payload = self._read(length, deadline) if length else b""
        return Message(_KINDS[kind], sequence, buffer, bool(every), chunk, payload)

    def close(self) -> None:
        self._socket.close()

    def _read(self, count: int, deadline: float | None) -> bytes:
        parts = bytearray()
        awake_until = time.monotonic() + _SOON if self._eager else 0.0
        while len(parts) < count:
            # What has already come is read even past the deadline: it may have passed while waiting for another worker.
            try:
                part = self._socket.recv(count - len(parts))
            except BlockingIOError:
                if self._soon and time.monotonic() < awake_until:
                    os.sched_yield()
                else:
                    self._wait(select.POLLIN, deadline)
                continue
            if not part:
                raise EOFError
            parts += part
        self._soon = time.monotonic() < awake_until
        return bytes(parts)

    def _wait(self, event: int, deadline: float | None) -> None:
        """Sleep until the socket is ready for `event`; raises TimeoutError when it is not before `deadline`, or the
        other side has fallen asleep."""
        assert deadline is not None  # without deadlines the socket itself waits
        self._poll.register(self._socket, event)
        while True:
            left = deadline - time.monotonic()
            if self._poll.poll(max(math.ceil(1e3 * min(left, _BEAT)), 1)):
                return
            if left <= _BEAT or not self._runs():
                raise TimeoutError


@dataclass(frozen=True)
class Specs:
    """What a worker tells about its environments."""

    observation: ObservationSpec
    action: ActionSpec
    tasks: tuple[TaskSpec, ...]

    def to_json(self) -> bytes:
        return json.dumps(
            {
                "observation": asdict(self.observation),
                "action": asdict(self.action),
                "tasks": [asdict(task) for task in self.tasks],
            }
        ).encode()

    @staticmethod
    def from_json(text: bytes) -> Specs:
        data = json.loads(text)
        observation = _tuples(data["observation"])
        observation["cameras"] = {name: CameraSpec(**camera) for name, camera in observation["cameras"].items()}
        return Specs(
            ObservationSpec(**observation),
            ActionSpec(**_tuples(data["action"])),
            tuple(TaskSpec(**task) for task in data["tasks"]),
        )


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def main(connection: int, memory: int, epoch: int, parent: int) -> None:
    """Serve the process `parent` until it says CLOSE or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # asked for before a worker that hangs is killed
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # Whoever wakes this process goes on deciding, rather than being interrupted by it.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    if os.getppid() != parent:
        return  # it died before the line above could notice
    channel = Channel(socket.socket(fileno=connection), epoch, deadlines=False)
    try:
        _serve(channel, memory)
    except (EOFError, ConnectionError):
        return  # the parent is gone, and with it whoever could use an answer
    # Simulators are known to crash in their exit handlers, after all is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _serve(channel: Channel, memory: int) -> None:
    server = Server(memory)
    while (message := channel.receive(None)).kind is not Kind.CLOSE:
        answer = server.carry_out(message)
        if answer is not None:
            channel.send(answer, None)
    server.close()


class Server:
    """Does what messages say to the environments of one worker, whose arrays are in `memory`."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._rows: Rows | BatchedRows = Rows([], 0, memory)

    def carry_out(self, message: Message) -> Message | None:
        """The answer, if there is to be one."""
        payload = b""
        try:
            match message.kind:
                case Kind.BUILD:
                    self._rows, payload = _build(self._memory, json.loads(message.payload))
                case Kind.MAP:
                    self._rows.map(json.loads(message.payload))
                    return None
                case Kind.RESET:
                    self._rows.reset(message.buffer)
                case Kind.CHUNK:
                    self._rows.chunk(message.buffer, message.chunk, message.every)
        except Exception as error:
            user = isinstance(error, UserError)
            text = str(error) if user else traceback.format_exc()
            payload = json.dumps({"user": user, "text": text}).encode()
            return Message(Kind.ERROR, message.sequence, payload=payload)
        return Message(Kind.DONE, message.sequence, payload=payload)

    def close(self) -> None:
        self._rows.close()


def _build(memory: int, order: dict[str, Any]) -> tuple[Rows | BatchedRows, bytes]:
    """Construct the environments of `order` = {"target", "kwargs", "count", "first", "path"}."""
    sys.path[:] = order["path"] + [entry for entry in sys.path if entry not in order["path"]]
    module, _, name = order["target"].partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"'{order['target']}' cannot be loaded with {sys.executable}: {error}") from error
    try:
        return _construct(make, memory, order)
    except ModuleNotFoundError as error:  # adapters import their simulator when they are constructed
        raise UserError(f"'{order['target']}' does not run with {sys.executable}: {error}") from error


def _construct(make: Any, memory: int, order: dict[str, Any]) -> tuple[Rows | BatchedRows, bytes]:
    rows: Rows | BatchedRows
    first: Any
    if isinstance(make, type) and issubclass(make, BatchedEnvironment):
        first = cast("Any", make)(num_envs=order["count"], **order["kwargs"])
        rows = BatchedRows(first, order["first"], memory)
    else:
        environments = [make(**order["kwargs"]) for _ in range(order["count"])]
        rows = Rows(environments, order["first"], memory)
        first = environments[0]
    return rows, Specs(first.observation_spec, first.action_spec, tuple(first.tasks)).to_json()

"""A worker without a process of its own."""

from __future__ import annotations

from embodied_rl.simulators.worker import Kind, Message, Server
from embodied_rl.simulators.worker_process import WorkerProcess, checked


class LocalWorker(WorkerProcess):
    """Does in this process, and at once, what a `WorkerProcess` has done in another: nothing is exchanged, and nothing
    protects this process from what the environments do to it."""

    _server: Server | None = None
    _answer: Message | None = None

    def spawn(self, memory: int) -> None:
        self._server = Server(memory)

    def send(self, message: Message, timeout: float) -> None:
        if self._server and message.kind is not Kind.CLOSE:
            self._answer = self._server.carry_out(message)

    def answer(self, sequence: int, deadline: float) -> Message:
        assert self._answer is not None and self._answer.sequence == sequence
        return checked(self._answer, self._name)

    def close(self, deadline: float) -> None:
        if self._server:
            self._server.close()
            self._server = None
        super().close(deadline)

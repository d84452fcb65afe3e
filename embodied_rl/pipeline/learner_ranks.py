"""Learning in several processes of this machine: what a minibatch asks for is split over them.

Every rank holds the algorithm, draws the same minibatches and applies the same step; it differentiates its share of the
rows, and gradients and metrics are added up (`pipeline.learner_sharing`). So the numbers are those of one process, up
to the rounding of sums in another order. The batch is written once, to memory that all ranks map, and so are the
trained weights that come back.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch

from embodied_rl.algorithms.base import Metrics
from embodied_rl.algorithms.policy_gradient import Batch, PolicyGradient
from embodied_rl.config import PipelineConfig, component_to_dict
from embodied_rl.errors import LearnerDied, LearnerRaised, UserError
from embodied_rl.pipeline.learner_channel import Channel, Memory, Message
from embodied_rl.pipeline.learning import LONGEST
from embodied_rl.simulators.worker import Specs

START = 300.0
"""Seconds that the ranks get to start and to meet: they import torch, all at once."""
SILENCE = 20.0
"""Seconds without a sign of life after which a rank is taken for stuck."""
_GRACE = 1.0
"""Seconds that the others get to say what happened: the first to fail is the cause."""

_BOOTSTRAP = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from embodied_rl.pipeline.learner_rank import main
main(int(sys.argv[1]))
"""


class LearnerRanks:
    """`count` processes; raises what they raise, and none is left after that. They start beside what goes on: `meet`
    them before anything else, or enter the block that this manages."""

    def __init__(self, count: int, device: torch.device, log_dir: Path | None = None) -> None:
        """They compute on devices of the kind of `device`, each on its own where there are enough."""
        self._batch = Memory()
        self._state: Memory | None = None
        """Where the ranks read what they start from, until the first batch."""
        self._second: Memory | None = None
        """Where they read the dataset of co-training."""
        self._selector = selectors.DefaultSelector()
        self._folder = tempfile.TemporaryDirectory(prefix="embodied_rl-learners-")
        self._ranks: list[_Process] = []
        try:
            for rank in range(count):
                self._ranks.append(_Process(rank, count, log_dir))
                self._selector.register(self._ranks[rank].channel.socket, selectors.EVENT_READ, self._ranks[rank])
            store = str(Path(self._folder.name) / "store")
            for rank, process in enumerate(self._ranks):
                process.send(_order("join", rank=rank, ranks=count, store=store, device=device.type))
        except BaseException:
            self.close()
            raise
        self._algorithm: PolicyGradient | None = None

    @property
    def pids(self) -> list[int]:
        """Of the ranks."""
        return [process.popen.pid for process in self._ranks]

    def meet(self) -> None:
        """Wait until all have started."""
        try:
            self._answer(START, SILENCE + START)
        except BaseException:
            self.close()
            raise

    def build(
        self,
        algorithm: PolicyGradient,
        policy: Any,
        specs: Specs,
        seed: int,
        pipeline: PipelineConfig,
    ) -> None:
        """Make a policy from its configuration `policy`, and an algorithm as `algorithm` is configured. Raises
        `UserError` for what cannot be made elsewhere."""
        self._ask(
            "build",
            policy=component_to_dict(policy),
            algorithm=component_to_dict(algorithm.config),
            specs=specs.to_json().decode(),
            seed=seed,
            sharding=pipeline.sharding,
            precision=pipeline.precision,
        )

    def take_over(self, algorithm: PolicyGradient) -> None:
        """From now on `algorithm`, like which they are built, improves here, and its policy gets the new weights after
        every batch; its optimizers give their states away."""
        if (second := algorithm.cotraining) is not None:
            self._second = Memory()
            told = {"beta": second.beta, "batch_size": second.batch_size, "seed": second.seed}
            self._ask("cotrain", self._second, data=second.data, **told)
        self._state = Memory()
        self._ask(
            "load",
            self._state,
            policy=dict(algorithm.policy.state_dict()),
            modules={name: dict(module.state_dict()) for name, module in algorithm.modules().items()},
            optimizers={name: each.state_dict() for name, each in algorithm.optimizers().items()},
            counters=algorithm.counters(),
        )
        for optimizer in algorithm.optimizers().values():
            optimizer.state.clear()
        self._algorithm = algorithm
        algorithm.improve_elsewhere = self._improve

    def optimizers(self) -> dict[str, Any]:
        """The states of the optimizers, whole, by name: what `state_dict` gives in one process. To be read or copied
        before anything else is asked for."""
        return self._ask("optimizers")

    def close(self) -> None:
        """End the ranks; may be called twice."""
        self._selector.close()
        while self._ranks:
            self._ranks.pop().end()
        self._folder.cleanup()

    def __enter__(self) -> LearnerRanks:
        self.meet()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @torch.no_grad()
    def _improve(self, data: Batch, version: int, generator: torch.Generator) -> Metrics:
        algorithm = self._algorithm
        assert algorithm is not None
        found = self._ask("improve", self._batch, data=data, version=version, generator=generator.get_state())
        self._state = None
        generator.set_state(found["generator"].clone())
        algorithm.load_counters(found["counters"])
        parameters = dict(algorithm.policy.named_parameters())
        for name, weights in found["weights"].items():
            parameters[name].copy_(weights)
        return found["metrics"]

    def _ask(self, what: str, memory: Memory | None = None, **arguments: Any) -> Any:
        """What rank 0 answers, when all have."""
        if not self._ranks:
            raise LearnerDied("the learner ranks have ended: resume the run to go on from its last checkpoint")
        order = _order(what, memory, **arguments)
        try:
            for process in self._ranks:
                process.send(order)
            return self._answer(LONGEST, SILENCE)
        except BaseException:  # Ctrl-C, too: they would answer something else next time
            self.close()
            raise

    def _answer(self, longest: float, silence: float) -> Any:
        answers: dict[int, Any] = {}
        failures: list[tuple[float, BaseException]] = []
        began = time.monotonic()
        until = began + longest
        for process in self._ranks:
            process.heard = began
        while len(answers) < len(self._ranks) and time.monotonic() < until:
            for key, _ in self._selector.select(0.2):
                try:
                    message = key.data.channel.receive()
                except (EOFError, OSError):
                    self._selector.unregister(key.fileobj)
                    failures.append((0.0, key.data.died()))  # nothing else explains such an end
                    continue
                key.data.heard = time.monotonic()
                if "answer" in message:
                    answers[key.data.rank] = message["answer"]
                elif "error" in message:
                    failures.append((message["at"], key.data.failed(message)))
            now = time.monotonic()
            waited_for = [process for process in self._ranks if process.rank not in answers]
            if not failures:
                failures += [(now, process.stuck()) for process in waited_for if now - process.heard > silence]
            if failures:
                until = min(until, now + _GRACE)
        if failures:
            raise min(failures, key=lambda failure: failure[0])[1]
        if len(answers) < len(self._ranks):
            raise LearnerDied(f"the learner ranks did not answer within {longest / 60:.0f} minutes")
        return answers[0]


class _Process:
    """One rank as its run sees it."""

    def __init__(self, rank: int, ranks: int, log_dir: Path | None) -> None:
        self.rank = rank
        self.heard = 0.0
        """When it last said something."""
        self._name = f"learner rank {rank} of {ranks}"
        self._log: BinaryIO
        if log_dir is None:
            self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115
        else:
            log_dir.mkdir(parents=True, exist_ok=True)
            self._log = open(log_dir / f"learner-{rank}.log", "a+b")  # noqa: SIM115 - lives as long as the rank
        ours, theirs = socket.socketpair()
        loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        with theirs:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, str(theirs.fileno()), json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(theirs.fileno(),),
                env=os.environ | loopback,
                start_new_session=True,
            )
        self.channel = Channel(ours)

    def send(self, order: Message) -> None:
        """A dead rank is noticed when its answer is waited for."""
        with contextlib.suppress(OSError):
            self.channel.send(order)

    def died(self) -> LearnerDied:
        """Why there is nothing more to be heard."""
        try:
            code = self.popen.wait(5)
        except subprocess.TimeoutExpired:
            return LearnerDied(f"{self._name} closed its connection; {self._advice()}")
        end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return LearnerDied(f"{self._name} ended ({end}); {self._advice()}")

    def failed(self, message: dict[str, Any]) -> BaseException:
        """What it raised."""
        return UserError(message["error"]) if message["user"] else LearnerRaised(f"{self._name}:\n{message['error']}")

    def stuck(self) -> LearnerDied:
        """It runs, but not for us."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.popen.pid, signal.SIGUSR1)  # faulthandler writes to the log where it hangs
        time.sleep(0.1)
        return LearnerDied(f"{self._name} gave no sign of life for {SILENCE:.0f} seconds; {self._advice()}")

    def end(self) -> None:
        """Make sure that it is gone."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()
        self.channel.close()
        self._log.close()

    def _advice(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4000))
        printed = "\n".join(self._log.read().decode(errors="replace").splitlines()[-30:])
        return f"resume the run to go on from its last checkpoint. Its last output:\n{printed or '(none)'}"


def _order(what: str, memory: Memory | None = None, **arguments: Any) -> Message:
    return Message({"do": what, "with": arguments}, memory)

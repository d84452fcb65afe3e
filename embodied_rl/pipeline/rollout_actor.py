"""The far side of a rollout worker on Ray: a share of the environments, and a replica of the policy next to them."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from embodied_rl.pipeline.env_groups import build_simulator, rollout_worker
from embodied_rl.pipeline.rollout import RolloutWorker
from embodied_rl.pipeline.tickets import Dealt, RowTickets
from embodied_rl.pipeline.transfer import pack
from embodied_rl.pipeline.weights import take_over
from embodied_rl.simulators.base import ResetSchedule, Simulator
from embodied_rl.simulators.worker import Specs
from embodied_rl.types import EpisodeBatch, Trajectory


class Versioned(NamedTuple):
    """An object that is fetched only by those who have another version of it."""

    version: int
    references: list[Any]


@dataclass
class Order:
    """A call of a rollout worker's method, and what must be the case before."""

    structure: Versioned
    """(who orders, `Structure`, connection, seed); frozen weights."""
    weights: Versioned
    """A `bucket` for it."""
    method: str
    arguments: tuple[Any, ...]
    """For `apart` without the policy, which is the one that is here."""
    sources: list[RowTickets] | None
    """Begin fresh episodes with these; None goes on."""
    sequence: int = 0
    """Counts the orders of all workers."""


@dataclass
class Reply:
    """What became of an order."""

    worker: int
    epoch: int
    sequence: int
    result: Any
    """Of the call; a batch is packed."""
    env_steps: int
    """Made by the order."""
    lost_episodes: int
    deaths: int
    """Of simulator processes, so far."""
    sources: Sequence[Any] | None
    """Where the rows' tickets are now."""


class RolloutActor:
    """One incarnation of rollout worker `index`; what it prints goes to the file `log`, and it also finds the modules
    that are in `path`."""

    def __init__(self, index: int, epoch: int, log: Path | None, path: list[str]) -> None:
        sys.path += [folder for folder in path if folder not in sys.path]
        self._name = index, epoch
        self._simulator: Simulator | None = None
        self._worker: RolloutWorker | None = None
        self._master = self._structure = self._weights = 0
        self._sequence = 0
        self._chunks = 0
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.dup2(file, sys.stdout.fileno())
            os.dup2(file, sys.stderr.fileno())
        faulthandler.enable()

    def start(
        self, simulator: Any, groups: int, schedule: ResetSchedule, log_dir: Path | None, device: str
    ) -> tuple[Specs, int, str]:
        """Start the environments, in place of those that there were; their specs, and the ids of this process and its
        Ray node."""
        import ray

        if self._simulator is not None:
            self._simulator.close()
        self._simulator = self._worker = None  # not two in memory
        self._structure = 0
        self._device = torch.device(device)
        self._simulator = build_simulator(simulator, groups, schedule, log_dir)
        parts: Sequence[Any] = getattr(self._simulator, "groups", ())
        for each in (self._simulator, *parts):
            each.receive = self._counting(each)
        built = self._simulator
        specs = Specs(built.observation_spec, built.action_spec, built.tasks)
        return specs, os.getpid(), ray.get_runtime_context().get_node_id()

    def progress(self) -> int:
        """Chunks waited for so far: whoever makes some is not stuck."""
        return self._chunks

    @torch.no_grad()
    def run(self, order: Order) -> Reply:
        """Each order is executed once."""
        if order.sequence <= self._sequence:
            raise RuntimeError(f"order {order.sequence} came after order {self._sequence}")
        self._sequence = order.sequence
        torch.set_num_threads(1)
        worker = self._ready(order)
        steps, lost = worker.env_steps, worker.lost_episodes
        if order.sources is not None:
            worker.restart(Dealt(order.sources))
        mine = (worker.policy,) if order.method == "apart" else ()
        result = getattr(worker, order.method)(*mine, *order.arguments)
        return Reply(
            *self._name,
            order.sequence,
            pack(result) if isinstance(result, Trajectory | EpisodeBatch) else result,
            worker.env_steps - steps,
            worker.lost_episodes - lost,
            worker.simulator.deaths,
            worker.sources if order.method == "collect" else None,
        )

    def _ready(self, order: Order) -> RolloutWorker:
        """The worker, acting by the weights that the order asks for."""
        import ray

        assert self._simulator is not None
        if order.structure.version != self._structure:
            (master, structure, connection, seed), weights = ray.get(order.structure.references)
            if self._worker is not None:
                self._worker.policy = None  # type: ignore[assignment] - not two in memory
            policy = structure.complete(weights, self._device)
            if self._worker is None or master != self._master:
                self._worker = rollout_worker(self._simulator, policy, connection, seed)
            self._worker.policy = policy
            self._master, self._structure, self._weights = master, order.structure.version, 0
        assert self._worker is not None
        if order.weights.version != self._weights:
            take_over(self._worker.policy, *ray.get(order.weights.references))
            self._weights = order.weights.version
        return self._worker

    def _counting(self, simulator: Simulator) -> Callable[[], Any]:
        receive = simulator.receive

        def counted() -> Any:
            self._chunks += 1
            return receive()

        return counted

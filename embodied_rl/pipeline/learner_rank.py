"""One of the processes that learn together: it builds the policy and the algorithm of the run, differentiates its rows
of every minibatch, and says what became of the weights.

It does what it is told by the process that started it (`pipeline.learner_ranks`) and ends with it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import threading
import time
import traceback
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils import _pytree as pytree

from embodied_rl.algorithms.cotraining import CoTraining
from embodied_rl.algorithms.optimization import Differentiation
from embodied_rl.algorithms.policy_gradient import Batch, PolicyGradient, select, tree_map
from embodied_rl.config import component_from_dict
from embodied_rl.errors import UserError
from embodied_rl.pipeline.learner_channel import Channel, Memory, Message
from embodied_rl.pipeline.learner_sharing import (
    DataParallel,
    FullyShardedDataParallel,
    called_layers,
    load_optimizer,
    replace_parameters,
    shard,
    whole,
)
from embodied_rl.simulators.worker import Specs

COLLECTIVE = 300.0
"""Seconds after which ranks that wait for one another are taken for stuck. A rank that dies is noticed at once."""
BEAT = 2.0
"""Seconds between the signs of life of a rank that works."""


class Rank:
    """What a message asks for is the method of its name. What rank 0 answers is everybody's answer."""

    algorithm: PolicyGradient

    def join(self, rank: int, ranks: int, store: str, device: str) -> dict[str, Any]:
        """Meet the others."""
        if device == "cuda":
            torch.cuda.set_device(rank % torch.cuda.device_count())
        else:
            torch.set_num_threads(1)  # as the run does
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=dist.FileStore(store, ranks),  # pyright: ignore[reportPrivateImportUsage]
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=COLLECTIVE),
        )
        self.first = rank == 0
        self.device = torch.device(device)
        return {}

    def build(
        self, policy: dict[str, Any], algorithm: dict[str, Any], specs: str, seed: int, sharding: str, precision: str
    ) -> dict[str, Any]:
        """The policy and the algorithm, as the run does."""
        known = Specs.from_json(specs.encode())
        torch.manual_seed(seed)
        built = component_from_dict(policy).build(known.observation, known.action).to(self.device)
        self.algorithm = component_from_dict(algorithm).build(built, seed)
        self._sharding, self._precision = sharding, getattr(torch, precision)
        return {}

    def cotrain(self, data: dict[str, Any], beta: float, batch_size: int, seed: int) -> dict[str, Any]:
        """See `CoTraining`; the memory of `data` is read as long as this rank learns."""
        here = tree_map(data, lambda tensor: tensor.to(self.device))
        self.algorithm.cotrain(CoTraining(self.algorithm.policy, here, beta, batch_size, seed))
        return {}

    def load(
        self, policy: dict[str, Any], modules: dict[str, Any], optimizers: dict[str, Any], counters: dict[str, float]
    ) -> dict[str, Any]:
        """Weights and states of the run, whole. The memory of `optimizers` is read until the first batch has shown how
        to split the policy."""
        self.algorithm.policy.load_state_dict(policy)
        for name, module in self.algorithm.modules().items():
            module.load_state_dict(modules[name])
        self.algorithm.load_counters(counters)
        self._loaded: dict[str, Any] | None = optimizers
        return {}

    def improve(self, data: Batch, version: int, generator: Tensor) -> dict[str, Any]:
        """Learn from a batch; the answer holds the trained weights, whole."""
        if self._loaded is not None and len(data["log_prob"]):
            self._split(data, self._loaded)
            self._loaded = None
        shuffling = torch.Generator()
        shuffling.set_state(generator.clone())
        metrics = self.algorithm.improve(data, version, shuffling)
        trained = {name: each for name, each in self.algorithm.policy.named_parameters() if each.requires_grad}
        return {
            "metrics": metrics,
            "generator": shuffling.get_state(),
            "counters": self.algorithm.counters(),
            "weights": self._whole(trained),
        }

    def optimizers(self) -> dict[str, Any]:
        """Their states, whole."""
        if self._loaded is not None:
            return self._loaded
        return {name: self._whole(each.state_dict()) for name, each in self.algorithm.optimizers().items()}

    def _split(self, data: Batch, optimizers: dict[str, Any]) -> None:
        """Begin to share the work."""
        algorithm, policy = self.algorithm, self.algorithm.policy
        if self._sharding == "fsdp2":
            mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
            names = {id(parameter): name for name, parameter in policy.named_parameters()}
            row = {name: data[name] for name in ("inputs", "trace")}
            row = tree_map(select(row, torch.zeros(1, dtype=torch.int64)), lambda tensor: tensor.to(self.device))
            networks: list[Any] = [policy, *algorithm.modules().values()]
            for network in networks:
                layers = called_layers(network, row["inputs"], row["trace"])
                shard(network, layers, mesh, self._precision)
            for optimizer in algorithm.optimizers().values():
                replace_parameters(optimizer, names, policy)
            algorithm.differentiation = FullyShardedDataParallel(self._precision, policy)
        elif dist.get_world_size() > 1:
            algorithm.differentiation = DataParallel(self._precision)
        else:
            algorithm.differentiation = Differentiation(self._precision)
        for name, optimizer in algorithm.optimizers().items():
            load_optimizer(optimizer, optimizers[name])

    def _whole(self, tree: dict[str, Any]) -> dict[str, Any]:
        """With all of every tensor, for rank 0; the others only take part."""

        def gather(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            found = whole(leaf.detach())
            return found.cpu() if self.first else None

        return pytree.tree_map(gather, tree)


def main(connection: int) -> None:
    """Serve the process at the other end of the socket until it says so or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the run decides
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # asked for before a rank that hangs is killed
    channel = Channel(socket.socket(fileno=connection))
    working = threading.Event()
    threading.Thread(target=_live, args=(channel, working), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the run is gone
        _serve(channel, working)
    os._exit(0)  # collectives that others no longer take part in would be waited for


def _serve(channel: Channel, working: threading.Event) -> None:
    rank, memory = Rank(), Memory()
    while True:
        order = channel.receive()
        working.set()
        try:
            answer = getattr(rank, order["do"])(**order["with"])
            message = Message({"answer": answer if rank.first else None}, memory)
        except Exception as error:
            user = isinstance(error, UserError)
            text = str(error) if user else traceback.format_exc()
            message = Message({"error": text, "user": user, "at": time.monotonic()})
        working.clear()
        channel.send(message)


def _live(channel: Channel, working: threading.Event) -> None:
    """Tell the run now and then that this process runs; end it when the run is gone."""
    alive = Message({"alive": True})
    while True:
        working.wait()
        try:
            channel.send(alive)
        except OSError:
            os._exit(1)
        time.sleep(BEAT)

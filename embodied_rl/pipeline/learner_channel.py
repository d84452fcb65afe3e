"""Messages between a run and its learner ranks.

A message is a tree of dicts, lists, plain values and tensors. Its structure travels as JSON through a socket; the
numbers of its tensors are written once, to memory that whoever receives it maps. They are to be read before the answer
is sent, because the next message of the same sender is written over them.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import select
import socket
import struct
import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_HEADER = struct.Struct("<QQ")
"""Bytes of the JSON, bytes of the memory."""
_LINE = 64
"""Every tensor starts on a cache line."""
PATIENCE = 20.0
"""Seconds that a process may take to finish a message that it began to read or to write."""


class Memory:
    """For the tensors of one message after another; leaves nothing in the file system."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("embodied_rl-learner")
        self._block = torch.empty(0, dtype=torch.uint8)

    def __del__(self) -> None:
        os.close(self.descriptor)

    def write(self, tensors: list[Tensor]) -> tuple[list[dict[str, Any]], int]:
        """Copy them in; returns where each lies, and the bytes that they take."""
        where, end = [], 0
        for tensor in tensors:
            kind = str(tensor.dtype).removeprefix("torch.")
            where.append({"at": end, "dtype": kind, "shape": list(tensor.shape)})
            end += -(-tensor.nbytes // _LINE) * _LINE
        if end > len(self._block):
            os.ftruncate(self.descriptor, end)
            self._block = _map(self.descriptor, end)
        for tensor, place in zip(tensors, where, strict=True):
            _view(self._block, place).copy_(tensor.detach())
        return where, end


class Channel:
    """One end of a socket. `send` may be called by several threads."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.settimeout(PATIENCE)
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Raises `OSError` when the other end is gone or does not read."""
        with self._lock:
            socket.send_fds(self.socket, [message.header], message.descriptors)
            self.socket.sendall(message.text)

    def receive(self) -> Any:
        """The next message; waits for it. Raises `EOFError` when the other end is gone, `OSError` in a message."""
        self._readable.poll()
        header, descriptors, _, _ = socket.recv_fds(self.socket, _HEADER.size, 1)
        if len(header) < _HEADER.size:
            raise EOFError
        length, size = _HEADER.unpack(header)
        content = json.loads(self._exactly(length))
        block = torch.empty(0, dtype=torch.uint8)
        for descriptor in descriptors:
            block = _map(descriptor, size)
            os.close(descriptor)
        leaves = [_view(block, leaf) if isinstance(leaf, dict) else leaf for leaf in content["leaves"]]
        return pytree.tree_unflatten(leaves, pytree.treespec_loads(content["tree"]))

    def close(self) -> None:
        self.socket.close()

    def _exactly(self, length: int) -> bytes:
        text = bytearray()
        while len(text) < length:
            part = self.socket.recv(length - len(text))
            if not part:
                raise EOFError
            text += part
        return bytes(text)


class Message:
    """A tree, ready to be sent to any number of receivers."""

    def __init__(self, tree: Any, memory: Memory | None = None) -> None:
        """Its tensors go to `memory`, which a tree without any does not need."""
        leaves, spec = pytree.tree_flatten(tree)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        places, size = memory.write(tensors) if tensors and memory else ([], 0)
        place = iter(places)
        described = [next(place) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.text = json.dumps({"tree": pytree.treespec_dumps(spec), "leaves": described}).encode()
        self.descriptors = [memory.descriptor] if size and memory else []
        self._memory = memory  # lives as long as what refers to it
        self.header = _HEADER.pack(len(self.text), size)


def _map(descriptor: int, size: int) -> Tensor:
    """uint8 [size]; the mapping lives as long as any view of it."""
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


def _view(block: Tensor, place: dict[str, Any]) -> Tensor:
    dtype, shape, at = getattr(torch, place["dtype"]), place["shape"], place["at"]
    return block[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

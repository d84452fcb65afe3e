"""A segment of an on-policy rollout, written while it is collected, and the memory it is written to."""

from __future__ import annotations

import math
import weakref
from collections import deque
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.policies.base import Policy
from embodied_rl.types import Episode, Trajectory

if TYPE_CHECKING:
    from embodied_rl.pipeline.rollout import Decision

_AT_ONCE = 1024
"""Rows of which values are computed together."""
WAITING = 2
"""Decisions that are not written yet, at most: each holds its images."""
LONGEST = 600.0
"""Seconds after which writing a decision is taken for stuck."""


class Memory:
    """Makes tensors for segments, in the memory of earlier ones that nobody refers to any more: writing to memory that
    is fresh from the operating system takes several times as long."""

    def __init__(self) -> None:
        self._blocks: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []
        """With the array that was lent last."""

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """`shape` with whatever numbers, of the kind of `like` and on its device."""
        if like.device.type != "cpu":  # torch keeps such memory itself
            return like.new_empty(shape)
        # A tensor and all its views keep alive the array that they were made from.
        return torch.from_numpy(self._lend(math.prod(shape) * like.itemsize)).view(like.dtype).view(shape)

    def _lend(self, size: int) -> np.ndarray:
        free = (i for i, (block, lent) in enumerate(self._blocks) if block.nbytes == size and lent() is None)
        at = next(free, len(self._blocks))
        block = self._blocks.pop(at)[0] if at < len(self._blocks) else np.empty(size, np.uint8)
        lent = block.view()
        self._blocks.append((block, weakref.ref(lent)))
        return lent


class Segment:
    """T decisions of N rows, to which each group of rows adds its decisions when they are done."""

    def __init__(
        self, decisions: int, num_envs: int, policy: Policy, memory: Memory, beside: Executor | None = None
    ) -> None:
        """`beside`: one thread to write in, so that whoever adds a decision can make the next."""
        self._shape = decisions, num_envs
        self._policy = policy
        self._device = policy.device
        self._memory = memory
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._arrays: dict[tuple[str, str], np.ndarray] = {}
        """Those that NumPy can write: it begins a small copy in a fifth of torch's time."""
        self._final_value = torch.zeros(self._shape, device=self._device)
        self._last_value = torch.zeros(num_envs, device=self._device)
        self._episodes: list[Episode] = []
        self._beside = beside
        self._written: deque[Future[None]] = deque()

    def add(self, t: int, rows: slice, step: Decision) -> None:
        """Decision `t` of `rows`."""
        if self._beside is None:
            return self._write(t, rows, step)
        self._written.append(self._beside.submit(self._write, t, rows, step))
        while len(self._written) > WAITING:
            self._written.popleft().result(LONGEST)

    @torch.no_grad()
    def _write(self, t: int, rows: slice, step: Decision) -> None:
        sample, result = step.sample, step.result
        plain: dict[str, Any] = {name: getattr(result, name) for name in ("reward", "terminated", "truncated", "valid")}
        plain |= {"actions": sample.actions, "log_prob": required(sample.log_prob), "tickets": step.tickets}
        if sample.value is not None:
            plain["value"] = sample.value
        for part, values in {"inputs": step.inputs, "trace": sample.trace, "plain": plain}.items():
            for name, value in values.items():
                self._put(part, name, t, rows, value)
        self._drop_lost(t, rows, step)
        if step.final_inputs is not None:
            cut = torch.from_numpy(result.truncated[result.final_rows].any(axis=1))
            if cut.any():
                ended = rows.start + torch.from_numpy(result.final_rows)[cut]
                self._final_value[t, ended] = self._policy.value({k: v[cut] for k, v in step.final_inputs.items()})
        if t == self._shape[0] - 1:
            self._last_value[rows] = self._policy.value(step.next_inputs)
        self._episodes += [replace(episode, env_id=rows.start + episode.env_id) for episode in result.episodes]

    def _put(self, part: str, name: str, t: int, rows: slice, value: Tensor | np.ndarray) -> None:
        tensors = self._parts.setdefault(part, {})
        if name not in tensors:
            # Tickets stay with whoever counts them.
            like = torch.as_tensor(value, device=None if name == "tickets" else self._device)
            tensors[name] = tensor = self._memory.empty((*self._shape, *value.shape[1:]), like)
            if tensor.device.type == "cpu" and tensor.dtype != torch.bfloat16:
                self._arrays[part, name] = tensor.numpy()
        if (part, name) in self._arrays:
            self._arrays[part, name][t, rows] = value.numpy() if isinstance(value, Tensor) else value
        else:
            tensors[name][t, rows] = torch.as_tensor(value, device=tensors[name].device)

    @torch.no_grad()
    def trajectory(self, version: int) -> Trajectory:
        """All that was added, in weights `version`."""
        while self._written:
            self._written.popleft().result(LONGEST)
        plain: dict[str, Any] = self._parts["plain"]
        if "value" not in plain:
            plain["value"] = self._values()
        return Trajectory(
            inputs=self._parts["inputs"],
            trace=self._parts["trace"],
            last_value=self._last_value,
            final_value=self._final_value,
            version=version,
            episodes=sorted(self._episodes, key=lambda episode: episode.ticket),
            **plain,
        )

    def _values(self) -> Tensor:
        """[T,N], where acting did not give them: a network reads its weights once for many rows."""
        flat = {name: tensor.flatten(0, 1) for name, tensor in self._parts["inputs"].items()}
        rows = torch.arange(math.prod(self._shape)).split(_AT_ONCE)
        parts = [self._policy.value({k: v[part[0] : part[-1] + 1] for k, v in flat.items()}) for part in rows]
        return torch.cat(parts).view(self._shape)

    def _drop_lost(self, t: int, rows: slice, step: Decision) -> None:
        """Nothing of a lost episode is learned from."""
        valid, tickets = self._parts["plain"]["valid"], self._parts["plain"]["tickets"]
        for row in rows.start + np.flatnonzero(step.result.lost):
            mine = tickets[: t + 1, row] == tickets[t, row]
            valid[: t + 1, row][mine.to(valid.device)] = False


def required(tensor: Tensor | None) -> Tensor:
    """`tensor`; raises `UserError` for a policy that gives none."""
    if tensor is None:
        raise UserError("the policy gives no log-probs, so this algorithm has nothing to improve: choose another")
    return tensor

"""Replay of decisions for off-policy algorithms."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from embodied_rl.errors import UserError

Inputs = dict[str, np.ndarray]

_FIELDS = ("actions", "reward", "valid", "success", "terminated", "truncated", "ticket", "potential", "intervened")
_OF_FIRST = ("actions", "ticket", "potential")
_BOOKKEEPING = ("_head", "_running", "_last_ticket", "_sampleable", "_success_order")


class ReplayBuffer:
    """One record per decision and environment row, every observation stored once.

    Each row owns a ring of slots. A decision fills one slot, the final observation of an ended episode one more, so
    the observation that follows a decision is always in the next slot. A decision becomes sampleable when that slot
    is known to hold its successor; it never is when its episode was lost or interrupted.

    Memory for all slots is taken at the first decision, or, with a `folder`, space there: the operating system then
    keeps in memory what is used, and the replay may be larger than that.
    """

    def __init__(
        self, capacity: int, num_envs: int, successful_capacity: int = 20_000, folder: Path | None = None
    ) -> None:
        """`capacity` slots over all `num_envs` rows; `sample_successful` draws from the `successful_capacity` most
        recent decisions of successful episodes. The files in `folder` have no names and end with the process. Raises
        `UserError` when a row would have fewer than 2 slots, and later when `folder` has no room for them."""
        if capacity < 2 * num_envs:
            raise UserError(f"replay capacity {capacity} is too small: {num_envs} environments need {2 * num_envs}")
        self.num_envs = num_envs
        self.successful_capacity = successful_capacity
        self._folder = folder
        self._slots = capacity // num_envs
        self._inputs: Inputs = {}
        self._records: dict[str, np.ndarray] = {}
        self._head = np.zeros(num_envs, np.int64)  # slots ever filled in a row; the next one is this, modulo the ring
        self._running = np.zeros(num_envs, np.int64)  # decisions of the row's running episode
        self._last_ticket = np.full(num_envs, -1, np.int64)
        self._sampleable = np.zeros(num_envs * self._slots, bool)
        self._success_order = np.zeros(num_envs * self._slots, np.int64)  # 1, 2, ... as chunks succeed; 0 = did not
        self._successes = 0
        self._index: np.ndarray | None = None
        self._successful_index: np.ndarray | None = None

    def __len__(self) -> int:
        """Decisions that can be sampled."""
        return len(self._sampleable_index())

    @property
    def successful(self) -> int:
        """Decisions that `sample_successful` draws from."""
        return len(self._recent_successes())

    def add(
        self,
        inputs: Inputs,
        actions: np.ndarray,
        reward: np.ndarray,
        valid: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        success: np.ndarray,
        final_inputs: Inputs | None,
        final_rows: np.ndarray,
        tickets: np.ndarray,
        lost: np.ndarray,
        potential: np.ndarray | None = None,
        final_potential: np.ndarray | None = None,
        intervened: np.ndarray | None = None,
    ) -> None:
        """Record one decision of every row.

        `inputs` [N,...] are those acted on, with their `tickets` [N] and, for reward shaping, their `potential` [N];
        `actions` [N,K,A] (or [N,1,A], one choice for the chunk), `reward`, `valid` [N,K]; `terminated`, `truncated`,
        `success` [N] tell whether it happened anywhere in the chunk (an episode is successful when its last chunk is).
        `intervened` [N] tells whether a person chose any of the executed actions.
        `final_inputs` [E,...] and `final_potential` [E] belong to `final_rows`, the rows whose episode ended. Rows
        without a valid step are not recorded; rows that are `lost` take their running episode with them.
        """
        if not self._records:
            self._allocate(inputs, actions, valid.shape[1])
        ended = terminated | truncated
        recorded = valid.any(axis=1) & ~lost
        if not np.array_equal(np.flatnonzero(ended & recorded), final_rows):
            raise ValueError(f"final_rows {final_rows.tolist()} are not the recorded rows that ended")
        self._index = self._successful_index = None
        self.discard(np.flatnonzero(lost))

        rows = np.flatnonzero(recorded)
        self._running[rows] *= self._last_ticket[rows] == tickets[rows]
        self._last_ticket[rows] = tickets[rows]
        continued = rows[self._running[rows] > 0]
        self._sampleable[self._slot(continued, self._head[continued] - 1)] = True
        slot = self._claim(rows)
        self._running[rows] += 1
        potential = np.zeros(self.num_envs) if potential is None else potential
        intervened = np.zeros(self.num_envs, bool) if intervened is None else intervened
        executed = np.where(valid[:, : actions.shape[1], None], actions, 0)
        columns = (executed, np.where(valid, reward, 0), valid, success, terminated, truncated, tickets, potential)
        for name, column in zip(_FIELDS, (*columns, intervened), strict=True):
            self._records[name][slot] = column[rows]
        for name, column in inputs.items():
            self._inputs[name][slot] = column[rows]

        if len(final_rows):
            assert final_inputs is not None
            self._sampleable[self._slot(final_rows, self._head[final_rows] - 1)] = True
            slot = self._claim(final_rows)
            self._records["potential"][slot] = 0 if final_potential is None else final_potential
            for name, column in final_inputs.items():
                self._inputs[name][slot] = column
            for row in final_rows[success[final_rows]]:
                self._mark_successful(row)
            self._running[final_rows] = 0

    def interrupt(self, rows: np.ndarray) -> None:
        """The running episode of `rows` was abandoned without a known end: what came before its last decision stays."""
        self._running[rows] = 0

    def discard(self, rows: np.ndarray) -> None:
        """Forget the running episode of `rows`: nothing of it is sampled again."""
        self._index = self._successful_index = None
        for row in rows:
            self._sampleable[self._slot(row, self._head[row] - 1 - np.arange(int(self._running[row])))] = False
        self._running[rows] = 0

    @property
    def intervened(self) -> int:
        """Decisions that can be sampled in which a person acted."""
        return len(self._intervened_index())

    def sample(
        self, batch: int, generator: np.random.Generator, decisions: int = 1, intervened: bool = False
    ) -> dict[str, Any]:
        """`batch` decisions (only `intervened` ones), uniform with replacement, each with what followed in its episode
        during n = `decisions` of them: "inputs", "actions" [B,K,A] (0 where not valid), "ticket", "potential" [B] of
        the first; "reward", "valid" [B,n,K] of all (not valid after the end of the episode, or of what is known of it);
        "terminated", "truncated", "success" [B], "next_inputs" (the episode's next observation or its final one),
        "next_potential" [B] of the last. Raises `UserError` when there is none."""
        index = self._intervened_index() if intervened else self._sampleable_index()
        first = _draw(index, batch, generator, "decision")
        slots = np.tile(first[:, None], decisions)
        follows = np.ones((batch, decisions), bool)
        for i in range(1, decisions):
            before, following = slots[:, i - 1], self._next(slots[:, i - 1])
            ended = self._records["terminated"][before] | self._records["truncated"][before]
            follows[:, i] = follows[:, i - 1] & ~ended & self._sampleable[following]
            slots[:, i] = np.where(follows[:, i], following, before)
        last = slots[:, -1]
        following = self._next(last)
        data: dict[str, Any] = {name: self._records[name].take(first, axis=0) for name in _OF_FIRST}
        data |= {name: self._records[name].take(last) for name in ("terminated", "truncated", "success")}
        data["reward"] = self._records["reward"].take(slots, axis=0)
        data["valid"] = self._records["valid"].take(slots, axis=0) & follows[..., None]
        data["inputs"] = {name: column.take(first, axis=0) for name, column in self._inputs.items()}
        data["next_inputs"] = {name: column.take(following, axis=0) for name, column in self._inputs.items()}
        data["next_potential"] = self._records["potential"].take(following)
        return data

    def sample_successful(self, batch: int, generator: np.random.Generator) -> dict[str, Any]:
        """`batch` decisions of successful episodes, uniform with replacement: "inputs", "actions" [B,K,A], "valid"
        [B,K]. Raises `UserError` when there is none."""
        slot = _draw(self._recent_successes(), batch, generator, "successful decision")
        return {
            "inputs": {name: column.take(slot, axis=0) for name, column in self._inputs.items()},
            "actions": self._records["actions"].take(slot, axis=0),
            "valid": self._records["valid"].take(slot, axis=0),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything, as numpy arrays and numbers; slots that were never filled are left out. Columns in a folder are
        views (`np.memmap`), to be saved before the next decision is added."""
        filled = int(min(self._head.max(), self._slots))
        state: dict[str, Any] = {name.strip("_"): self._per_row(name).copy() for name in _BOOKKEEPING}
        for prefix, columns in (("inputs.", self._inputs), ("records.", self._records)):
            for name, column in columns.items():
                by_row = column.reshape(self.num_envs, self._slots, *column.shape[1:])
                state[prefix + name] = by_row[:, :filled] if self._folder else by_row[:, :filled].copy()
        return state | {"slots": self._slots, "successes": self._successes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`. Raises `UserError` when the buffer has other sizes."""
        sizes = (state["head"].shape[0], int(state["slots"]))
        if sizes != (self.num_envs, self._slots):
            raise UserError(
                f"the saved replay buffer has {sizes[0]} environments x {sizes[1]} slots, this run has "
                f"{self.num_envs} x {self._slots}: resume with the same number of environments and capacity"
            )
        self._inputs, self._records = {}, {}
        for name in _BOOKKEEPING:
            self._per_row(name)[...] = state[name.strip("_")]
        for prefix, columns in (("inputs.", self._inputs), ("records.", self._records)):
            for key in (key for key in state if key.startswith(prefix)):
                saved = state[key]
                by_row = self._zeros((self.num_envs, self._slots, *saved.shape[2:]), saved.dtype)
                by_row[:, : saved.shape[1]] = saved
                columns[key.removeprefix(prefix)] = by_row.reshape(-1, *saved.shape[2:])
        self._successes = int(state["successes"])
        self._index = self._successful_index = None

    def _allocate(self, inputs: Inputs, actions: np.ndarray, steps: int) -> None:
        total = self.num_envs * self._slots
        self._inputs = {name: self._zeros((total, *column.shape[1:]), column.dtype) for name, column in inputs.items()}
        kinds: dict[str, Any] = {"reward": ((steps,), np.float32), "valid": ((steps,), bool)}
        kinds |= {"actions": (actions.shape[1:], np.float32), "ticket": ((), np.int64), "potential": ((), np.float32)}
        self._records = {}
        for name in _FIELDS:
            shape, kind = kinds.get(name, ((), bool))
            self._records[name] = self._zeros((total, *shape), kind)

    def _zeros(self, shape: tuple[int, ...], kind: Any) -> np.ndarray:
        if self._folder is None:
            return np.zeros(shape, kind)
        size = max(math.prod(shape) * np.dtype(kind).itemsize, 1)
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, not as a signal at some write
                return np.memmap(file, kind, "r+", shape=shape)
        except OSError as error:
            raise UserError(
                f"no room for a replay column of {size / 2**30:.2f} GiB in {self._folder}: {error.strerror}; free disk "
                f"space, lower algorithm.replay_capacity, or keep the replay in memory"
            ) from error

    def _slot(self, row: Any, position: Any) -> Any:
        return row * self._slots + position % self._slots

    def _next(self, slot: np.ndarray) -> np.ndarray:
        """The slot after each, in its row's ring."""
        return slot + 1 - self._slots * ((slot + 1) % self._slots == 0)

    def _claim(self, rows: np.ndarray) -> np.ndarray:
        """The next slot of each row, cleared of what it meant before."""
        slot = self._slot(rows, self._head[rows])
        self._head[rows] += 1
        self._sampleable[slot] = False
        self._success_order[slot] = 0
        return slot

    def _mark_successful(self, row: int) -> None:
        """Number the decisions of the episode whose final observation was just written."""
        count = min(int(self._running[row]), self._slots - 1)
        slot = self._slot(row, self._head[row] - 1 - np.arange(count, 0, -1))
        self._success_order[slot] = self._successes + 1 + np.arange(count)
        self._successes += count

    def _sampleable_index(self) -> np.ndarray:
        if self._index is None:
            self._index = np.flatnonzero(self._sampleable)
        return self._index

    def _intervened_index(self) -> np.ndarray:
        if not self._records:
            return np.zeros(0, np.int64)
        index = self._sampleable_index()
        return index[self._records["intervened"][index]]

    def _recent_successes(self) -> np.ndarray:
        if self._successful_index is None:
            oldest = max(self._successes - self.successful_capacity, 0)
            self._successful_index = np.flatnonzero(self._success_order > oldest)
        return self._successful_index

    def _per_row(self, name: str) -> np.ndarray:
        return getattr(self, name).reshape(self.num_envs, -1)


def _draw(index: np.ndarray, batch: int, generator: np.random.Generator, what: str) -> np.ndarray:
    if not len(index):
        raise UserError(f"the replay buffer holds no {what} yet: collect more before learning from it")
    return index[generator.integers(len(index), size=batch)]


class WithInterventions:
    """Demonstrations and, as if they were some, the decisions of `replay` in which a person acted (HIL-SERL, arXiv
    2410.21845): one set, from which is drawn uniformly."""

    def __init__(self, demonstrations: ReplayBuffer, replay: ReplayBuffer) -> None:
        self.demonstrations = demonstrations
        self.replay = replay

    def sample(self, batch: int, generator: np.random.Generator, decisions: int = 1) -> dict[str, Any]:
        """As `ReplayBuffer.sample`."""
        old, new = len(self.demonstrations), self.replay.intervened
        count = int(generator.binomial(batch, new / (old + new))) if new else 0
        parts = [self.demonstrations.sample(batch - count, generator, decisions)] if count < batch else []
        if count:
            parts.append(self.replay.sample(count, generator, decisions, intervened=True))
        return _concatenated(parts)


def _concatenated(parts: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    return {
        name: _concatenated(each) if isinstance(each[0], dict) else np.concatenate(each)
        for name, each in columns.items()
    }

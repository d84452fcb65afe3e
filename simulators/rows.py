"""The environments of one worker and the shared arrays they read from and write to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from embodied_rl.simulators.base import Environment
from embodied_rl.simulators.chunk import Fields, Frame, Steps, frame_fields, initial_state, run_chunk, write_frame
from embodied_rl.simulators.shared_arrays import map_arrays
from embodied_rl.specs import ObservationSpec


def block_fields(spec: ObservationSpec, action_dim: int, num_envs: int, chunk: int, every: bool) -> Fields:
    """The arrays that a simulator's processes share, for chunks of at most `chunk` actions.

    In: `actions` [N,K,A], `run` [N] (execute the actions, or reset), `states` [N,3] (the next initial state, task -1
    for none). Out, twice, so that a result outlives the next call: `0.` and `1.` with reward ... [N,K] and the
    observation [N,...]. Out, once: `final.` [N,...] and, when `every`, `every.` [K,N,...].
    """
    fields: Fields = {
        "actions": ("f4", (num_envs, chunk, action_dim)),
        "run": ("?", (num_envs,)),
        "states": ("i8", (num_envs, 3)),
    }
    for buffer in ("0", "1"):
        fields |= _named(buffer, Steps.fields(num_envs, chunk)) | _named(buffer, frame_fields(spec, num_envs))
    fields |= _named("final", frame_fields(spec, num_envs))
    return fields | _named("every", frame_fields(spec, chunk, num_envs)) if every else fields


class Block:
    """The shared arrays by what they are for."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.actions, self.run, self.states = arrays["actions"], arrays["run"], arrays["states"]
        self.steps: list[Steps] = []
        self.frames: list[dict[str, np.ndarray]] = []
        for buffer in ("0", "1"):
            result = _group(arrays, buffer)
            self.steps.append(Steps(**{name: result.pop(name) for name in Steps.fields()}))
            self.frames.append(result)
        self.final = _group(arrays, "final")
        self.every = _group(arrays, "every")
        """Empty when not asked for."""


class Rows:
    """Runs `environments` as the rows first, first + 1, ... of the simulator whose arrays are in `memory`."""

    def __init__(self, environments: list[Environment], first: int, memory: int) -> None:
        self._environments = environments
        self._first = first
        self._memory = memory
        self._block: Block | None = None
        self._steps: dict[tuple[int, int], list[Steps]] = {}
        """Of each row, by (buffer, K): making such views takes as long as a step of a small environment."""

    def map(self, where: dict[str, Any]) -> None:
        """Use the arrays described by {"start", "fields"} from now on."""
        self._block = Block(map_arrays(self._memory, where["start"], where["fields"]))
        self._steps = {}

    def reset(self, buffer: int) -> None:
        """Reset the rows that `run` and observe them into `buffer`; other rows keep their last observation."""
        block = self._mapped()
        for row, environment in enumerate(self._environments, self._first):
            if block.run[row]:
                environment.reset(initial_state(block.states[row]))
                write_frame(block.frames[buffer], row, environment.observe())
            else:
                _copy(block.frames[buffer], block.frames[1 - buffer], row)

    def chunk(self, buffer: int, chunk: int, every: bool) -> None:
        """Run a chunk in the rows that `run`, reset those that ended to `states`, and observe into `buffer`."""
        block = self._mapped()
        rows = slice(self._first, self._first + len(self._environments))
        # A copy: an environment may keep or change what it is given.
        actions = block.actions[rows, :chunk].copy()
        block.steps[buffer][rows, :chunk].clear()
        last = [{name: array[k] for name, array in block.every.items()} for k in range(chunk)] if every else []
        if (buffer, chunk) not in self._steps:
            self._steps[buffer, chunk] = [block.steps[buffer][row, :chunk] for row in range(rows.start, rows.stop)]
        each = zip(self._environments, actions, self._steps[buffer, chunk], strict=True)
        for row, (environment, todo, steps) in enumerate(each, self._first):
            if block.run[row]:
                self._run(environment, row, buffer, todo, steps, last)
                continue
            for frame in (block.frames[buffer], *last):
                _copy(frame, block.frames[1 - buffer], row)

    def close(self) -> None:
        for environment in self._environments:
            environment.close()

    def _run(
        self,
        environment: Environment,
        row: int,
        buffer: int,
        actions: np.ndarray,
        steps: Steps,
        every: Sequence[Frame],
    ) -> None:
        block = self._mapped()
        frame = block.frames[buffer]
        observe = (lambda k: write_frame(every[k], row, environment.observe())) if every else None
        executed, ended = run_chunk(environment, actions, steps, observe)
        current = block.final if ended else frame
        if every:
            for later in (*every[executed:], current):
                _copy(later, every[executed - 1], row)
        else:
            write_frame(current, row, environment.observe())
        if not ended:
            return
        if block.states[row, 0] >= 0:
            environment.reset(initial_state(block.states[row]))
            write_frame(frame, row, environment.observe())
        else:
            _copy(frame, block.final, row)

    def _mapped(self) -> Block:
        if self._block is None:
            raise RuntimeError("no arrays mapped yet")
        return self._block


def _named(group: str, fields: Fields) -> Fields:
    return {f"{group}.{name}": field for name, field in fields.items()}


def _group(arrays: dict[str, np.ndarray], group: str) -> dict[str, np.ndarray]:
    prefix = f"{group}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _copy(target: Frame, source: Frame, row: int) -> None:
    for name, array in target.items():
        array[row] = source[name][row]

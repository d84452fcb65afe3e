"""The rows of one worker when its environments are stepped together: `Rows` over a `BatchedEnvironment`."""

from __future__ import annotations

from typing import Any

import numpy as np

from embodied_rl.simulators.base import BatchedEnvironment
from embodied_rl.simulators.chunk import Frame, Steps, initial_state, write_frame
from embodied_rl.simulators.rows import Block
from embodied_rl.simulators.shared_arrays import map_arrays


class BatchedRows:
    """Runs `environment` as the rows first, first + 1, ... of the simulator whose arrays are in `memory`."""

    def __init__(self, environment: BatchedEnvironment, first: int, memory: int) -> None:
        self._environment = environment
        self._first = first
        self._memory = memory
        self._mine = slice(first, first + environment.num_envs)
        self._hold = np.asarray(environment.action_spec.hold, np.float32)
        self._block: Block | None = None
        self._steps: dict[tuple[int, int], list[Steps]] = {}
        """Of each action, by (buffer, K): making such views takes as long as a step of a small environment."""

    def map(self, where: dict[str, Any]) -> None:
        """Use the arrays described by {"start", "fields"} from now on."""
        self._block = Block(map_arrays(self._memory, where["start"], where["fields"]))
        self._steps = {}

    def reset(self, buffer: int) -> None:
        """Reset the rows that `run` and observe them into `buffer`; other rows keep their last observation."""
        block = self._mapped()
        run = block.run[self._mine]
        self._keep(block.frames[buffer], block.frames[1 - buffer], ~run)
        self._restart(block.frames[buffer], run)

    def chunk(self, buffer: int, chunk: int, every: bool) -> None:
        """Run a chunk in the rows that `run`, reset those that ended to `states`, and observe into `buffer`."""
        block = self._mapped()
        frame = block.frames[buffer]
        # A copy: an environment may keep or change what it is given.
        actions = block.actions[self._mine, :chunk].copy()
        if (buffer, chunk) not in self._steps:
            self._steps[buffer, chunk] = [block.steps[buffer][self._mine, k] for k in range(chunk)]
        run = block.run[self._mine].copy()
        live, running = run.copy(), np.count_nonzero(run)
        before: Frame = block.frames[1 - buffer]
        for k, steps in enumerate(self._steps[buffer, chunk]):
            if running:
                ended = self._step(actions[:, k], steps, live, running)
            else:
                ended = live  # none
                steps.clear()
            count = np.count_nonzero(ended)
            if count:  # taken before anything moves the rows that ended
                self._observe(block.final, ended)
            if every:
                current = {name: array[k] for name, array in block.every.items()}
                self._observe(current, live)
                self._keep(current, before, ~live)
                before = current
            if count:
                live &= ~ended
                running -= count
        if running == len(live):
            write_frame(frame, self._mine, self._environment.observe(np.arange(len(live))))
            return
        ended = run & ~live
        again = ended & (block.states[self._mine, 0] >= 0)
        self._keep(frame, block.frames[1 - buffer], ~run)
        self._keep(frame, block.final, ended & ~again)
        self._observe(frame, live)
        self._restart(frame, again)

    def close(self) -> None:
        self._environment.close()

    def _step(self, actions: np.ndarray, steps: Steps, live: np.ndarray, running: int) -> np.ndarray:
        """Execute one action [n,A] in the `running` rows that are `live`; returns the rows that ended, bool [n]."""
        whole = running == len(live)
        todo = actions if whole else np.where(live[:, None], actions, self._hold)
        reward, terminated, truncated, success = self._environment.step(todo)
        steps.valid[:] = live
        steps.reward[:] = reward if whole else np.where(live, reward, 0)
        ended = live & (terminated | truncated)
        np.logical_and(terminated, ended, out=steps.terminated)
        np.greater(ended, steps.terminated, out=steps.truncated)
        steps.success[:] = False if success is None else live & success
        return ended

    def _restart(self, frame: Frame, which: np.ndarray) -> None:
        rows = np.flatnonzero(which)
        if len(rows):
            states = [initial_state(state) for state in self._mapped().states[self._first + rows]]
            self._environment.reset(rows, states)
            self._observe(frame, which)

    def _observe(self, frame: Frame, which: np.ndarray) -> None:
        rows = np.flatnonzero(which)
        if len(rows):
            write_frame(frame, self._first + rows, self._environment.observe(rows))

    def _keep(self, target: Frame, source: Frame, which: np.ndarray) -> None:
        rows = self._first + np.flatnonzero(which)
        for name, array in target.items() if len(rows) else ():
            array[rows] = source[name][rows]

    def _mapped(self) -> Block:
        if self._block is None:
            raise RuntimeError("no arrays mapped yet")
        return self._block

"""What a chunk of actions means, for every simulator.

A chunk never crosses an episode's end. One environment alone (`run_chunk`) stops at its end and executes nothing more;
environments stepped together (`BatchedSimulator`) cannot stop one row, which then receives `ActionSpec.hold` up to the
border, invalid and unrewarded. Both give the same `ChunkResult`: `Ledger` keeps the accounts of either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from embodied_rl.simulators.base import WAIT, BatchedEnvironment, Environment, InitialState, ResetSchedule, Simulator
from embodied_rl.specs import ObservationSpec, TaskSpec
from embodied_rl.types import ChunkResult, Episode, Observation

Frame = Mapping[str, np.ndarray]
"""The arrays of an observation by the names of `Environment.observe`, with a leading batch axis."""

Fields = dict[str, tuple[str, tuple[int, ...]]]


@dataclass
class Steps:
    """What K actions did: arrays [K] for one environment, [N,K] for N."""

    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    success: np.ndarray

    @staticmethod
    def fields(*shape: int) -> Fields:
        """{name: (dtype, shape)}."""
        return {"reward": ("f4", shape)} | dict.fromkeys(("terminated", "truncated", "valid", "success"), ("?", shape))

    @staticmethod
    def zeros(*shape: int) -> Steps:
        return Steps(**{name: np.zeros(size, dtype) for name, (dtype, size) in Steps.fields(*shape).items()})

    def __getitem__(self, index: Any) -> Steps:
        """Views of every array."""
        return Steps(
            self.reward[index], self.terminated[index], self.truncated[index], self.valid[index], self.success[index]
        )

    def clear(self) -> None:
        """Nothing was executed."""
        for array in self._arrays():
            array[...] = 0

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.reward, self.terminated, self.truncated, self.valid, self.success


def run_chunk(
    environment: Environment, actions: np.ndarray, steps: Steps, observe: Callable[[int], None] | None = None
) -> tuple[int, bool]:
    """Execute float32 [K,A] until the episode ends; nothing after its end is executed. Writes the executed part of
    `steps` [K], whose arrays must be zero, and calls `observe(k)` after every executed action. Returns (executed
    actions, whether the episode ended)."""
    for k, action in enumerate(actions):
        reward, terminated, truncated, success = environment.step(action)
        steps.valid[k] = True
        steps.reward[k] = reward
        steps.terminated[k] = terminated
        steps.truncated[k] = truncated and not terminated
        steps.success[k] = bool(success)
        if observe:
            observe(k)
        if terminated or truncated:
            return k + 1, True
    return len(actions), False


def frame_fields(spec: ObservationSpec, *batch: int) -> Fields:
    """{name: (dtype, shape)} of an observation with leading axes `batch`."""
    fields: Fields = {"state": ("f4", (*batch, spec.state))}
    if spec.privileged:
        fields["privileged"] = ("f4", (*batch, spec.privileged))
    for name, camera in spec.cameras.items():
        fields[f"image.{name}"] = ("u1", (*batch, camera.height, camera.width, 3))
    return fields


def write_frame(frame: Frame, rows: int | slice | np.ndarray, values: Mapping[str, np.ndarray]) -> None:
    """frame[rows] = values for one row, a slice(first, last + 1) or increasing integer rows; raises ValueError where
    `values` are not what the observation spec promised."""
    if values.keys() != frame.keys() and values.keys() != {k for k, v in frame.items() if v.size}:
        raise ValueError(f"observe() gave {sorted(values)} where observation_spec has {sorted(frame)}")
    if isinstance(rows, np.ndarray) and len(rows) == rows[-1] + 1 - rows[0]:
        rows = slice(rows[0], rows[-1] + 1)  # twice as fast as an array of indices
    for name, value in values.items():
        target = frame[name]
        # Views; an array of indices would copy.
        place = target[: len(rows)] if isinstance(rows, np.ndarray) else target[rows]
        if value.shape != place.shape or value.dtype != place.dtype:
            raise ValueError(
                f"observe() gave '{name}' as {value.dtype} {list(value.shape)} where observation_spec has "
                f"{place.dtype} {list(place.shape)}"
            )
        target[rows] = value


class Ledger:
    """The accounts of N rows: which ticket each runs, from which initial state, and what its episode has earned.

    `tickets` int64 [N]; `states` int64 [N,3] = (task, seed, index or -1) of the running episodes; a waiting row keeps
    its last state.
    """

    def __init__(self, num_envs: int, tasks: tuple[TaskSpec, ...], schedule: ResetSchedule) -> None:
        self.tasks = tasks
        self.tickets = np.full(num_envs, WAIT, np.int64)
        self.states = np.tile(np.array([0, 0, -1], np.int64), (num_envs, 1))
        self._instructions = tuple(task.instruction for task in tasks)
        self._has_success = any(task.has_success for task in tasks)
        self._schedule = schedule
        self._lookup = functools.lru_cache(maxsize=4 * num_envs + 64)(self._state)
        self._asked, self._answer = b"", np.zeros((0, 3), np.int64)
        self._length = np.zeros(num_envs, np.int64)
        self._return = np.zeros(num_envs)
        self._success = np.zeros(num_envs, bool)

    def scheduled(self, tickets: np.ndarray) -> np.ndarray:
        """int64 [M,3] initial states of `tickets` [M]; the task of `WAIT` is -1."""
        asked = tickets.tobytes()
        if asked != self._asked:  # the same are asked for chunk after chunk
            states = np.array([self._lookup(ticket) for ticket in tickets.tolist()], np.int64).reshape(-1, 3)
            self._asked, self._answer = asked, states
        return self._answer

    def start(self, rows: np.ndarray, tickets: np.ndarray, states: np.ndarray) -> None:
        """Open the accounts of new episodes in `rows`; `WAIT` closes them."""
        self.tickets[rows] = tickets
        runs = tickets != WAIT
        self.states[rows[runs]] = states[runs]
        self._length[rows] = 0
        self._return[rows] = 0
        self._success[rows] = False

    def observation(self, frame: Frame, rows: np.ndarray | None = None) -> Observation:
        """The observation in `frame` [B,...] of `rows` (default: all N)."""
        task = self.states[:, 0].copy() if rows is None else self.states[rows, 0]
        images = {name.removeprefix("image."): value for name, value in frame.items() if name.startswith("image.")}
        return Observation(
            images=images,
            image_mask={name: np.ones(len(task), bool) for name in images},
            state=frame["state"],
            instruction_id=task.copy(),
            task=task,
            instructions=self._instructions,
            privileged=frame.get("privileged"),
        )

    def close_chunk(
        self,
        steps: Steps,
        next_tickets: np.ndarray,
        observation: Observation,
        final: Frame,
        lost: np.ndarray,
        intermediate: list[Frame] | None,
    ) -> ChunkResult:
        """Book a chunk. `observation` of all rows is acted on next and hears of new tasks, `final` [N,...] holds the
        final observations in their rows, `intermediate` K frames. Rows that are `lost` start again from their own
        ticket."""
        # Column by column, so that a return does not depend on how its episode was cut into chunks.
        for k in range(steps.valid.shape[1]):
            self._length += steps.valid[:, k]
            self._return += steps.reward[:, k]
        if self._has_success:
            self._success |= steps.success.any(1)
        if np.count_nonzero(steps.terminated) or np.count_nonzero(steps.truncated):
            rows = np.flatnonzero((steps.terminated | steps.truncated).any(1))
        else:
            rows = np.zeros(0, np.int64)
        episodes = [self._episode(int(row), steps[row]) for row in rows]
        final_observation = self.observation({k: v[rows] for k, v in final.items()}, rows) if len(rows) else None
        frames = None if intermediate is None else [self.observation(each) for each in intermediate]
        if np.count_nonzero(lost):
            self.start(np.flatnonzero(lost), self.tickets[lost], self.states[lost])
        if len(rows):
            self.start(rows, next_tickets[rows], self.scheduled(next_tickets[rows]))
            observation.task[:] = observation.instruction_id[:] = self.states[:, 0]
        return ChunkResult(
            observation=observation,
            reward=steps.reward,
            terminated=steps.terminated,
            truncated=steps.truncated,
            valid=steps.valid,
            success=steps.success if self._has_success else None,
            final_rows=rows,
            final_observation=final_observation,
            episodes=episodes,
            tickets=self.tickets.copy(),
            lost=lost,
            intermediate=frames,
        )

    def _episode(self, row: int, steps: Steps) -> Episode:
        task = int(self.states[row, 0])
        has_success = self.tasks[task].has_success
        last = int(np.flatnonzero(steps.valid)[-1])
        return Episode(
            ticket=int(self.tickets[row]),
            task=task,
            env_id=row,
            length=int(self._length[row]),
            episode_return=float(self._return[row]),
            success_once=bool(self._success[row]) if has_success else None,
            success_at_end=bool(steps.success[last]) if has_success else None,
            truncated=bool(steps.truncated[last]),
        )

    def _state(self, ticket: int) -> tuple[int, int, int]:
        if ticket == WAIT:
            return -1, 0, -1
        if ticket < 0:
            raise ValueError(f"ticket {ticket}: tickets are >= 0, or WAIT")
        state = self._schedule.state(ticket)
        if not 0 <= state.task < len(self.tasks):
            raise ValueError(f"ticket {ticket} asks for task {state.task} of a simulator with {len(self.tasks)} tasks")
        return state.task, state.seed, -1 if state.index is None else state.index


def initial_state(row: np.ndarray) -> InitialState:
    """The `InitialState` behind a row of `Ledger.states`."""
    task, seed, index = row.tolist()
    return InitialState(task, seed, None if index < 0 else index)


def check_reset(
    num_envs: int, env_ids: np.ndarray | None, tickets: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Arguments of `Simulator.reset` as (rows, tickets, whether these are all rows in order). Raises ValueError."""
    rows = np.arange(num_envs) if env_ids is None else np.asarray(env_ids, np.int64)
    if tickets is None:
        raise ValueError("reset needs a ticket for every row")
    tickets = np.asarray(tickets, np.int64)
    if rows.shape != tickets.shape or rows.ndim != 1:
        raise ValueError(f"reset got {list(rows.shape)} env_ids and {list(tickets.shape)} tickets")
    if len(np.unique(rows)) != len(rows) or (len(rows) and not 0 <= rows.min() <= rows.max() < num_envs):
        raise ValueError(f"env_ids must be different rows of {num_envs}, not {rows.tolist()}")
    return rows, tickets, np.array_equal(rows, np.arange(num_envs))


def check_send(
    num_envs: int, action_dim: int, actions: np.ndarray, next_tickets: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Arguments of `Simulator.send` as (float32 actions, int64 tickets). Raises ValueError."""
    actions = np.asarray(actions, np.float32)
    if actions.ndim != 3 or actions.shape[0] != num_envs or actions.shape[1] < 1 or actions.shape[2] != action_dim:
        raise ValueError(f"actions {list(actions.shape)} where [N,K,A] = [{num_envs},K,{action_dim}] is needed")
    tickets = np.full(num_envs, WAIT) if next_tickets is None else np.array(next_tickets, np.int64)
    if tickets.shape != (num_envs,):
        raise ValueError(f"next_tickets {list(tickets.shape)} where [{num_envs}] is needed")
    return actions, tickets


class BatchedSimulator(Simulator):
    """A `Simulator` over environments that are stepped together, in this process."""

    def __init__(self, environment: BatchedEnvironment, schedule: ResetSchedule) -> None:
        self.num_envs = environment.num_envs
        self.observation_spec = environment.observation_spec
        self.action_spec = environment.action_spec
        self.tasks = environment.tasks
        self._environment: BatchedEnvironment | None = environment
        self._ledger = Ledger(self.num_envs, self.tasks, schedule)
        self._frames = [self._new_frame(), self._new_frame()]
        self._final = self._new_frame()
        self._pending: tuple[np.ndarray, Literal["last", "all"], np.ndarray] | None = None

    def reset(self, env_ids: np.ndarray | None = None, tickets: np.ndarray | None = None) -> Observation:
        rows, tickets, everything = check_reset(self.num_envs, env_ids, tickets)
        if self._pending and not everything:
            raise RuntimeError("reset of some rows between send and receive")
        self._pending = None
        states = self._ledger.scheduled(tickets)
        self._ledger.start(rows, tickets, states)
        runs = tickets != WAIT
        self._border(rows[runs], states[runs], np.isin(np.arange(self.num_envs), rows[runs]))
        frame = self._frames[0]
        if everything:
            return self._ledger.observation(frame)
        return self._ledger.observation({name: array[rows] for name, array in frame.items()}, rows)

    def send(
        self,
        actions: np.ndarray,
        observe: Literal["last", "all"] = "last",
        next_tickets: np.ndarray | None = None,
    ) -> None:
        if self._pending:
            raise RuntimeError("send before the last chunk was received")
        actions, tickets = check_send(self.num_envs, self.action_spec.dim, actions, next_tickets)
        self._ledger.scheduled(tickets)  # a bad ticket fails here, before anything moved
        self._pending = actions.copy(), observe, tickets

    def receive(self) -> ChunkResult:
        if self._pending is None:
            raise RuntimeError("receive without send")
        (actions, observe, next_tickets), self._pending = self._pending, None
        steps = Steps.zeros(self.num_envs, actions.shape[1])
        live = self._ledger.tickets != WAIT
        intermediate: list[Frame] | None = [] if observe == "all" else None
        for k in range(actions.shape[1]):
            ended = self._step(actions[:, k], steps[:, k], live)
            # Taken before anything moves the rows that ended; they hold from here on.
            if ended.any():
                self._refresh(self._final, ended)
            if intermediate is not None:
                frame = {name: array.copy() for name, array in (intermediate or [self._frames[0]])[-1].items()}
                self._refresh(frame, live)
                intermediate.append(frame)
            live &= ~ended
        ended = (steps.terminated | steps.truncated).any(1)
        again = ended & (next_tickets != WAIT)
        rows = np.flatnonzero(again)
        self._border(rows, self._ledger.scheduled(next_tickets[rows]), live | again)
        stays = ended & ~again
        for name, array in self._frames[0].items():
            array[stays] = self._final[name][stays]
        lost = np.zeros(self.num_envs, bool)
        observation = self._ledger.observation(self._frames[0])
        return self._ledger.close_chunk(steps, next_tickets, observation, self._final, lost, intermediate)

    def close(self) -> None:
        if self._environment is not None:
            self._environment.close()
            self._environment = None

    def _step(self, actions: np.ndarray, steps: Steps, live: np.ndarray) -> np.ndarray:
        """Execute one action [N,A] in the rows that are `live`; returns the rows that ended, bool [N]."""
        if not live.any():
            return np.zeros(self.num_envs, bool)
        hold = np.asarray(self.action_spec.hold, np.float32)
        reward, terminated, truncated, success = self._running().step(np.where(live[:, None], actions, hold))
        steps.valid[:] = live
        steps.reward[:] = np.where(live, reward, 0)
        steps.terminated[:] = live & terminated
        steps.truncated[:] = live & truncated & ~np.asarray(terminated)
        steps.success[:] = False if success is None else live & success
        return steps.terminated | steps.truncated

    def _border(self, rows: np.ndarray, states: np.ndarray, observed: np.ndarray) -> None:
        """Reset `rows`; make the frame in front one whose `observed` rows [N] are fresh and the others as they were."""
        if len(rows):
            self._running().reset(rows, [initial_state(state) for state in states])
        self._frames.reverse()
        for name, array in self._frames[0].items():
            array[...] = self._frames[1][name]
        self._refresh(self._frames[0], observed)

    def _refresh(self, frame: Frame, which: np.ndarray) -> None:
        rows = np.flatnonzero(which)
        if len(rows):
            write_frame(frame, rows, self._running().observe(rows))

    def _running(self) -> BatchedEnvironment:
        if self._environment is None:
            raise RuntimeError("the simulator is closed")
        return self._environment

    def _new_frame(self) -> dict[str, np.ndarray]:
        fields = frame_fields(self.observation_spec, self.num_envs)
        return {name: np.zeros(shape, dtype) for name, (dtype, shape) in fields.items()}

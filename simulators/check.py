"""The contract of a simulator, executable: run `check` on your own one."""

from __future__ import annotations

from typing import Literal

import numpy as np

from embodied_rl.errors import ContractError
from embodied_rl.simulators.base import WAIT, Simulator
from embodied_rl.specs import ActionSpec
from embodied_rl.types import ChunkResult, Episode, Observation

_STEPS = ("reward", "terminated", "truncated", "valid", "success")

Rows = dict[str, np.ndarray]
"""Arrays by name, one row per environment."""


def check(simulator: Simulator, steps: int = 20, tolerance: float = 0.0) -> None:
    """Play with `simulator` and raise `ContractError`, one line, at the first broken promise.

    Runs 2N tickets, so its schedule must have at least as many. Plays one whole episode in `steps` chunks, twice, and
    some shorter ones. `tolerance` is the largest difference allowed between two runs of the same episode, in the units
    of each array; 0 asks for the same bits. The simulator is left with its episodes interrupted.
    """
    _check_specs(simulator)
    n, dim = simulator.num_envs, simulator.action_spec.dim
    audit = _Audit(simulator, tolerance)
    generator = np.random.default_rng(0)

    chunk = 1 + max(task.max_steps for task in simulator.tasks) // steps
    actions = _actions(simulator.action_spec, generator, (steps + 1, n, chunk, dim))
    _same(
        audit.play(actions, "all"), audit.play(actions, "last"), "the same tickets and actions, played again", tolerance
    )
    _require(audit.ended > 0, "no episode ended, although all were played for longer than max_steps")

    tickets = np.arange(n)
    short = _actions(simulator.action_spec, generator, (n, steps, dim))
    whole = audit.record(tickets, short, chunk=4)
    other = np.roll(tickets, 1)
    moved = audit.record(tickets[other], short[other], chunk=4)
    _same({name: array[other] for name, array in whole.items()}, moved, "the same ticket in another row", tolerance)
    _same(whole, audit.record(tickets, short, chunk=1), "the same actions in chunks of one", tolerance)
    if n > 1:
        undisturbed = {name: array[1:] for name, array in whole.items()}
        beside = {name: array[1:] for name, array in audit.record(tickets, short, chunk=4, disturb=True).items()}
        _same(undisturbed, beside, "the rows beside one that was reset", tolerance)
    simulator.reset(tickets=np.full(n, WAIT))


class _Audit:
    """Watches over every call: keeps its own accounts and compares."""

    def __init__(self, simulator: Simulator, tolerance: float) -> None:
        self.simulator = simulator
        self.ended = 0
        n = simulator.num_envs
        self._tolerance = tolerance
        self._first: dict[int, Rows] = {}
        self._tickets = np.full(n, WAIT)
        self._task = np.zeros(n, np.int64)
        self._rewards: list[list[float]] = [[] for _ in range(n)]
        self._successes: list[list[bool]] = [[] for _ in range(n)]

    def play(self, actions: np.ndarray, observe: Literal["last", "all"]) -> Rows:
        """All chunks of `actions` [M,N,K,A], rows that end going on with another ticket; all that came of them."""
        n = self.simulator.num_envs
        self.reset(np.arange(n), np.arange(n))
        results: list[Rows] = []
        for i, chunk in enumerate(actions):
            result = self.step(chunk, observe, (np.arange(n) + 7 * i + 1) % (2 * n))
            final = result.final_observation
            results.append(_rows(result.observation) | _steps(result))
            for name, array in _rows(final).items() if final else ():
                results[-1][f"final {name}"] = np.zeros((n, *array.shape[1:]), array.dtype)
                results[-1][f"final {name}"][result.final_rows] = array
        return {f"chunk {i}: {name}": array for i, one in enumerate(results) for name, array in one.items()}

    def record(self, tickets: np.ndarray, actions: np.ndarray, chunk: int, disturb: bool = False) -> Rows:
        """What `actions` [N,T,A] did to the episodes `tickets`, no more than one per row. With `disturb`, row 0 is
        interrupted twice on the way: by another episode and by waiting."""
        n, total = actions.shape[:2]
        everyone, row = np.arange(n), np.array([0])
        recorded = {f"first {name}": array for name, array in _rows(self.reset(everyone, tickets)).items()}
        parts: list[Rows] = []
        for start in range(0, total, chunk):
            if disturb and start == chunk:
                self.reset(row, np.array([n]))
            if disturb and start == 2 * chunk:
                self.reset(row, np.array([WAIT]))
            result = self.step(actions[:, start : start + chunk], "last", None)
            parts.append(_steps(result))
        joined = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
        return recorded | joined | {f"last {name}": array for name, array in _rows(result.observation).items()}

    def reset(self, rows: np.ndarray, tickets: np.ndarray) -> Observation:
        observation = self.simulator.reset(rows, tickets).copy()
        self._check_observation("reset()", observation, len(rows))
        for i, (row, ticket) in enumerate(zip(rows.tolist(), tickets.tolist(), strict=True)):
            self._start(row, ticket, observation, i)
        return observation

    def step(
        self, actions: np.ndarray, observe: Literal["last", "all"], next_tickets: np.ndarray | None
    ) -> ChunkResult:
        result = self.simulator.step(actions, observe, next_tickets)
        n, chunk = actions.shape[:2]
        self._check_observation("ChunkResult.observation", result.observation, n)
        result.observation = result.observation.copy()
        _check_steps(result, n, chunk, any(task.has_success for task in self.simulator.tasks))
        _require(not result.lost.any(), "a worker died during the check")
        executed = result.valid.sum(1)
        running = self._tickets != WAIT
        _require(not executed[~running].any(), f"waiting rows {np.flatnonzero(~running & (executed > 0))} are valid")
        ends = np.logical_or(result.terminated, result.truncated).any(1)
        short = running & ~ends & (executed < chunk)
        _require(not short.any(), f"rows {np.flatnonzero(short)} stopped before the chunk's border without an end")
        self._check_ends(result, np.flatnonzero(ends))
        if observe == "all":
            self._check_intermediate(result, executed, chunk)
        else:
            _require(result.intermediate is None, 'observe="last" returned intermediate observations')
        for row in range(n):
            self._rewards[row] += result.reward[row, : executed[row]].tolist()
            if result.success is not None:
                self._successes[row] += result.success[row, : executed[row]].tolist()
            limit = self.simulator.tasks[self._task[row]].max_steps
            length = len(self._rewards[row])
            _require(length <= limit, f"an episode goes on after {limit} steps, its task's max_steps")
        for row, episode in zip(result.final_rows.tolist(), result.episodes, strict=True):
            self._check_episode(row, result, episode)
            self._start(row, WAIT if next_tickets is None else int(next_tickets[row]), result.observation, row)
        _require(
            np.array_equal(result.tickets, self._tickets),
            f"ChunkResult.tickets {result.tickets} where the rows run {self._tickets}",
        )
        return result

    def _start(self, row: int, ticket: int, observation: Observation, at: int) -> None:
        """Row `row` now runs `ticket`, whose first observation is row `at` of `observation`."""
        self._tickets[row] = ticket
        self._rewards[row], self._successes[row] = [], []
        if ticket != WAIT:
            self._task[row] = observation.task[at]
            first = {name: array[at : at + 1] for name, array in _rows(observation).items()}
            what = f"the first observation of ticket {ticket}, reset again"
            _same(self._first.setdefault(ticket, first), first, what, self._tolerance)

    def _check_observation(self, where: str, observation: Observation, count: int) -> None:
        spec = self.simulator.observation_spec
        _require_array(f"{where}: state", observation.state, np.float32, (count, spec.state))
        _require(
            observation.images.keys() == spec.cameras.keys() == observation.image_mask.keys(),
            f"{where}: cameras {sorted(observation.images)} where observation_spec has {sorted(spec.cameras)}",
        )
        for name, camera in spec.cameras.items():
            shape = (count, camera.height, camera.width, 3)
            _require_array(f"{where}: image '{name}'", observation.images[name], np.uint8, shape)
            _require_array(f"{where}: image_mask '{name}'", observation.image_mask[name], np.bool_, (count,))
        if spec.privileged:
            _require_array(f"{where}: privileged", observation.privileged, np.float32, (count, spec.privileged))
        else:
            _require(observation.privileged is None, f"{where}: privileged, although observation_spec has none")
        for name, size in (("instruction_id", len(observation.instructions)), ("task", len(self.simulator.tasks))):
            index = getattr(observation, name)
            _require_array(f"{where}: {name}", index, np.int64, (count,))
            inside = not count or 0 <= index.min() <= index.max() < size
            _require(inside, f"{where}: {name} {index} is outside its table of {size}")

    def _check_ends(self, result: ChunkResult, ended: np.ndarray) -> None:
        _require(np.array_equal(result.final_rows, ended), f"final_rows {result.final_rows} where rows {ended} ended")
        _require(len(result.episodes) == len(ended), f"{len(result.episodes)} episodes where {len(ended)} rows ended")
        _require(
            (result.final_observation is not None) == bool(len(ended)),
            "final_observation must be there exactly when rows ended",
        )
        if result.final_observation is not None:
            self._check_observation("final_observation", result.final_observation, len(ended))
        self.ended += len(ended)

    def _check_intermediate(self, result: ChunkResult, executed: np.ndarray, chunk: int) -> None:
        frames = result.intermediate or []
        _require(len(frames) == chunk, f'observe="all" returned {len(frames)} observations of a chunk of {chunk}')
        for k, frame in enumerate(frames):
            self._check_observation(f"intermediate[{k}]", frame, len(executed))
        ended = result.final_rows.tolist()
        goes_on = np.setdiff1d(np.flatnonzero(executed), ended)
        last = {name: array[goes_on] for name, array in _rows(frames[-1]).items()}
        after = {name: array[goes_on] for name, array in _rows(result.observation).items()}
        _same(last, after, "rows that go on, observed before and after the border where others were reset", 0.0)
        for i, row in enumerate(ended):
            final = _rows(result.final_observation.rows([i])) if result.final_observation else {}
            for k in range(int(executed[row]) - 1, chunk):
                what = f"the final observation of row {row} and intermediate[{k}], at or after its end"
                _same(_rows(frames[k].rows([row])), final, what, 0.0)

    def _check_episode(self, row: int, result: ChunkResult, episode: Episode) -> None:
        has_success = self.simulator.tasks[self._task[row]].has_success
        successes = self._successes[row]
        expected = {
            "ticket": int(self._tickets[row]),
            "task": int(self._task[row]),
            "env_id": row,
            "length": len(self._rewards[row]),
            "success_once": any(successes) if has_success else None,
            "success_at_end": successes[-1] if has_success else None,
            "truncated": bool(result.truncated[row].any()),
        }
        for name, value in expected.items():
            got = getattr(episode, name)
            _require(got == value, f"Episode.{name} of row {row} is {got} where its steps say {value}")
        got, total = episode.episode_return, sum(self._rewards[row])
        _require(
            bool(np.isclose(got, total, atol=1e-4)), f"Episode.episode_return is {got} where the rewards sum to {total}"
        )


def _check_specs(simulator: Simulator) -> None:
    _require(simulator.num_envs >= 1, f"num_envs is {simulator.num_envs}")
    _require(len(simulator.tasks) > 0, "tasks is empty")
    for task in simulator.tasks:
        _require(task.max_steps >= 1, f"task '{task.name}' has max_steps = {task.max_steps}")
    action = simulator.action_spec
    _require(
        action.dim > 0 and len(action.high) == len(action.hold) == action.dim,
        f"action_spec has {action.dim} low, {len(action.high)} high and {len(action.hold)} hold values",
    )
    bounds = list(zip(action.low, action.hold, action.high, strict=True))
    _require(all(low < high for low, _, high in bounds), "action_spec.low must be below high")
    _require(all(low <= hold <= high for low, hold, high in bounds), "action_spec.hold must lie between low and high")
    gripper = action.gripper
    _require(gripper is None or 0 <= gripper < action.dim, f"action_spec.gripper is {gripper} of {action.dim} values")


def _check_steps(result: ChunkResult, n: int, chunk: int, has_success: bool) -> None:
    """The arrays [N,K] among themselves."""
    _require((result.success is not None) == has_success, "success must be None exactly when no task defines success")
    _require_array("reward", result.reward, np.float32, (n, chunk))
    for name in _STEPS[1:4] + _STEPS[4:] * has_success:
        _require_array(name, getattr(result, name), np.bool_, (n, chunk))
    _require_array("final_rows", result.final_rows, np.int64, (len(result.final_rows),))
    _require_array("tickets", result.tickets, np.int64, (n,))
    _require_array("lost", result.lost, np.bool_, (n,))
    valid = result.valid
    _require(not (valid[:, 1:] & ~valid[:, :-1]).any(), "valid is not a prefix: a step is valid after an invalid one")
    _require(not result.reward[~valid].any(), "reward is not 0 where invalid")
    for name in ("terminated", "truncated", *["success"] * has_success):
        _require(not getattr(result, name)[~valid].any(), f"{name} at an invalid step")
    _require(not (result.terminated & result.truncated).any(), "terminated and truncated at one step: terminated wins")
    ended = result.terminated | result.truncated
    _require(not (ended[:, :-1] & valid[:, 1:]).any(), "a step is valid after the end of its episode")


def _actions(spec: ActionSpec, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    low, high = np.clip(spec.low, -1e3, 1e3), np.clip(spec.high, -1e3, 1e3)
    return generator.uniform(low, high, shape).astype(np.float32)


def _rows(observation: Observation) -> Rows:
    """The numbers of an observation by name."""
    rows = {"state": observation.state, "task": observation.task, "instruction": observation.instruction_id}
    rows |= {f"image '{name}'": image for name, image in observation.images.items()}
    return rows if observation.privileged is None else rows | {"privileged": observation.privileged}


def _steps(result: ChunkResult) -> Rows:
    arrays = {name: getattr(result, name) for name in _STEPS}
    return {name: np.array(array) for name, array in arrays.items() if array is not None}


def _same(one: Rows, other: Rows, what: str, tolerance: float) -> None:
    _require(one.keys() == other.keys(), f"{what}: {sorted(one.keys() ^ other.keys())} only once")
    for name, array in one.items():
        difference = np.abs(array.astype(np.float64) - other[name].astype(np.float64))
        worst = float(difference.max(initial=0.0))
        _require(worst <= tolerance, f"{what}: {name} differs by up to {worst:.3g}")


def _require_array(what: str, array: object, dtype: type, shape: tuple[int, ...]) -> None:
    promise = f"{np.dtype(dtype).name} {list(shape)}"
    if not isinstance(array, np.ndarray):
        raise ContractError(f"{what} is a {type(array).__name__} where {promise} is promised")
    _require(
        bool(array.dtype == dtype and array.shape == shape),
        f"{what} is {array.dtype.name} {list(array.shape)} where {promise} is promised",
    )
    _require(bool(np.isfinite(array).all()), f"{what} is not finite")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ContractError(message)

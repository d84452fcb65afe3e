"""Deterministic toy environments with ends where a test wants them."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import sys
import time
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np

from embodied_rl.errors import UserError
from embodied_rl.simulators.base import BatchedEnvironment, Environment, InitialState
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec, TaskSpec

OBSERVATION = ObservationSpec(state=3, cameras={"front": CameraSpec(2, 4), "wrist": CameraSpec(3, 3)}, privileged=1)
ACTION = ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0), hold=(0.0, 0.5), control="toy", gripper=1)
TASKS = (TaskSpec("count", "count", 100, True, "sparse"), TaskSpec("drift", "drift about", 100, False, "dense"))


class Counter(Environment):
    """Counts steps and adds up actions. The seed decides after how many steps (1 .. `longest`) and how it ends."""

    observation_spec = OBSERVATION
    action_spec = ACTION
    tasks = TASKS

    def __init__(self, longest: int = 9, success: bool = True) -> None:
        self.longest = longest
        self.success = success
        self.observations = 0
        self.steps: list[np.ndarray] = []

    def reset(self, state: InitialState) -> None:
        draw = np.random.default_rng(state.seed)
        self.task = state.task
        self.length = int(draw.integers(1, self.longest + 1))
        self.end = int(draw.integers(3))
        self.at = 0
        self.sum = np.float64(draw.random() + (state.index or 0))

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool | None]:
        self.steps.append(action)
        self.at += 1
        self.sum += action.sum()
        over = self.at == self.length
        reached = (self.at + self.length) % 2 == 0
        return (
            float(self.sum),
            over and self.end in (0, 2),
            over and self.end in (1, 2),
            reached if self.success and self.task == 0 else None,
        )

    def observe(self) -> dict[str, np.ndarray]:
        self.observations += 1
        return {
            "state": np.array([self.at, self.sum, self.length], np.float32),
            "privileged": np.array([self.end], np.float32),
            "image.front": np.full((2, 4, 3), self.at % 100, np.uint8),
            "image.wrist": np.full((3, 3, 3), self.at % 100 + 100, np.uint8),
        }


class Together(BatchedEnvironment):
    """`Counter`s stepped together; like a batched simulator it moves every row, ended or not."""

    def __init__(self, environments: list[Counter]) -> None:
        self.environments = environments
        for environment in environments:
            environment.reset(InitialState(0, 0))
        self.num_envs = len(environments)
        self.observation_spec, self.action_spec, self.tasks = OBSERVATION, ACTION, TASKS

    def reset(self, rows: np.ndarray, states: list[InitialState]) -> None:
        for row, state in zip(rows, states, strict=True):
            self.environments[row].reset(state)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        reward, terminated, truncated, success = zip(
            *(e.step(a) for e, a in zip(self.environments, actions, strict=True)), strict=True
        )
        won = None if all(s is None for s in success) else np.array([bool(s) for s in success])
        return np.array(reward), np.array(terminated), np.array(truncated), won

    def observe(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        each = [self.environments[row].observe() for row in rows]
        return {name: np.stack([one[name] for one in each]) for name in each[0]}


class Faulty(Counter):
    """Does what the first unused line of the file `orders` says, at the step it names: {"row", "at", "do"}."""

    def __init__(self, orders: str = "", longest: int = 9, at_start: str = "") -> None:
        super().__init__(longest)
        self.orders = orders
        if at_start:
            self.misbehave(at_start)

    def reset(self, state: InitialState) -> None:
        super().reset(state)
        self.seed = state.seed
        self.obey("reset")

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool | None]:
        self.obey("step")
        return super().step(action)

    def obey(self, where: str) -> None:
        if not self.orders:
            return
        order = Path(self.orders)
        # The workers share the file: another may obey, and delete it, at any moment.
        with suppress(FileNotFoundError):
            what = json.loads(order.read_text())
            if (
                what["where"] == where
                and what.get("seed", self.seed) == self.seed
                and self.at == what.get("at", self.at)
            ):
                if not what.get("again"):
                    order.unlink()
                self.misbehave(what["do"])

    def misbehave(self, what: str) -> None:
        print(f"about to {what}", file=sys.stderr)
        match what:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(3)
            case "hang":
                time.sleep(600)
            case "poll":
                for _ in range(30):
                    time.sleep(0.1)
            case "garble":
                for descriptor in range(3, 64):
                    try:
                        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                            socket.socket(fileno=os.dup(descriptor)).send(
                                b"no message at all, and longer than a header"
                            )
                    except OSError:
                        continue
            case "raise":
                raise ZeroDivisionError("the toy broke")
            case "refuse":
                raise UserError("the toy needs a battery: put one in")


class Rendezvous(Counter):
    """Constructed only together with `others` of its kind."""

    def __init__(self, folder: str, others: int) -> None:
        super().__init__()
        (Path(folder) / str(os.getpid())).touch()
        deadline = time.monotonic() + 60
        while len(os.listdir(folder)) <= others:
            if time.monotonic() > deadline:
                raise TimeoutError("alone")
            time.sleep(0.01)


class Null(Environment):
    """Costs nothing: what is left is the transport."""

    observation_spec = ObservationSpec(state=42)
    action_spec = ActionSpec(low=(-1.0,) * 8, high=(1.0,) * 8, hold=(0.0,) * 8)
    tasks = (TaskSpec("null", "do nothing", 100, True, "sparse"),)

    def __init__(self) -> None:
        self.values = {"state": np.zeros(42, np.float32)}

    def reset(self, state: InitialState) -> None:
        pass

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool | None]:
        return 0.0, False, False, False

    def observe(self) -> dict[str, np.ndarray]:
        return self.values


def assert_same(one: object, other: object, where: str = "") -> None:
    """Equality of results with arrays inside, bit by bit."""
    assert type(one) is type(other), where
    if is_dataclass(one):
        for each in fields(one):
            assert_same(getattr(one, each.name), getattr(other, each.name), f"{where}.{each.name}")
    elif isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        assert one.dtype == other.dtype, where
        np.testing.assert_array_equal(one, other, err_msg=where)
    elif isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key}]")
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other), where
        for i, (first, second) in enumerate(zip(one, other, strict=True)):
            assert_same(first, second, f"{where}[{i}]")
    else:
        assert one == other, where

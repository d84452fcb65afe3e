"""The contract of a simulator: N environments stepped by chunks of actions.

Two ways to keep it, both served by the executors in `chunk.py`:

- implement `Environment` (one environment, one step at a time) and let `WorkerSimulator` run N of them in supervised
  processes;
- implement `BatchedEnvironment` (N environments stepped together) and wrap it in `BatchedSimulator` when it lives in
  this process, e.g. on a GPU, or let each process of a `WorkerSimulator` run one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from embodied_rl.specs import ActionSpec, ObservationSpec, TaskSpec
from embodied_rl.types import ChunkResult, Observation

if TYPE_CHECKING:
    from typing import Self  # Python 3.11, newer than some simulators' own

WAIT = -1
"""The ticket of a row that runs no episode."""


@dataclass(frozen=True)
class InitialState:
    """Where an episode starts: everything a reset may depend on."""

    task: int
    """Index into the simulator's tasks."""
    seed: int
    """Seeds the simulator's own randomness for this reset, in [0, 2**31)."""
    index: int | None = None
    """Index into a task's recorded initial states, for simulators that ship them."""


class ResetSchedule(Protocol):
    """A pure function from tickets to initial states; nothing else seeds a reset. See `reset_schedule.py`."""

    def state(self, ticket: int) -> InitialState:
        """The initial state of `ticket` >= 0; the same ticket always gives the same state."""
        ...


class Simulator(ABC):
    """N environments stepped by chunks. Arrays returned are views into buffers that the next `receive` or `reset`
    overwrites: copy what you keep (`Observation.copy`)."""

    num_envs: int
    observation_spec: ObservationSpec
    action_spec: ActionSpec
    tasks: tuple[TaskSpec, ...]
    deaths: int = 0
    """Worker deaths survived so far."""

    @abstractmethod
    def reset(self, env_ids: np.ndarray | None = None, tickets: np.ndarray | None = None) -> Observation:
        """Start the episodes `tickets` (int64, one per id) in `env_ids` (default: all N); a ticket `WAIT` parks the
        row. Returns the observation of these rows. Other rows go on undisturbed."""

    @abstractmethod
    def send(
        self,
        actions: np.ndarray,
        observe: Literal["last", "all"] = "last",
        next_tickets: np.ndarray | None = None,
    ) -> None:
        """Begin a chunk: `actions` float32 [N,K,A]. A row that ends is reset at the chunk's border to its
        `next_tickets` (int64 [N]); with `WAIT`, or without tickets, it stays invalid until it is reset."""

    @abstractmethod
    def receive(self) -> ChunkResult:
        """The result of the chunk begun by `send`. Raises `SimulatorDied` after repeated worker deaths."""

    def step(
        self,
        actions: np.ndarray,
        observe: Literal["last", "all"] = "last",
        next_tickets: np.ndarray | None = None,
    ) -> ChunkResult:
        """`send`, then `receive`."""
        self.send(actions, observe, next_tickets)
        return self.receive()

    @abstractmethod
    def close(self) -> None:
        """Release everything; may be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Environment(ABC):
    """One environment, written by the author of a simulator adapter; lives in a worker process. Arrays are numpy."""

    observation_spec: ObservationSpec
    action_spec: ActionSpec
    tasks: tuple[TaskSpec, ...]

    @abstractmethod
    def reset(self, state: InitialState) -> None:
        """Start the episode that `state` describes; must seed every source of randomness from it."""

    @abstractmethod
    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool | None]:
        """Execute float32 [A]; returns (reward, terminated, truncated, success or None)."""

    @abstractmethod
    def observe(self) -> dict[str, np.ndarray]:
        """The current observation: "state" float32 [S], "image.<camera>" uint8 [H,W,3], "privileged" float32 [P];
        exactly the keys and shapes of `observation_spec`. Rendering happens here and only here."""

    def close(self) -> None:  # noqa: B027 - optional
        """Release the simulator."""


class BatchedEnvironment(ABC):
    """N environments stepped together. Arrays are numpy (converted once, at the border of the simulator)."""

    num_envs: int
    observation_spec: ObservationSpec
    action_spec: ActionSpec
    tasks: tuple[TaskSpec, ...]

    @abstractmethod
    def reset(self, rows: np.ndarray, states: list[InitialState]) -> None:
        """Start `states` in `rows` (int64), leaving other rows undisturbed."""

    @abstractmethod
    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Execute float32 [N,A]; returns (reward [N], terminated [N], truncated [N], success [N] or None)."""

    @abstractmethod
    def observe(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The current observation of `rows`, keys as in `Environment.observe` with a leading batch axis."""

    def close(self) -> None:  # noqa: B027 - optional
        """Release the simulator."""


class Demonstrator(Protocol):
    """A scripted expert acting from the state of N rows; the caller adds noise."""

    def reset(self, rows: np.ndarray, tasks: np.ndarray) -> None:
        """`rows` (int64 [M]) begin episodes of `tasks` (int64 [M], indices into the simulator's tasks)."""
        ...

    def actions(self, state: np.ndarray) -> np.ndarray:
        """float32 [N,A] for states [N,S], in simulator units."""
        ...


@dataclass(frozen=True)
class Listing:
    """One line of `embodied-rl list simulators --tasks`. None: known only once the task is built."""

    name: str
    instruction: str
    cameras: tuple[str, ...] | None
    action_dim: int | None
    max_steps: int | None
    reward: str
    """Kinds of reward it defines, e.g. "sparse" or "sparse, dense"."""
    missing: str = ""
    """What it lacks on this machine and how to get it, on one line; "" when it can run."""


class SimulatorConfig(Protocol):
    """What the configuration dataclass behind a registered simulator name offers; importing it imports no simulator.

    Its module may also have a function `tasks() -> list[Listing]` with every task that the simulator knows.
    """

    num_envs: int

    @property
    def num_tasks(self) -> int:
        """Tasks that `InitialState.task` indexes."""
        ...

    @property
    def num_states(self) -> int:
        """Recorded initial states of each task, which `InitialState.index` indexes; 0 when resets come from seeds."""
        ...

    def build(self, schedule: ResetSchedule, *, log_dir: Path | None = None) -> Simulator:
        """Start the simulator; raises `UserError` for whatever cannot be run."""
        ...

    def demonstrator(self) -> Demonstrator:
        """The scripted expert of the task; raises `UserError` when there is none."""
        ...

"""What flows between simulators, policies and algorithms.

Shapes: N environments of a simulator, B rows of any batch, K executed actions of a chunk, H predicted actions,
A action dimensions, S state dimensions, L log-prob terms, T decisions of a trajectory segment. Arrays are numpy on the
simulator side and torch on the policy side; `Array` stands for either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

Array = Any


@dataclass
class Observation:
    """A batch of B observations; one batch has one `ObservationSpec`.

    `instructions` is the table that `instruction_id` indexes: text crosses a process border only when it changes.
    """

    images: dict[str, Array]
    """{camera: uint8 [B,H,W,3]}; sizes may differ per camera."""
    image_mask: dict[str, Array]
    """{camera: bool [B]}, False where a row has no such camera."""
    state: Array
    """float32 [B,S] proprioception (and object state where the task is a state task)."""
    instruction_id: Array
    """int64 [B], row of `instructions`."""
    task: Array
    """int64 [B], index into the simulator's `tasks`."""
    instructions: tuple[str, ...] = ()
    privileged: Array | None = None
    """float32 [B,P], for the critic only."""

    def __len__(self) -> int:
        return len(self.state)

    def map(self, function: Callable[[Array], Array]) -> Observation:
        """Apply `function` to every array."""
        return replace(
            self,
            images={name: function(image) for name, image in self.images.items()},
            image_mask={name: function(mask) for name, mask in self.image_mask.items()},
            state=function(self.state),
            instruction_id=function(self.instruction_id),
            task=function(self.task),
            privileged=None if self.privileged is None else function(self.privileged),
        )

    def rows(self, index: Array) -> Observation:
        """The rows `index` (integers, a boolean mask or a slice)."""
        return self.map(lambda array: array[index])

    def copy(self) -> Observation:
        """A copy that does not alias the simulator's buffers."""
        return self.map(np.array)

    def texts(self) -> list[str]:
        """The instruction of every row."""
        return [self.instructions[int(i)] for i in self.instruction_id]

    @staticmethod
    def concatenate(parts: Sequence[Observation]) -> Observation:
        """Stack numpy observations of one spec and one instruction table along the batch axis."""
        first = parts[0]
        if any(part.instructions != first.instructions for part in parts):
            raise ValueError("observations with different instruction tables cannot be concatenated")
        arrays = [list(_arrays(part)) for part in parts]
        joined = iter([np.concatenate(column) for column in zip(*arrays, strict=True)])
        return first.map(lambda _: next(joined))


def _arrays(observation: Observation) -> list[Array]:
    found: list[Array] = []
    observation.map(lambda array: found.append(array) or array)
    return found


@dataclass
class Episode:
    """A finished episode."""

    ticket: int
    """The ticket it was reset with."""
    task: int
    env_id: int
    length: int
    """Executed (valid) environment steps."""
    episode_return: float
    """Undiscounted sum of the rewards of valid steps."""
    success_once: bool | None
    """Success at any step; None when the task defines no success."""
    success_at_end: bool | None
    truncated: bool
    """True when the time limit ended it (termination wins when both happen at one step)."""


@dataclass
class ChunkResult:
    """What one chunk of actions did to N environments."""

    observation: Observation
    """[N], the observation acted on next: after the border reset for rows that ended."""
    reward: Array
    """float32 [N,K]; 0 where not valid."""
    terminated: Array
    """bool [N,K]; wins over `truncated`."""
    truncated: Array
    """bool [N,K]."""
    valid: Array
    """bool [N,K]: the action belongs to the running episode; a prefix of each row."""
    success: Array | None
    """bool [N,K], None when the task defines no success."""
    final_rows: Array
    """int64 [E], rows whose episode ended in this chunk, ascending."""
    final_observation: Observation | None
    """[E], the true last observation of each ended episode; None when E = 0."""
    episodes: list[Episode]
    """E records, in the order of `final_rows`."""
    tickets: Array
    """int64 [N], ticket of the episode that `observation` belongs to, -1 for a waiting row."""
    lost: Array
    """bool [N]: the worker of this row died in this chunk. Its running episode is gone (`valid` is all False) and the
    row was reset to the same ticket: nothing of it may be learned from."""
    intermediate: list[Observation] | None = None
    """`observe="all"`: K observations [N], after every action (frozen rows repeat their last)."""


@dataclass
class ActionSample:
    """What a policy answers to a batch of inputs."""

    actions: Array
    """float32 [B,K,A] in the simulator's units, ready to execute."""
    trace: dict[str, Array]
    """Every number that enters the score, per row [B,...]; `evaluate_actions(inputs, trace)` needs nothing else."""
    log_prob: Array | None = None
    """float32 [B,L]; None for a deterministic sample."""
    value: Array | None = None
    """float32 [B], where it comes with the actions; others have no value, or ask `policy.value` for it later."""


@dataclass
class Score:
    """Log-prob terms of recorded actions: `policy.evaluate_actions(inputs, trace)`."""

    log_prob: Array
    """[B,L]."""
    entropy: Array
    """[B,L], per term; a constant where the policy's noise is fixed."""
    term_step: Array
    """int64 [L] or [B,L]: index of the action in the chunk that a term belongs to, -1 = the whole chunk."""
    log_prob_mask: Array | None = None
    """bool [B,L], None = all terms count."""
    value: Array | None = None
    """[B], `policy.value(inputs)` from a policy that has it at hand when it scores."""


@dataclass
class Trajectory:
    """A segment of T decisions in N environments, time first; torch tensors.

    Reward, terminated, truncated and the bootstrap value stay separate: what they mean together is the algorithm's
    business.
    """

    inputs: dict[str, Array]
    """[T,N,...], what `policy.prepare` returned."""
    trace: dict[str, Array]
    """[T,N,...]."""
    actions: Array
    """float32 [T,N,K,A]."""
    log_prob: Array
    """float32 [T,N,L]."""
    value: Array
    """float32 [T,N], V of the observation acted on."""
    last_value: Array
    """float32 [N], V of the observation after the last decision."""
    final_value: Array
    """float32 [T,N], V(final observation) where the episode was truncated in that chunk, else 0."""
    reward: Array
    """float32 [T,N,K]."""
    terminated: Array
    """bool [T,N,K]."""
    truncated: Array
    """bool [T,N,K]."""
    valid: Array
    """bool [T,N,K]."""
    tickets: Array
    """int64 [T,N]."""
    version: int
    """Version of the weights that acted."""
    episodes: list[Episode] = field(default_factory=list)

    def arrays(self) -> Mapping[str, Array]:
        """The plain [T,N,...] arrays by field name (not `inputs`, `trace`)."""
        skip = {"inputs", "trace", "last_value", "version", "episodes"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}


@dataclass
class EpisodeBatch:
    """R decisions of whole episodes, those of an episode in their order; torch tensors. Decisions without a valid step
    are left out, so rows that wait cost no memory."""

    inputs: dict[str, Array]
    """[R,...], what `policy.prepare` returned."""
    trace: dict[str, Array]
    """[R,...]."""
    log_prob: Array
    """float32 [R,L]."""
    reward: Array
    """float32 [R,K]."""
    valid: Array
    """bool [R,K]."""
    tickets: Array
    """int64 [R], the episode of each decision."""
    version: int
    """Version of the weights that acted."""
    episodes: list[Episode]
    """All episodes of the groups that were run; those not learned from have no decision here."""

"""The rollout worker: a policy acting in a simulator, decision by decision.

It owns what must not depend on batching, workers or executors: which ticket a row runs, how many decisions into the
episode it is, and hence the noise of every decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch

from embodied_rl.errors import UserError
from embodied_rl.pipeline.episodes import Episodes, in_order
from embodied_rl.pipeline.segment import Memory, Segment, required
from embodied_rl.pipeline.tickets import Source, TicketList, Tickets
from embodied_rl.policies.base import Inputs, Policy
from embodied_rl.randomness import RowNoise
from embodied_rl.simulators.base import WAIT, Simulator
from embodied_rl.specs import Connection
from embodied_rl.types import ActionSample, ChunkResult, EpisodeBatch, Observation, Trajectory

Result = TypeVar("Result")

Intervene = Callable[[Observation, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""What a person who watches does: (the simulator's observation [N], the policy's actions float32 [N,K,A]) -> (actions
float32 [N,K,A], bool [N,K]: which of them to execute instead of the policy's), in the policy's units."""


@dataclass
class Decision:
    """One decision of all N rows and what became of it."""

    inputs: Inputs
    """What the policy saw, [N,...]."""
    sample: ActionSample
    result: ChunkResult
    next_inputs: Inputs
    """What it sees next (after the border reset for rows that ended), [N,...]."""
    final_inputs: Inputs | None
    """The true last observation of the rows `result.final_rows`, [E,...]."""
    tickets: np.ndarray
    """int64 [N], the episode each row was in."""
    intervened: np.ndarray
    """bool [N,K]: an action that was a person's; `sample.actions` holds it."""


class RolloutWorker:
    """`begin` decides and starts a chunk, `finish` waits for it; a learner may work between the two."""

    def __init__(self, simulator: Simulator, policy: Policy, connection: Connection, seed: int) -> None:
        self.simulator = simulator
        self.policy = policy
        self.connection = connection
        self.seed = seed
        self.intervene: Intervene | None = None
        """A person who may take over."""
        self.env_steps = 0
        """Valid environment steps so far."""
        self.lost_episodes = 0
        self.check: Callable[[], object] = lambda: None
        """Called at every decision of a collection, which ends when this raises."""
        self._memory = Memory()
        self._beside: Executor | None = None
        """See `Segment`."""

    def restart(self, tickets: Tickets) -> None:
        """Abandon what runs and start fresh episodes in every row, with tickets from `tickets`."""
        self.sources: Sequence[Source] = tickets.rows(self.simulator.num_envs)
        self.tickets = np.array([source.issue() for source in self.sources], dtype=np.int64)
        self._next_tickets = np.array([source.issue() for source in self.sources], dtype=np.int64)
        self._decisions = np.zeros(self.simulator.num_envs, dtype=np.int64)
        self.observation = self.simulator.reset(tickets=self.tickets)
        """What every row sees now, in memory of the simulator."""
        self._inputs = self._prepare(self.observation)

    def take_over(self, other: RolloutWorker, rows: slice) -> None:
        """Go on where the `rows` of `other` are, whose simulator contains this one's."""
        self.sources = other.sources[rows]
        self.tickets, self._next_tickets = other.tickets[rows].copy(), other._next_tickets[rows].copy()
        self._decisions = other._decisions[rows].copy()
        self._inputs = {name: tensor[rows] for name, tensor in other._inputs.items()}

    @torch.no_grad()
    def begin(
        self,
        deterministic: bool = False,
        observe: Literal["last", "all"] = "last",
        act: Callable[[Inputs, RowNoise], ActionSample] | None = None,
        exploration: float = 0.0,
    ) -> None:
        """Decide in every row and send the chunk. `act` decides instead of the policy; `exploration` is the standard
        deviation of Gaussian noise added to the actions, in units of half the action range; a chunk keeps one draw for
        all its actions, so that it moves the robot rather than shaking it."""
        noise = RowNoise(self.seed, self.tickets, self._decisions)
        sample = act(self._inputs, noise) if act else self.policy.act(self._inputs, deterministic, noise)
        if exploration:
            low = torch.tensor(self.policy.action_spec.low, device=sample.actions.device)
            high = torch.tensor(self.policy.action_spec.high, device=sample.actions.device)
            jitter = torch.from_numpy(noise.normal(1, len(low))).to(sample.actions.device)
            moved = sample.actions + exploration * jitter * (high - low) / 2
            sample.actions = torch.minimum(torch.maximum(moved, low), high)
        self._intervened = np.zeros(sample.actions.shape[:2], bool)
        if self.intervene is not None:
            sample.actions = self._corrected(sample.actions, self.intervene)
        actions = sample.actions.numpy(force=True)
        if not np.isfinite(actions).all():
            row = int(np.flatnonzero(~np.isfinite(actions).all(axis=(1, 2)))[0])
            raise UserError(
                f"the policy chose a non-finite action (ticket {self.tickets[row]}, decision {self._decisions[row]}, "
                f"env step {self.env_steps}): lower the learning rate or resume from an earlier checkpoint"
            )
        self._sample = sample
        self.simulator.send(self.connection.action(actions), observe, self._next_tickets)

    @torch.no_grad()
    def finish(self) -> Decision:
        """Wait for the chunk that `begin` sent."""
        result = self.simulator.receive()
        for name in ("reward", "terminated", "truncated", "valid"):  # small; the simulator reuses its buffers
            setattr(result, name, np.array(getattr(result, name)))
        inputs, tickets = self._inputs, self.tickets.copy()
        self.env_steps += int(result.valid.sum())
        self.lost_episodes += int(result.lost.sum())
        ended = np.zeros(len(tickets), bool)
        ended[result.final_rows] = True
        self.tickets = np.array(result.tickets)
        self._decisions = np.where(ended | result.lost, 0, self._decisions + 1)
        for episode in result.episodes:
            if episode.success_once is False:
                self.sources[episode.env_id].failed(episode.ticket)
        for row in result.final_rows:
            self._next_tickets[row] = self.sources[row].issue()
        final = None if result.final_observation is None else self._prepare(result.final_observation)
        self.observation = result.observation
        self._inputs = self._prepare(result.observation)
        return Decision(inputs, self._sample, result, self._inputs, final, tickets, self._intervened)

    def _corrected(self, proposed: torch.Tensor, intervene: Intervene) -> torch.Tensor:
        """The actions to execute."""
        theirs, instead = intervene(self.observation, proposed.numpy(force=True).copy())
        theirs, self._intervened = np.asarray(theirs, np.float32), np.asarray(instead, bool)
        if theirs.shape != proposed.shape or self._intervened.shape != proposed.shape[:2]:
            raise UserError(
                f"intervene gave actions {list(theirs.shape)} and a mask {list(self._intervened.shape)} where "
                f"{list(proposed.shape)} and {list(proposed.shape[:2])} are needed"
            )
        mask = torch.from_numpy(self._intervened).to(proposed.device)
        return torch.where(mask.unsqueeze(-1), torch.from_numpy(theirs).to(proposed), proposed)

    @property
    def groups(self) -> Sequence[RolloutWorker]:
        """Which take turns: while the policy decides for one, the simulators of the others execute."""
        return [self]

    def collect(self, decisions: int, version: int) -> Trajectory:
        """A segment of `decisions` decisions for an on-policy learner, in weights `version`."""
        segment = Segment(decisions, self.simulator.num_envs, self.policy, self._memory, self._beside)
        for group in self.groups:
            group.begin()
        for t in range(decisions):
            self.check()
            for group, rows in self._rows():
                step = group.finish()
                if self._beside is not None:  # written while the policy decides
                    segment.add(t, rows, step)
                if t + 1 < decisions:
                    group.begin()
                if self._beside is None:  # written while the simulators execute
                    segment.add(t, rows, step)
        return segment.trajectory(version)

    def collect_episodes(self, tickets: range, version: int) -> EpisodeBatch:
        """Run the episodes `tickets` once each, from start to end, in weights `version`; rows without one wait.

        An episode lost to a worker's death is run again. The batch is in the order of tickets and decisions, whoever
        ran them. Abandons what the worker was doing.
        """
        self.restart(TicketList(tickets))
        collected = Episodes()
        running = [(group, rows) for group, rows in self._rows() if group.running]
        for group, _ in running:
            group.begin()
        while running:
            self.check()
            for group, rows in running:
                step = group.finish()
                if group.running:
                    group.begin()
                collected.add(self._decisions_of(step, rows.start, version))
                if step.result.lost.any():
                    collected.drop(step.tickets[step.result.lost])
            running = [(group, rows) for group, rows in running if group.running]
        return in_order(collected.parts)

    def apart(self, policy: Policy, function: Callable[[RolloutWorker, range], Result], tickets: range) -> list[Result]:
        """[function(worker, `tickets`)] of a worker in the same environments that acts by `policy`. Where others have
        some of the environments, every one of them gets its share of the tickets and adds its result. Abandons what the
        worker was doing: `restart` it before going on."""
        other = RolloutWorker(self.simulator, policy, self.connection, self.seed)
        result = function(other, tickets)
        self.lost_episodes += other.lost_episodes
        return [result]

    @property
    def running(self) -> bool:
        """Some row has an episode to go on with."""
        return bool((self.tickets != WAIT).any())

    def _rows(self) -> Iterator[tuple[RolloutWorker, slice]]:
        """The groups and which of the N rows are theirs."""
        start = 0
        for group in self.groups:
            stop = start + group.simulator.num_envs
            yield group, slice(start, stop)
            start = stop

    def _decisions_of(self, step: Decision, first: int, version: int) -> EpisodeBatch:
        """The rows of a decision that have a valid step; its rows are those from `first` on."""
        live = step.result.valid.any(axis=1)
        rows = torch.from_numpy(np.flatnonzero(live)).to(self.policy.device)
        sample, result = step.sample, step.result
        return EpisodeBatch(
            inputs={key: tensor[rows] for key, tensor in step.inputs.items()},
            trace={key: tensor[rows] for key, tensor in sample.trace.items()},
            log_prob=required(sample.log_prob)[rows],
            reward=torch.from_numpy(result.reward[live]).to(self.policy.device),
            valid=torch.from_numpy(result.valid[live]).to(self.policy.device),
            tickets=torch.from_numpy(step.tickets[live]),
            version=version,
            episodes=[replace(episode, env_id=first + episode.env_id) for episode in result.episodes],
        )

    def _prepare(self, observation: Observation) -> Inputs:
        for name, array in (("state", observation.state), ("privileged", observation.privileged)):
            if array is not None and not np.isfinite(array).all():
                row, column = np.argwhere(~np.isfinite(array))[0]
                names = self.simulator.observation_spec.state_names if name == "state" else ()
                which = f" ({names[column]})" if names else ""
                raise UserError(
                    f"observation.{name}[{row},{column}]{which} is {array[row, column]} after env step "
                    f"{self.env_steps} (task {self.simulator.tasks[int(observation.task[row])].name}): the simulation "
                    f"diverged; lower the action limits or leave this initial state out"
                )
        return self.policy.prepare(self.connection.observation(observation))

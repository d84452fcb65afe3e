"""A policy whose rows are computed independently of each other, bit by bit, and workers that act by it."""

from __future__ import annotations

from typing import Any

import torch
from training_toys import ReachConfig

from embodied_rl.pipeline.env_groups import EnvGroups, rollout_worker
from embodied_rl.pipeline.rollout import RolloutWorker
from embodied_rl.policies.base import Inputs, Policy
from embodied_rl.randomness import RowNoise
from embodied_rl.simulators.base import Simulator
from embodied_rl.specs import ActionSpec, ObservationSpec, connect
from embodied_rl.training.streams import Streams
from embodied_rl.types import ActionSample, Observation, Score, Trajectory


class Additive(Policy):
    """Towards the target with noise, in sums and products alone: those of a row have one order in every batch."""

    horizon = chunk = 2

    def __init__(self, observation_spec: ObservationSpec, action_spec: ActionSpec) -> None:
        super().__init__()
        self.observation_spec, self.action_spec = observation_spec, action_spec
        self.gain = torch.nn.Parameter(torch.tensor(0.7))
        self.value_head = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor(0.3))])

    def prepare(self, observation: Observation) -> Inputs:
        return {"state": torch.asarray(observation.state, dtype=torch.float32, copy=True)}

    def act(self, inputs: Inputs, deterministic: bool = False, noise: RowNoise | None = None) -> ActionSample:
        assert noise is not None
        x = self._mean(inputs) + 0.8 * torch.from_numpy(noise.normal(2, 2))
        return ActionSample(x, {"x": x}, self._log_prob(inputs, x), self.value(inputs))

    def evaluate_actions(self, inputs: Inputs, trace: dict[str, torch.Tensor]) -> Score:
        log_prob = self._log_prob(inputs, trace["x"])
        return Score(log_prob, torch.zeros_like(log_prob), torch.zeros(4, dtype=torch.int64))

    def value(self, inputs: Inputs) -> torch.Tensor:
        return self.value_head[0] * inputs["state"][:, 0] - inputs["state"][:, 3]

    def imitation_loss(self, inputs: Inputs, actions: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _mean(self, inputs: Inputs) -> torch.Tensor:
        state = inputs["state"]
        return (self.gain * (state[:, 2:] - state[:, :2]))[:, None].expand(-1, 2, -1)

    def _log_prob(self, inputs: Inputs, x: torch.Tensor) -> torch.Tensor:
        return -(x - self._mean(inputs)).square().flatten(1)


def in_groups(*sizes: int) -> Simulator:
    """Reaching, in this process: one simulator, or one per size as groups."""
    built = [ReachConfig(num_envs=size, workers=None).build(Streams(3, 1, 4, 4)) for size in sizes]  # type: ignore[arg-type]
    return EnvGroups(built) if len(built) > 1 else built[0]


def make_worker(simulator: Simulator, policy: Any = None) -> RolloutWorker:
    seen, told = simulator.observation_spec, simulator.action_spec
    policy = policy or Additive(seen, told)
    connection = connect(seen, told, policy.observation_spec, policy.action_spec)
    return rollout_worker(simulator, policy, connection, seed=5)


def same(one: Any, other: Any) -> None:
    """Equality of two trajectories or batches, bit by bit."""
    assert vars(one).keys() == vars(other).keys()
    for name, value in vars(one).items():
        theirs = getattr(other, name)
        parts = value if isinstance(value, dict) else {"": value}
        for key, part in parts.items():
            counterpart = theirs[key] if isinstance(value, dict) else theirs
            equal = torch.equal(part, counterpart) if isinstance(part, torch.Tensor) else part == counterpart
            assert equal, f"{name}.{key}"


def snapshot(trajectory: Trajectory) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in [*trajectory.inputs.values(), trajectory.reward, trajectory.valid]]

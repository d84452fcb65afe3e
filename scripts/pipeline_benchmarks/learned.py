"""A torch policy and a learner that look at every image and otherwise cost what they are told to, by sleeping, as on a
device of their own."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rl.algorithms.base import Metrics, OnPolicyAlgorithm
from embodied_rl.policies.base import Inputs, Policy
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ActionSpec, ObservationSpec
from embodied_rl.types import ActionSample, Observation, Score, Trajectory

STRIDE = 32
"""Of the pixels that are looked at."""


class Sleeping(Policy):
    """A Gaussian around a linear function of some pixels; acting takes `fixed` + `per_row` * rows seconds."""

    horizon = chunk = 1

    def __init__(self, observation_spec: ObservationSpec, action_spec: ActionSpec, fixed: float, per_row: float):
        super().__init__()
        self.observation_spec, self.action_spec = observation_spec, action_spec
        self.fixed, self.per_row = fixed, per_row
        pixels = sum(3 * -(-c.height // STRIDE) * -(-c.width // STRIDE) for c in observation_spec.cameras.values())
        self.mean = nn.Linear(pixels + observation_spec.state, action_spec.dim)
        self.value_head = nn.Linear(pixels + observation_spec.state, 1)
        self.spent: list[tuple[int, float]] = []
        """Rows and seconds of every call of `act`."""

    def prepare(self, observation: Observation) -> Inputs:
        seen = {f"image.{name}": torch.tensor(image) for name, image in observation.images.items()}
        return seen | {"state": torch.tensor(observation.state)}

    @torch.no_grad()
    def act(self, inputs: Inputs, deterministic: bool = False, noise: RowNoise | None = None) -> ActionSample:
        began = time.perf_counter()
        assert noise is not None
        features = self.features(inputs)
        mean = self.mean(features)
        x = mean + torch.from_numpy(noise.normal(mean.shape[1]))
        sample = ActionSample(x[:, None], {"x": x}, -(x - mean).square() / 2, self.value_head(features).squeeze(1))
        time.sleep(max(0.0, began + self.fixed + self.per_row * len(x) - time.perf_counter()))
        self.spent.append((len(x), time.perf_counter() - began))
        return sample

    def features(self, inputs: Inputs) -> Tensor:
        pixels = [v[:, ::STRIDE, ::STRIDE].flatten(1) / 255 for name, v in inputs.items() if name.startswith("image.")]
        return torch.cat([*pixels, inputs["state"] / 100], 1)

    def value(self, inputs: Inputs) -> Tensor:
        return self.value_head(self.features(inputs)).squeeze(1)

    def evaluate_actions(self, inputs: Inputs, trace: dict[str, Tensor]) -> Score:
        log_prob = -(trace["x"] - self.mean(self.features(inputs))).square() / 2
        return Score(log_prob, torch.zeros_like(log_prob), torch.zeros(log_prob.shape[1], dtype=torch.int64))

    def imitation_loss(self, inputs: Inputs, actions: Tensor, valid: Tensor) -> Tensor:
        raise TypeError("nothing is imitated here")


class Learner(OnPolicyAlgorithm):
    """One step of policy gradient from every segment, which takes `seconds`; checks that its images arrived."""

    def __init__(self, policy: Sleeping, staleness: int, seconds: float) -> None:
        self.policy = policy
        self.staleness = staleness
        self.seconds = seconds
        self.optimizer = torch.optim.SGD(policy.parameters(), lr=1e-6)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self.optimizer}

    def learn(self, trajectory: Trajectory, generator: torch.Generator) -> Metrics:
        until = time.perf_counter() + self.seconds
        inputs = {name: tensor.flatten(0, 1) for name, tensor in trajectory.inputs.items()}
        for name, tensor in inputs.items():
            if name.startswith("image."):
                corners = tensor[:, [0, -1], [0, -1]].flatten(1)
                if not (corners == inputs["state"][:, :1]).all():
                    raise RuntimeError(f"{name} is not what the simulator drew")
        advantage = trajectory.reward.sum(-1).flatten() - trajectory.value.flatten()
        score = self.policy.evaluate_actions(inputs, {name: x.flatten(0, 1) for name, x in trajectory.trace.items()})
        error = self.policy.value(inputs) - trajectory.reward.sum(-1).flatten()
        loss = error.square().mean() - (advantage * score.log_prob.sum(1)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        time.sleep(max(0.0, until - time.perf_counter()))
        return {"loss": float(loss.detach())}


def spent(worker: Any, _: range) -> list[tuple[int, float]]:
    """`Sleeping.spent` since this was asked for last, wherever the policy acts."""
    found, worker.policy.spent = worker.policy.spent, []
    return found


def inference_seconds(spent: list[tuple[int, float]]) -> float:
    """Mean of the calls with the most rows."""
    rows = max(count for count, _ in spent)
    return float(np.mean([seconds for count, seconds in spent if count == rows]))

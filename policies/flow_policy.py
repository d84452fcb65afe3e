"""What every flow-matching policy shares: acting, scoring, imitating and differentiable sampling, on top of a network
that gives `encode` and `velocity`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.policies.base import Inputs, Policy
from embodied_rl.policies.flow import FlowSampler, FlowSamplerConfig
from embodied_rl.randomness import RowNoise
from embodied_rl.types import ActionSample, Score

if TYPE_CHECKING:
    from embodied_rl.policies.steered_flow import SteeredFlow


@dataclass(frozen=True)
class FlowConfig(ABC):
    """Settings of every flow policy; the sampler's are those of `FlowSamplerConfig`."""

    state: tuple[str, ...] = ()
    """Names of the simulator's state that the policy sees, in its order; "hand" means all of "hand.0", "hand.1", ...;
    () = the whole state."""
    horizon: int = 4
    """H, predicted actions."""
    chunk: int = 4
    """K, executed actions."""
    denoise_steps: int = 4
    """N, steps from noise to action."""
    method: Literal["sde", "noise", "cps", "ode"] = "sde"
    """How a step becomes stochastic: Flow-SDE, learned Flow-Noise, Flow-CPS, or never."""
    noise_level: float = 0.5
    """Of "sde" and "cps"; "noise" learns its own."""
    joint: bool = False
    """Every step is stochastic and scored, not one step drawn per row."""
    joint_reduction: Literal["sum", "mean"] = "sum"
    """The chain's density is the "sum"; "mean" averages over its steps and the initial noise."""
    noise_std: tuple[float, float] = (0.08, 0.16)
    """Range of the learned deviation of method "noise", in network units."""

    def __post_init__(self) -> None:
        if not 1 <= self.chunk <= self.horizon:
            raise UserError(f"{self.name}: needs 1 <= chunk <= horizon, got {self.chunk} and {self.horizon}")
        if not 0 < self.noise_std[0] <= self.noise_std[1]:
            raise UserError(f"{self.name}: noise_std must be an ascending range above 0, not {self.noise_std}")
        self.sampler()

    @property
    @abstractmethod
    def name(self) -> str:
        """As registered."""

    def sampler(self) -> FlowSamplerConfig:
        """The sampler's part."""
        return FlowSamplerConfig(self.denoise_steps, self.method, self.noise_level, self.joint, self.joint_reduction)


class FlowPolicy(Policy):
    """A subclass sets `sampler` and `width`, and gives the network. Executed actions are clipped to the action bounds;
    the trace keeps what was sampled, so that the score is right."""

    sampler: FlowSampler
    width: int
    """D, dimensions of the network's actions; the first A are real."""

    @abstractmethod
    def encode(self, inputs: Inputs) -> Any:
        """What the velocity needs to know of the observation; computed once per decision or update."""

    @abstractmethod
    def velocity(self, prefix: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        """(v [B,H,D], hidden) at x [B,H,D] and times t [B]; see `flow.py` for the convention."""

    @abstractmethod
    def to_simulator(self, x: Tensor, inputs: Inputs) -> Tensor:
        """Network actions [B,*,D] at `inputs` -> simulator actions [B,*,A] within the bounds."""

    @abstractmethod
    def to_network(self, actions: Tensor, inputs: Inputs) -> Tensor:
        """Simulator actions [B,*,A] at `inputs` -> network actions [B,*,D]."""

    def standard_deviation(self, hidden: Any) -> Tensor:
        """[B,H,D], the learned deviation of the sampler's method "noise"."""
        raise TypeError(f"{type(self).__name__} learns no standard deviation; use another sampling method")

    def prefix_value(self, prefix: Any, inputs: Inputs) -> Tensor:
        """`value(inputs)` where `encode(inputs)` is at hand, for a value head that reads it."""
        return self.value(inputs)

    @torch.no_grad()
    def act(self, inputs: Inputs, deterministic: bool = False, noise: RowNoise | None = None) -> ActionSample:
        """A deterministic sample follows the ODE. Its initial noise still is the row's, because a flow without it is
        not the policy that was trained; without `noise` it starts from 0 and is a function of the observation alone."""
        prefix = self.encode(inputs)
        value = self.prefix_value(prefix, inputs)
        rows = len(next(iter(inputs.values())))
        zeros = torch.zeros((rows, self.horizon, self.width), device=self.device, dtype=self.dtype)
        if deterministic:
            start = zeros if noise is None else torch.from_numpy(noise.normal(self.horizon, self.width)).to(zeros)
            x = self.sampler.ode(self.velocity, prefix, start)
            return ActionSample(self._executed(x, inputs), {}, None, value)
        drawn = self.sampler.draw(zeros, noise)
        if self.sampler.config.method == "ode":
            x = self.sampler.ode(self.velocity, prefix, drawn.initial)
            return ActionSample(self._executed(x, inputs), {}, None, value)
        x, trace, log_prob = self.sampler.sample(self.velocity, prefix, drawn, self.standard_deviation)
        return ActionSample(self._executed(x, inputs), trace, log_prob, value)

    def evaluate_actions(self, inputs: Inputs, trace: dict[str, Tensor]) -> Score:
        prefix = self.encode(inputs)
        log_prob, entropy = self.sampler.score(self.velocity, prefix, trace, self.standard_deviation)
        steps = self.sampler.term_step(log_prob.device)
        return Score(log_prob, entropy, steps, value=self.prefix_value(prefix, inputs))

    def imitation_loss(
        self,
        inputs: Inputs,
        actions: Tensor,
        valid: Tensor,
        *,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Flow matching (arXiv 2210.02747), [B]: the mean squared error of the velocity against noise - action over
        the valid steps. Invalid actions are replaced by 0, so nothing leaks from them. `noise` [B,H,D] standard normal
        and `time` [B], 1 = noise, are drawn when None, from `generator` or torch's global one."""
        keep = valid[..., None]
        target = self.to_network(torch.where(keep, actions, 0.0), inputs)
        action = torch.where(keep, target, 0.0)
        if noise is None:
            noise = torch.randn(action.shape, generator=generator, device=action.device, dtype=action.dtype)
        if time is None:
            time = self.imitation_times(
                torch.rand(len(action), generator=generator, device=action.device, dtype=action.dtype)
            )
        t = time[:, None, None]
        v, _ = self.velocity(self.encode(inputs), t * noise + (1 - t) * action, time)
        error = torch.where(keep, v - (noise - action), 0.0)[..., : self.imitated]
        return error.square().sum((1, 2)) / (valid.sum(1) * self.imitated).clamp_min(1)

    @property
    def imitated(self) -> int:
        """How many of the D dimensions imitation learns; the padding is learned to be 0 unless it is left out."""
        return self.width

    def imitation_times(self, uniform: Tensor) -> Tensor:
        """Times [B] to imitate at, of numbers drawn uniformly from [0, 1)."""
        return uniform

    def sample(self, inputs: Inputs, noise: Tensor | None = None) -> Tensor:
        """Actions [B,H,A], differentiable through the N ODE steps from `noise` [B,H,D] (standard normal when None)."""
        if noise is None:
            rows = len(next(iter(inputs.values())))
            noise = torch.randn((rows, self.horizon, self.width), device=self.device, dtype=self.dtype)
        return self.to_simulator(self.sampler.ode(self.velocity, self.encode(inputs), noise), inputs)

    @torch.no_grad()
    def follow(self, inputs: Inputs, noise: Tensor) -> Tensor:
        """Executed actions [B,K,A] of the ODE from `noise` [B,H,D]."""
        return self._executed(self.sampler.ode(self.velocity, self.encode(inputs), noise), inputs)

    def steered(self, features: int, hidden: Sequence[int], shared: bool, bound: float, seed: int) -> SteeredFlow:
        """This policy with an actor for its initial noise; see `SteeredFlow`."""
        from embodied_rl.policies.steered_flow import SteeredFlow

        return SteeredFlow(self, features, hidden, shared, bound, seed)

    def _executed(self, x: Tensor, inputs: Inputs) -> Tensor:
        return self.to_simulator(x[:, : self.chunk], inputs)

    @property
    def dtype(self) -> torch.dtype:
        """Of the sampled actions; the precision of the whole chain."""
        return next(self.parameters()).dtype

"""Samplers for flow-matching policies, and the densities that reinforcement learning needs of them.

One time convention: t = 1 is noise and t = 0 the action, x_t = t * noise + (1 - t) * action, and the velocity is
v = noise - action. N denoise steps visit t_k = 1 - k/N. A model with mirrored time is converted at its own edge.

Shapes: B rows, H predicted and K <= H executed actions, D dimensions of the network's actions, A <= D of them real.
Only the executed actions' real dimensions enter a score. Everything is per row: rows of one call may be at different
times, noise levels and denoise steps.

A stochastic step turns the deterministic sampler into a chain of Gaussians with a density:
Flow-SDE (Flow-GRPO, arXiv 2505.05470), Flow-Noise with a learned deviation (ReinFlow, arXiv 2505.22094), both as
applied to vision-language-action models by pi_RL (arXiv 2510.25889), and coefficients-preserving sampling (Flow-CPS,
arXiv 2509.05952).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from embodied_rl.errors import UserError
from embodied_rl.randomness import RowNoise

Velocity = Callable[[Any, Tensor, Tensor], tuple[Tensor, Any]]
"""velocity(prefix, x [B,H,D], t [B]) -> (v [B,H,D], hidden)."""
StandardDeviation = Callable[[Any], Tensor]
"""standard_deviation(hidden) -> [B,H,D], the learned deviation of Flow-Noise."""

LOG_2PI = math.log(2 * math.pi)


def ode_step(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
    """One Euler step; returns (mean, std = 0), both shaped as x. Times broadcast against x, e.g. [B,1,1]."""
    return x - (t - t_next) * v, torch.zeros_like(x)


def flow_sde_step(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, noise_level: Tensor) -> tuple[Tensor, Tensor]:
    """One Euler-Maruyama step of the SDE with the flow's marginals (pi_RL, Flow-GRPO); returns (mean, std).

    sigma = noise_level * sqrt(t / (1 - t)); noise level 0 is the ODE.
    """
    d = t - t_next
    remaining = torch.maximum(1 - t, d)  # 1 - t is 0 on the first step: its own length stands in
    drift = v + noise_level**2 / (2 * remaining) * (x + (1 - t) * v)  # sigma^2/(2t) times the predicted noise
    std = noise_level * torch.sqrt(t / remaining * d)
    return x - drift * d, std.expand_as(x)


def flow_noise_step(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """The ODE's mean with a learned deviation `std` (ReinFlow); returns (mean, std)."""
    return x - (t - t_next) * v, std.expand_as(x)


def flow_cps_step(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, noise_level: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces a part of the predicted noise by fresh noise, so that the total keeps norm t_next (Flow-CPS); returns
    (mean, std). `noise_level` in [0, 1] is the share of a right angle; the last step (t_next = 0) is deterministic."""
    action, noise = x - t * v, x + (1 - t) * v
    angle = noise_level * (math.pi / 2)
    std = t_next * torch.sin(angle)
    return action * (1 - t_next) + noise * t_next * torch.cos(angle), std.expand_as(x)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Elementwise log N(x; mean, std), 0 where std = 0."""
    random = std > 0
    safe = torch.where(random, std, 1.0)
    log_prob = -torch.log(safe) - 0.5 * LOG_2PI - 0.5 * ((x - mean) / safe) ** 2
    return torch.where(random, log_prob, 0.0)


def gaussian_entropy(std: Tensor) -> Tensor:
    """Elementwise entropy of a Gaussian; where std = 0 the constant of std = 1, which has no gradient."""
    return 0.5 * (1 + LOG_2PI) + torch.log(torch.where(std > 0, std, 1.0))


def bounded_std(raw: Tensor, low: float = 0.08, high: float = 0.16) -> Tensor:
    """Squash any number into a deviation in [low, high], linearly in tanh on the log-variance (ReinFlow)."""
    low, high = 2 * math.log(low), 2 * math.log(high)
    return torch.exp(0.5 * (low + (high - low) * (torch.tanh(raw) + 1) / 2))


def annealed_noise_level(start: float, end: float, updates: int, update: int) -> float:
    """A noise level that moves linearly from `start` to `end` over `updates` updates, then stays."""
    return start + (end - start) * min(update / updates, 1.0)


@dataclass(frozen=True)
class FlowSamplerConfig:
    """How actions are drawn from a flow, and what counts as their density."""

    steps: int = 4
    """N, denoise steps."""
    method: Literal["sde", "noise", "cps", "ode"] = "sde"
    """The stochastic step; "ode" has none, hence no log-prob."""
    noise_level: float = 0.5
    """Initial noise level of "sde" and "cps"; "noise" learns its own."""
    joint: bool = False
    """True: every step is stochastic and scored. False: one step per row, drawn per row, is stochastic and scored, the
    others follow the ODE; scoring then costs one velocity call."""
    joint_reduction: Literal["sum", "mean"] = "sum"
    """Joint only. "sum": every step's terms are log-prob terms, so that they add up to the chain's density. "mean": a
    term is the mean over the N steps and the initial noise, which makes a ratio the (N+1)-th root of the chain's, as
    pi_RL's published settings have it."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"flow sampler: steps must be at least 1, not {self.steps}")
        if self.method in ("sde", "cps") and not self.noise_level > 0:
            raise UserError(f"flow sampler: noise_level must be above 0, not {self.noise_level}; use method='ode'")
        if self.method == "cps" and (self.noise_level > 1 or self.steps < 2):
            raise UserError(
                "flow sampler: 'cps' needs noise_level <= 1 and at least 2 steps, its last is deterministic"
            )


@dataclass(frozen=True)
class FlowNoise:
    """Everything random about a sample, drawn before it is computed."""

    initial: Tensor
    """Standard normal [B,H,D], x at t = 1."""
    denoise_step: Tensor
    """int64 [B], the stochastic step of each row; unused by a joint sample."""
    transition: Tensor
    """Standard normal [B,N,H,D] of a joint sample's steps, [B,1,H,D] of the single stochastic step otherwise."""


class FlowSampler:
    """Draws actions from a flow and scores them again.

    A trace holds what the score depends on, so that it stays exact when `noise_level` is annealed between a rollout and
    its update. Single step: x_t [B,H,D], x_next [B,K,A], t, t_next, noise_level [B], denoise_step int64 [B]. Joint:
    chain [B,N+1,H,D], times [B,N+1], noise_level [B].
    """

    def __init__(self, config: FlowSamplerConfig, chunk: int, dim: int) -> None:
        self.config = config
        self.chunk = chunk
        self.dim = dim
        self.noise_level = 1.0 if config.method == "noise" else config.noise_level
        """The level of the next sample, which a schedule may move; for "noise" a factor of the learned deviation."""
        self.times = [1 - k / config.steps for k in range(config.steps)] + [0.0]

    @property
    def terms(self) -> int:
        """L, log-prob terms of a row."""
        chains = self.config.steps if self.config.joint and self.config.joint_reduction == "sum" else 1
        return chains * self.chunk * self.dim

    def term_step(self, device: torch.device | None = None) -> Tensor:
        """int64 [L], the action in the chunk that each term belongs to."""
        steps = torch.arange(self.chunk, device=device).repeat_interleave(self.dim)
        return steps.repeat(self.terms // len(steps))

    def draw(self, like: Tensor, noise: RowNoise | None = None) -> FlowNoise:
        """The randomness of one sample shaped, typed and placed as `like` [B,H,D]; without `noise` from torch's global
        generator. The single stochastic step is uniform over the steps that can be."""
        rows, shape = len(like), like.shape[1:]
        steps = self.config.steps
        transitions = steps if self.config.joint else 1
        choices = steps - 1 if self.config.method == "cps" else steps
        if noise is None:
            initial = torch.randn_like(like)
            denoise_step = torch.randint(choices, (rows,), device=like.device)
            transition = torch.randn((rows, transitions, *shape), dtype=like.dtype, device=like.device)
        else:
            initial = torch.from_numpy(noise.normal(*shape)).to(like)
            denoise_step = torch.from_numpy(noise.integers(choices)).to(like.device)
            transition = torch.from_numpy(noise.normal(transitions, *shape)).to(like)
        return FlowNoise(initial, denoise_step, transition)

    def ode(self, velocity: Velocity, prefix: Any, x: Tensor) -> Tensor:
        """Deterministic actions [B,H,D] from the initial noise x [B,H,D]; differentiable."""
        for k in range(self.config.steps):
            t = torch.full((len(x),), self.times[k], dtype=x.dtype, device=x.device)
            v, _ = velocity(prefix, x, t)
            x = x - (self.times[k] - self.times[k + 1]) * v
        return x

    @torch.no_grad()
    def sample(
        self,
        velocity: Velocity,
        prefix: Any,
        noise: FlowNoise,
        standard_deviation: StandardDeviation | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Stochastic actions [B,H,D], their trace and log-prob [B,L]."""
        steps, joint = self.config.steps, self.config.joint
        x = noise.initial
        rows = torch.arange(len(x), device=x.device)
        times = torch.tensor(self.times, dtype=x.dtype, device=x.device).expand(len(x), -1)
        level = torch.full((len(x),), self.noise_level, dtype=x.dtype, device=x.device)
        chain, moments = [x], []
        for k in range(steps):
            v, hidden = velocity(prefix, x, times[:, k])
            here = level if joint else level * (noise.denoise_step == k)  # level 0 is the ODE
            mean, std = self._transition(x, v, hidden, times[:, k], times[:, k + 1], here, standard_deviation)
            x = mean + std * noise.transition[:, k if joint else 0]
            chain.append(x)
            moments.append((mean, std))
        if joint:
            trace = {"chain": torch.stack(chain, 1), "times": times.clone(), "noise_level": level}
            return x, trace, self._joint_terms(trace["chain"], moments)[0]
        k = noise.denoise_step
        trace = {
            "x_t": torch.stack(chain)[k, rows],
            "x_next": self._scored(torch.stack(chain[1:])[k, rows]),
            "t": times[rows, k],
            "t_next": times[rows, k + 1],
            "noise_level": level,
            "denoise_step": k,
        }
        mean, std = (torch.stack(each)[k, rows] for each in zip(*moments, strict=True))
        log_prob = gaussian_log_prob(trace["x_next"], self._scored(mean), self._scored(std))
        return x, trace, log_prob.flatten(1)

    def score(
        self,
        velocity: Velocity,
        prefix: Any,
        trace: dict[str, Tensor],
        standard_deviation: StandardDeviation | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy [B,L] of a trace, differentiable: one velocity call, N for a joint trace. Everything
        that varies is read from the trace."""
        level = trace["noise_level"]
        if not self.config.joint:
            x, t, t_next = trace["x_t"], trace["t"], trace["t_next"]
            v, hidden = velocity(prefix, x, t)
            mean, std = self._transition(x, v, hidden, t, t_next, level, standard_deviation)
            mean, std = self._scored(mean), self._scored(std)
            return gaussian_log_prob(trace["x_next"], mean, std).flatten(1), gaussian_entropy(std).flatten(1)
        chain, times = trace["chain"], trace["times"]
        moments = []
        for k in range(chain.shape[1] - 1):
            x, t, t_next = chain[:, k], times[:, k], times[:, k + 1]
            v, hidden = velocity(prefix, x, t)
            moments.append(self._transition(x, v, hidden, t, t_next, level, standard_deviation))
        return self._joint_terms(chain, moments)

    def _transition(
        self,
        x: Tensor,
        v: Tensor,
        hidden: Any,
        t: Tensor,
        t_next: Tensor,
        level: Tensor,
        standard_deviation: StandardDeviation | None,
    ) -> tuple[Tensor, Tensor]:
        """(mean, std) [B,H,D] of the stochastic step, the ODE's where the level is 0; t, t_next, level [B]."""
        t, t_next, level = _column(t), _column(t_next), _column(level)
        match self.config.method:
            case "sde":
                return flow_sde_step(x, v, t, t_next, level)
            case "cps":
                return flow_cps_step(x, v, t, t_next, level)
            case "noise" if standard_deviation is not None:
                return flow_noise_step(x, v, t, t_next, level * standard_deviation(hidden))
            case "noise":
                raise TypeError("flow sampler: method 'noise' needs a learned standard deviation")
            case _:
                raise TypeError(f"flow sampler: method '{self.config.method}' is deterministic and has no density")

    def _joint_terms(self, chain: Tensor, moments: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy [B,L] of a whole chain, denoise step by denoise step."""
        after = self._scored(chain[:, 1:])
        mean = self._scored(torch.stack([mean for mean, _ in moments], 1))
        std = self._scored(torch.stack([std for _, std in moments], 1))
        log_prob, entropy = gaussian_log_prob(after, mean, std), gaussian_entropy(std)
        if self.config.joint_reduction == "mean":
            initial = self._scored(chain[:, :1])
            one = torch.ones_like(initial)
            log_prob = torch.cat([gaussian_log_prob(initial, 0 * one, one), log_prob], 1).mean(1)
            entropy = torch.cat([gaussian_entropy(one), entropy], 1).mean(1)
        return log_prob.flatten(1), entropy.flatten(1)

    def _scored(self, x: Tensor) -> Tensor:
        """The executed actions' real dimensions [...,K,A] of [...,H,D]."""
        return x[..., : self.chunk, : self.dim]


def _column(row: Tensor) -> Tensor:
    """[B] -> [B,1,1]."""
    return row[:, None, None]

"""The executable contract of a policy: run it on your own class before you train with it.

from embodied_rl.policies import check
check(MyPolicyConfig().build(observation_spec, action_spec))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from embodied_rl.errors import ContractError
from embodied_rl.policies.base import Inputs, Policy
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ObservationSpec
from embodied_rl.types import ActionSample, Observation

ROWS = 6


def check(
    policy: Policy,
    observation: Observation | None = None,
    fresh: Callable[[], Policy] | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Raise `ContractError`, in one line, for the first promise of `policies/base.py` that `policy` breaks.

    observation: at least 4 rows to use instead of made-up ones.
    fresh: builds the same policy anew; then state that is missing from the state dict is found, too.
    tolerance: for numbers computed in another batch split, relative to the largest; use 2e-2 in bfloat16.

    Leaves the policy's weights, gradients, mode and torch's random state as they were.
    """
    observation = synthesise(policy.observation_spec) if observation is None else observation
    if len(observation) < 4:
        raise ContractError(f"check needs an observation of at least 4 rows, got {len(observation)}")
    was_training = policy.training
    gradients = [parameter.grad for parameter in policy.parameters()]
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            _Check(policy, observation, fresh, tolerance).run()
        finally:
            policy.train(was_training)
            for parameter, gradient in zip(policy.parameters(), gradients, strict=True):
                parameter.grad = gradient


def synthesise(spec: ObservationSpec, rows: int = ROWS, seed: int = 0) -> Observation:
    """A made-up numpy observation [rows] of `spec`: normal numbers, random pixels, two instructions, and in the second
    row no camera."""
    if spec.history != (1, 1):
        raise ContractError("check cannot make up an observation with history; pass one as observation=")
    rng = np.random.default_rng(seed)
    mask = np.arange(rows) != 1
    return Observation(
        images={
            name: rng.integers(0, 256, (rows, camera.height, camera.width, 3), dtype=np.uint8)
            for name, camera in spec.cameras.items()
        },
        image_mask={name: mask.copy() for name in spec.cameras},
        state=rng.standard_normal((rows, spec.state), dtype=np.float32),
        instruction_id=np.arange(rows, dtype=np.int64) % 2,
        task=np.arange(rows, dtype=np.int64) % 2,
        instructions=("pick up the red cube", "open the drawer"),
        privileged=rng.standard_normal((rows, spec.privileged), dtype=np.float32) if spec.privileged else None,
    )


class _Check:
    """One run of the checks, in order: each may rely on the ones before."""

    def __init__(
        self, policy: Policy, observation: Observation, fresh: Callable[[], Policy] | None, tolerance: float
    ) -> None:
        self.policy = policy
        self.observation = observation
        self.fresh = fresh
        self.tolerance = tolerance
        self.rows = len(observation)
        self.inputs: Inputs = {}

    def run(self) -> None:
        self.policy.eval()
        self.attributes()
        self.prepare()
        for part in (self.act, self.row_noise, self.scores, self.values, self.deterministic, self.imitation):
            for training in (False, True):
                self.policy.train(training)
                with self.where("train mode" if training else "eval mode"):
                    part()
        self.policy.eval()
        self.parameter_groups()
        self.state_dict()

    # -- the promises --------------------------------------------------------------------------------------------

    def attributes(self) -> None:
        horizon, chunk = self.policy.horizon, self.policy.chunk
        self.expect(1 <= chunk <= horizon, f"needs 1 <= chunk <= horizon, got chunk {chunk} and horizon {horizon}")
        spec = self.policy.action_spec
        self.expect(len(spec.low) == len(spec.high) == len(spec.hold) > 0, "action_spec bounds differ in length")

    def prepare(self) -> None:
        observation = self.observation.copy()
        self.inputs = self.policy.prepare(observation)
        for name, value in self.inputs.items():
            self.expect(isinstance(value, Tensor), f"prepare: inputs['{name}'] is {type(value).__name__}, not a tensor")
            message = f"prepare: inputs['{name}'] is {tuple(value.shape)}; its first axis must be the {self.rows} rows"
            self.expect(value.ndim > 0 and len(value) == self.rows, message)
        before = {name: value.clone() for name, value in self.inputs.items()}
        observation.map(lambda array: array.fill(0))
        self.expect(
            all(torch.equal(before[name], value) for name, value in self.inputs.items()),
            "prepare: inputs share memory with the observation, whose buffers the simulator overwrites; copy them",
        )
        again = self.policy.prepare(self.observation)
        self.expect(
            again.keys() == before.keys() and all(torch.equal(before[name], again[name]) for name in again),
            "prepare: two calls with the same observation differ",
        )

    def act(self) -> None:
        policy, sample = self.policy, self.sample()
        shape = (self.rows, policy.chunk, policy.action_spec.dim)
        self.expect(
            tuple(sample.actions.shape) == shape, f"act: actions are {tuple(sample.actions.shape)}, not {shape}"
        )
        self.expect(sample.actions.dtype == torch.float32, f"act: actions are {sample.actions.dtype}, not float32")
        self.bounded(sample, "act")
        for name, value in sample.trace.items():
            self.expect(len(value) == self.rows, f"act: trace['{name}'] is not per row")
        tensors = {"actions": sample.actions, "value": sample.value, "log_prob": sample.log_prob, **sample.trace}
        for name, value in tensors.items():
            if value is not None:
                self.expect(not value.requires_grad, f"act: {name} carries a graph; act under torch.no_grad()")
                self.expect(not value.is_inference(), f"act: {name} is an inference tensor, which cannot be trained on")
                self.expect(bool(torch.isfinite(value).all()), f"act: {name} is not finite")
        for name in ("value", "log_prob"):
            value, ndim = getattr(sample, name), 1 if name == "value" else 2
            if value is not None:
                self.expect(value.ndim == ndim and len(value) == self.rows, f"act: {name} is {tuple(value.shape)}")

    def row_noise(self) -> None:
        """A row's sample is the same in whatever batch, and its noise matters."""
        whole = self.sample()
        for rows in self.splits():
            part = self.sample(rows)
            self.close(part.actions, whole.actions[rows], "act: with row noise, a row's actions depend on its batch")
            for name, value in part.trace.items():
                message = f"act: with row noise, a row's trace['{name}'] depends on its batch"
                self.close(value, whole.trace[name][rows], message)
        if whole.log_prob is not None:
            other = self.sample(decision=1)
            self.expect(not torch.equal(whole.actions, other.actions), "act: ignores the row noise it is given")

    def scores(self) -> None:
        """`evaluate_actions` gives what `act` gave."""
        policy, sample = self.policy, self.sample()
        if sample.log_prob is None:
            return
        terms = sample.log_prob.shape[1]
        for rows in [torch.arange(self.rows), *self.splits()]:
            score = policy.evaluate_actions(take(self.inputs, rows), take(sample.trace, rows))
            for name in ("log_prob", "entropy"):
                shape = tuple(getattr(score, name).shape)
                self.expect(
                    shape == (len(rows), terms), f"evaluate_actions: {name} is {shape}, not {(len(rows), terms)}"
                )
            mask = torch.ones_like(score.log_prob, dtype=torch.bool)
            if score.log_prob_mask is not None:
                mask = score.log_prob_mask
                fits = mask.dtype == torch.bool and mask.shape == score.log_prob.shape
                self.expect(fits, "evaluate_actions: log_prob_mask must be bool, shaped as log_prob")
            self.close(
                torch.where(mask, score.log_prob, 0.0),
                torch.where(mask, sample.log_prob[rows], 0.0),
                "evaluate_actions: log_prob differs from act's",
            )
            steps = score.term_step
            self.expect(
                steps.dtype == torch.int64 and tuple(steps.shape) in {(terms,), (len(rows), terms)},
                f"evaluate_actions: term_step must be int64 [{terms}] or [{len(rows)},{terms}]",
            )
            if score.value is not None:
                self.close(
                    score.value, policy.value(take(self.inputs, rows)), "evaluate_actions: value differs from value's"
                )
            inside = bool(((steps >= -1) & (steps < policy.chunk)).all())
            self.expect(inside, f"evaluate_actions: term_step must lie in -1..{policy.chunk - 1}, the executed actions")
        total = policy.evaluate_actions(self.inputs, sample.trace).log_prob.sum()
        self.expect(total.requires_grad, "evaluate_actions: log_prob is not differentiable in the parameters")

    def values(self) -> None:
        """V is a function of the observation alone, and the same one everywhere."""
        sample = self.sample()
        if sample.value is None and not self.policy.parameter_groups().get("value"):
            return
        value = self.policy.value(self.inputs)
        self.expect(tuple(value.shape) == (self.rows,), f"value: shape {tuple(value.shape)}, not {(self.rows,)}")
        for rows in self.splits():
            self.close(self.policy.value(take(self.inputs, rows)), value[rows], "value: depends on the batch")
        if sample.value is not None:
            self.close(sample.value, self.sample(decision=1).value, "act: value depends on the noise")
            self.close(sample.value, self.sample(deterministic=True).value, "act: value depends on deterministic")
            self.close(value, sample.value, "value: differs from act's")

    def deterministic(self) -> None:
        sample = self.sample(deterministic=True)
        self.expect(sample.log_prob is None or bool(sample.trace), "act: a deterministic log_prob without a trace")
        self.bounded(sample, "deterministic act")
        again = self.sample(deterministic=True)
        self.expect(
            torch.equal(sample.actions, again.actions), "deterministic act: differs when repeated with its noise"
        )
        one, two = (self.policy.act(self.inputs, deterministic=True) for _ in range(2))
        self.expect(torch.equal(one.actions, two.actions), "deterministic act: differs when repeated without noise")

    def imitation(self) -> None:
        """The loss sees valid steps only."""
        policy = self.policy
        low, high = (
            torch.tensor(bound, device=policy.device) for bound in (policy.action_spec.low, policy.action_spec.high)
        )
        torch.manual_seed(0)
        unit = torch.rand(self.rows, policy.horizon, policy.action_spec.dim).to(policy.device)
        actions = (low + (high - low) * unit).requires_grad_()
        lengths = torch.arange(self.rows, device=policy.device) % (policy.horizon + 1)
        lengths[-1] = policy.horizon
        valid = torch.arange(policy.horizon, device=policy.device) < lengths[:, None]
        loss = self.imitation_loss(actions, valid)
        self.expect(tuple(loss.shape) == (self.rows,), f"imitation_loss: shape {tuple(loss.shape)}, not {(self.rows,)}")
        self.expect(
            bool((loss[lengths == 0] == 0).all()), "imitation_loss: a row without a valid step must have loss 0"
        )
        policy.zero_grad()
        loss.sum().backward()
        if actions.grad is not None:
            self.expect(bool((actions.grad[~valid] == 0).all()), "imitation_loss: has a gradient in invalid actions")
        trained = any(p.grad is not None and bool((p.grad != 0).any()) for p in policy.parameters())
        self.expect(trained, "imitation_loss: gives no parameter a gradient")
        for junk in (0.5, torch.nan):
            with torch.no_grad():
                other = torch.where(valid[..., None], actions, actions + junk)
            same = torch.equal(self.imitation_loss(other, valid), loss)
            self.expect(same, "imitation_loss: depends on the invalid actions" + (" (NaN)" if junk != junk else ""))

    def parameter_groups(self) -> None:
        grouped = [id(parameter) for group in self.policy.parameter_groups().values() for parameter in group]
        self.expect(len(grouped) == len(set(grouped)), "parameter_groups: a parameter is in two groups")
        missing = [name for name, parameter in self.policy.named_parameters() if id(parameter) not in set(grouped)]
        self.expect(not missing, f"parameter_groups: {', '.join(missing[:3])} is in no group")

    def state_dict(self) -> None:
        """A checkpoint restores the policy."""
        try:
            saved = safetensors.torch.save({k: v.clone().contiguous() for k, v in self.policy.state_dict().items()})
        except (ValueError, RuntimeError, AttributeError) as error:
            raise self.error(f"state_dict cannot be saved as safetensors: {error}") from error
        other = copy.deepcopy(self.policy) if self.fresh is None else self.fresh()
        with torch.no_grad():
            for value in other.state_dict().values():
                value.zero_()
        other.load_state_dict(safetensors.torch.load(saved))
        other.eval()
        with torch.no_grad():
            loaded = _Check(other, self.observation, None, self.tolerance)
            loaded.inputs = other.prepare(self.observation)
        for deterministic in (False, True):
            ours, theirs = self.sample(deterministic=deterministic), loaded.sample(deterministic=deterministic)
            same = torch.equal(ours.actions, theirs.actions)
            self.expect(same, "a policy loaded from the state dict acts differently: something is missing from it")
            if ours.value is not None:
                self.close(ours.value, theirs.value, "a policy loaded from the state dict has another value")

    # -- helpers -------------------------------------------------------------------------------------------------

    def sample(self, rows: Tensor | None = None, decision: int = 0, deterministic: bool = False) -> ActionSample:
        rows = torch.arange(self.rows) if rows is None else rows
        noise = RowNoise(1, rows.numpy(), np.full(len(rows), decision))
        return self.policy.act(take(self.inputs, rows), deterministic=deterministic, noise=noise)

    def splits(self) -> Iterator[Tensor]:
        """Single rows, an uneven split and another order."""
        yield from (torch.tensor([row]) for row in range(2))
        yield torch.arange(2, self.rows)
        yield torch.arange(self.rows).flip(0)

    def imitation_loss(self, actions: Tensor, valid: Tensor) -> Tensor:
        torch.manual_seed(1)
        return self.policy.imitation_loss(self.inputs, actions, valid)

    def bounded(self, sample: ActionSample, what: str) -> None:
        actions = sample.actions.cpu()
        low, high = torch.tensor(self.policy.action_spec.low), torch.tensor(self.policy.action_spec.high)
        self.expect(bool(((actions >= low) & (actions <= high)).all()), f"{what}: actions leave the action_spec bounds")

    def close(self, one: Tensor, two: Tensor | None, message: str) -> None:
        if two is None:
            raise self.error(f"{message}: there is none")
        one, two = one.detach().double(), two.detach().double()
        self.expect(one.shape == two.shape, f"{message}: shapes {tuple(one.shape)} and {tuple(two.shape)}")
        if one.numel():
            difference, limit = float((one - two).abs().max()), self.tolerance * (1 + float(two.abs().max()))
            self.expect(difference <= limit, f"{message} by {difference:.2g}")

    _where = ""

    @contextmanager
    def where(self, mode: str) -> Iterator[None]:
        self._where = f" ({mode})"
        yield
        self._where = ""

    def expect(self, kept: Any, message: str) -> None:
        if not kept:
            raise self.error(message)

    def error(self, message: str) -> ContractError:
        return ContractError(f"{type(self.policy).__name__}: {message}{self._where}")


def take(tensors: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """These rows of every tensor."""
    return {name: value[rows.to(value.device)] for name, value in tensors.items()}

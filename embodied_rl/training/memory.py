"""What a policy costs in memory, found without having it: the network is built without weights and run on shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rl.errors import UserError
from embodied_rl.policies.base import Inputs, Policy
from embodied_rl.specs import ActionSpec, ObservationSpec
from embodied_rl.types import Observation

ADAM = 2
"""Numbers that Adam keeps of a trained parameter, in the parameter's own type."""


class Words:
    """Stands in for a tokenizer that is not at hand: one id per word."""

    bos_token_id = 0

    def encode(self, text: str) -> list[int]:
        """Zeros."""
        return [0] * len(text.split())


@contextmanager
def without_weights() -> Iterator[None]:
    """Parameters made inside are on the meta device: they have shapes and types and no memory. All else (buffers,
    statistics) is real."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def build_on_meta(config: Any, observation_spec: ObservationSpec, action_spec: ActionSpec) -> tuple[Policy, Inputs]:
    """The policy of a configuration without weights, and its inputs [1,...]; all on the meta device. A checkpoint's
    files are checked, not read. Raises what `config.build` does."""
    stand_in = getattr(config, "tokenizer", None) == "" and not config.checkpoint
    with without_weights():
        policy = config.build(observation_spec, action_spec, *([Words()] if stand_in else []))
    policy.register_parameter("here", nn.Parameter(torch.empty(0)))  # where `prepare` computes
    inputs = policy.prepare(blank(policy.observation_spec))
    del policy.here
    return policy.to("meta"), {name: tensor.to("meta") for name, tensor in inputs.items()}


def blank(spec: ObservationSpec) -> Observation:
    """One row of zeros."""
    return Observation(
        images={name: np.zeros((1, view.height, view.width, 3), np.uint8) for name, view in spec.cameras.items()},
        image_mask={name: np.ones(1, bool) for name in spec.cameras},
        state=np.zeros((1, spec.state), np.float32),
        instruction_id=np.zeros(1, np.int64),
        task=np.zeros(1, np.int64),
        instructions=("move",),
        privileged=np.zeros((1, spec.privileged), np.float32) if spec.privileged else None,
    )


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in tensors)


def weights(policy: Policy) -> int:
    """Bytes of parameters and buffers: what acting needs, but for the activations of a layer."""
    return size(policy.parameters()) + size(policy.buffers())


def learning(parameters: Iterable[Tensor]) -> int:
    """Bytes of gradients and of Adam's state for trained parameters. There are no copies in a higher precision."""
    return (1 + ADAM) * size(parameters)


def activations(policy: Policy, inputs: Inputs, rows: int) -> tuple[int, int]:
    """(bytes that scoring `rows` decisions keeps for the backward pass, bytes that a decision is recorded in), by doing
    both on shapes. Raises `UserError` for a policy that gives no log-probs."""
    batch = {name: tensor.repeat(rows, *[1] * (tensor.dim() - 1)) for name, tensor in inputs.items()}
    sample = policy.act(batch)
    if sample.log_prob is None:
        raise UserError(f"{type(policy).__name__} gives no log-probs, so this algorithm has nothing to improve")
    own = {tensor.untyped_storage()._cdata for tensor in [*policy.parameters(), *policy.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # alive, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.evaluate_actions(batch, sample.trace)
    recorded = size(batch.values()) + size(sample.trace.values()) + size([sample.actions, sample.log_prob])
    return sum(storage.nbytes() for storage in kept.values()), recorded // rows

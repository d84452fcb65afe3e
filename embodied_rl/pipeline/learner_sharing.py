"""How the ranks of a learner share a minibatch: every rank differentiates its rows, and the gradients add up.

Sums, never means: every loss is already divided by what the whole minibatch holds (`PolicyGradient._microbatches`), so
ranks with fewer rows need no correction and the step is that of a single process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree as pytree

from embodied_rl.algorithms.optimization import (
    Differentiation,
    Optimizers,
    gradient_norms,
    gradients,
    parameters_of,
)
from embodied_rl.errors import UserError
from embodied_rl.types import Score

BUCKET = 64 * 2**20
"""Bytes of gradients that are added up over the ranks at once."""

pytree.register_dataclass(Score)  # so that FSDP2 finds the tensors whose gradient begins its backward pass


class DataParallel(Differentiation):
    """Every rank holds all weights."""

    def __init__(self, precision: torch.dtype) -> None:
        super().__init__(precision)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()

    def total(
        self, optimizers: Optimizers, metrics: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        for bucket in _buckets(gradient for each in optimizers.values() for gradient in gradients(each)):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            parts = self.sum(flat).split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        return gradient_norms(optimizers), self._summed(metrics)

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def _summed(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = self.sum(torch.stack([metric.double() for metric in metrics.values()]))
        return dict(zip(metrics, values, strict=True))


class FullyShardedDataParallel(DataParallel):
    """Every rank holds a part of the weights, gradients and optimizer states, and gathers the weights of a layer while
    it computes with them (FSDP2, `torch.distributed.fsdp.fully_shard`)."""

    def __init__(self, precision: torch.dtype, policy: Any) -> None:
        super().__init__(precision)
        self._policy = policy

    def add(self, loss: Tensor, optimizers: Optimizers, first: bool) -> None:
        loss.backward()  # reaches all weights; `total` drops what is not asked for

    def total(
        self, optimizers: Optimizers, metrics: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        followed = {id(parameter) for each in optimizers.values() for parameter in parameters_of(each)}
        for parameter in self._policy.parameters():
            if id(parameter) not in followed:
                parameter.grad = None
        norms = {name: whole(norm) for name, norm in gradient_norms(optimizers).items()}
        return norms, self._summed(metrics)


def shard(policy: Any, layers: Iterable[nn.Module], mesh: DeviceMesh, precision: torch.dtype) -> None:
    """Leave every rank its part of the weights of `policy`; its `layers` are gathered one at a time, the rest at once.

    Weights of 32 bits are gathered in `precision`; gradients are added up in 32 bits. Raises `UserError` for a policy
    that trains convolutions, or weights of several precisions in one layer.
    """
    gathered = None if precision == torch.float32 else precision
    # Inputs stay as they are: among them are recorded actions and noise, whose scores need all their digits.
    kinds = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    for module in [*layers, policy]:
        _require_shardable(module)
        sharded: FSDPModule = fully_shard(module, mesh=mesh, mp_policy=kinds)
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_gradient_divide_factor(1.0)
    for method in ("evaluate_actions", "value", "imitation_loss"):
        register_fsdp_forward_method(policy, method)


@torch.no_grad()
def called_layers(policy: Any, inputs: dict[str, Tensor], trace: dict[str, Tensor]) -> list[nn.Module]:
    """The members of module lists, inner ones first, that scoring runs as modules and in no other way: those that FSDP2
    can gather and free one after the other. Where a network reaches into a layer, it is gathered with the rest."""
    lists = [module for module in policy.modules() if isinstance(module, nn.ModuleList)]
    candidates = {layer for layers in lists for layer in layers if any(True for _ in layer.parameters())}
    inside: set[nn.Module] = set()
    called: set[nn.Module] = set()
    reached: set[nn.Module] = set()

    def enter(layer: nn.Module, _: Any) -> None:
        inside.add(layer)
        called.add(layer)

    def watch(layer: nn.Module) -> Iterator[Any]:
        yield layer.register_forward_pre_hook(enter)
        yield layer.register_forward_hook(lambda layer, *_: inside.discard(layer))
        for part in layer.modules():
            if part is not layer:
                yield part.register_forward_pre_hook(lambda *_: None if layer in inside else reached.add(layer))

    handles = [handle for layer in candidates for handle in watch(layer)]
    policy.evaluate_actions(inputs, trace)
    for handle in handles:
        handle.remove()
    return [module for module in reversed(list(policy.modules())) if module in called - reached]


def replace_parameters(optimizer: torch.optim.Optimizer, names: Mapping[int, str], policy: nn.Module) -> None:
    """Make it move what the parameters became: `names` are those that they had, by their id."""
    now = dict(policy.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [now[names[id(parameter)]] for parameter in group["params"]]


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restore a whole `state_dict`, whatever part of the parameters this rank holds; copies."""
    parameters = parameters_of(optimizer)

    def part(parameter: Tensor, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            value = value.to(parameter.device)
            return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return value.clone()

    state = {
        index: {name: part(parameters[index], value) for name, value in values.items()}
        for index, values in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def whole(value: Any) -> Any:
    """All of a tensor that the ranks hold parts of; the ranks must ask for it together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Of one dtype each."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(each.nbytes for each in bucket) >= BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _require_shardable(module: nn.Module) -> None:
    trained = [each for each in module.parameters() if each.requires_grad and not isinstance(each, DTensor)]
    if any(each.ndim > 2 for each in trained):
        # FSDP2 of torch 2.11 was seen to read the gradient of a trained convolution in another order of its numbers.
        raise UserError(
            "pipeline.sharding fsdp2 does not train convolutions: freeze them (--policy.frozen), train adapters "
            "(--policy.lora-rank), or leave sharding at none"
        )
    kinds = {each.dtype for each in trained}
    if len(kinds) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in kinds))
        raise UserError(
            f"pipeline.sharding fsdp2 cannot train weights of several precisions together ({names}): keep them in one, "
            f"for example --policy.dtype float32 with --pipeline.precision bfloat16"
        )

"""Weights and batches on their way to other processes arrive bit by bit."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from pipeline_toys import in_groups, make_worker, same

from embodied_rl.pipeline.segment import Memory
from embodied_rl.pipeline.tickets import TicketCounter
from embodied_rl.pipeline.transfer import Packed, pack, side_by_side, unpack
from embodied_rl.pipeline.weights import Structure, bucket, changing, frozen, take_over
from embodied_rl.types import Trajectory

TENSORS = [
    torch.arange(6, dtype=torch.int64).view(2, 3).T,
    torch.tensor(-1.5, dtype=torch.bfloat16),
    torch.tensor([True, False]),
    torch.empty(0, 4),
    torch.randn(3, 2, dtype=torch.float64, requires_grad=True),
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}")
def test_a_tensor_of_any_kind_is_the_same_when_it_is_unpacked(tensor: torch.Tensor) -> None:
    packed = Packed.of(tensor)
    packed.bytes.setflags(write=False)
    assert packed.bytes.dtype == np.uint8
    again = packed.tensor()
    assert again.dtype == tensor.dtype and torch.equal(again, tensor.detach())


class Several(torch.nn.Module):
    """A tied and a frozen weight, two precisions, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.second = torch.nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.third = torch.nn.Linear(3, 1).bfloat16().requires_grad_(False)
        self.fourth = torch.nn.Linear(5, 1).bfloat16()
        self.normal = torch.nn.BatchNorm1d(3)
        self.plain = torch.arange(3)


def test_a_policy_is_completed_elsewhere_and_follows() -> None:
    policy = Several()
    structure = copy.deepcopy(Structure(policy))  # stands for the journey
    assert not any(tensor.numel() for tensor in [*structure._policy.parameters(), *structure._policy.buffers()])
    weights = [Packed.of(tensor) for tensor in frozen(policy)]
    replica: Any = structure.complete(weights, torch.device("cpu"))
    assert replica.third.weight.data_ptr() == policy.third.weight.data_ptr(), "what is frozen is not copied"
    assert replica.second.weight is replica.first.weight and torch.equal(replica.plain, policy.plain)
    for _ in range(2):
        take_over(replica, bucket(policy))
        for name, tensor in policy.state_dict().items():
            assert torch.equal(replica.state_dict()[name], tensor), name
        for mine, theirs in zip(replica.parameters(), policy.parameters(), strict=True):
            assert mine.requires_grad == theirs.requires_grad
        with torch.no_grad():
            for tensor in changing(policy):
                tensor.add_(1)
    assert len(bucket(policy)) == sum(tensor.nbytes for tensor in changing(policy))
    with pytest.raises(RuntimeError, match="bytes of weights for a policy"):
        take_over(replica, bucket(policy)[1:])


def test_segments_side_by_side_are_the_segment() -> None:
    with in_groups(5) as simulator:
        worker = make_worker(simulator)
        worker.restart(TicketCounter(0))
        whole = worker.collect(8, 3)
    parts = [unpack(pack(columns(whole, rows))) for rows in (slice(0, 2), slice(2, 5))]
    same(side_by_side(parts, Memory(), torch.device("cpu")), whole)
    same(side_by_side([unpack(pack(whole))], Memory(), torch.device("cpu")), whole)


def columns(whole: Trajectory, rows: slice) -> Trajectory:
    arrays = {name: tensor[:, rows] for name, tensor in whole.arrays().items()}
    inputs, trace = ({k: v[:, rows] for k, v in each.items()} for each in (whole.inputs, whole.trace))
    mine = [episode for episode in whole.episodes if rows.start <= episode.env_id < rows.stop]
    return Trajectory(inputs=inputs, trace=trace, last_value=whole.last_value[rows], version=3, episodes=mine, **arrays)

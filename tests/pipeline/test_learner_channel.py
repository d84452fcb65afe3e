"""Trees of tensors arrive as they were sent, in memory that is used again."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embodied_rl.pipeline.learner_channel import Channel, Memory, Message

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
TENSORS = st.builds(
    lambda dtype, shape: torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=3),
)
PLAIN = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=5)
TREES = st.recursive(
    TENSORS | PLAIN,
    lambda child: st.lists(child, max_size=3) | st.tuples(child) | st.dictionaries(st.text(max_size=3), child),
    max_leaves=8,
)


def pair() -> tuple[Channel, Channel]:
    one, other = socket.socketpair()
    return Channel(one), Channel(other)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(same, one, other)) and len(one) == len(other)
    return type(one) is type(other) and one == other


@given(st.lists(TREES, min_size=1, max_size=3))
def test_trees_arrive_as_they_were_sent(trees: list[Any]) -> None:
    sender, receiver = pair()
    memory = Memory()
    for tree in trees:
        sender.send(Message(tree, memory))
        assert same(tree, receiver.receive())
    sender.close()
    with pytest.raises(EOFError):
        receiver.receive()
    receiver.close()


def test_numbers_are_written_once_for_all_receivers() -> None:
    (sender, first), (other, second) = pair(), pair()
    message = Message({"x": torch.zeros(3)}, Memory())
    sender.send(message)
    other.send(message)
    seen = first.receive()["x"], second.receive()["x"]
    seen[0].fill_(7)
    assert seen[1].tolist() == [7, 7, 7]


def test_optimizer_states_keep_their_numbered_keys() -> None:
    sender, receiver = pair()
    tree = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.999), "params": [0]}]}
    sender.send(Message(tree, Memory()))
    assert same(tree, receiver.receive())

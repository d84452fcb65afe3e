from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embodied_rl.errors import UserError
from embodied_rl.training import checkpoint

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**130), 2**130),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.builds(lambda values: torch.tensor(values), st.lists(st.floats(width=32, allow_nan=False), max_size=3)),
    st.builds(lambda values: np.array(values, np.int64), st.lists(st.integers(-9, 9), max_size=3)),
)
TREES = st.dictionaries(
    st.text(max_size=3),
    st.recursive(
        LEAVES,
        lambda child: st.one_of(
            st.lists(child, max_size=3),
            st.tuples(child, child),
            st.dictionaries(st.integers(0, 5), child, max_size=3),
            st.dictionaries(st.text(max_size=3), child, max_size=3),
        ),
        max_leaves=8,
    ),
    max_size=4,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(TREES)
def test_what_is_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("checkpoint") / "000001"
    checkpoint.save(folder, tree)
    assert same(checkpoint.load(folder), tree)


def test_a_memory_mapped_array_is_a_file_of_the_checkpoint(tmp_path: Path) -> None:
    array = np.memmap(tmp_path / "large", np.uint8, "w+", shape=(2, 5, 3))
    array[:] = np.arange(30).reshape(2, 5, 3)
    checkpoint.save(tmp_path / "1", {"part": array[:, :4], "other": np.arange(3)})
    loaded = checkpoint.load(tmp_path / "1")
    assert isinstance(loaded["part"], np.memmap) and same(np.array(loaded["part"]), np.array(array[:, :4]))
    assert same(loaded["other"], np.arange(3))
    (tmp_path / "1" / "mapped-0.bin").write_bytes(bytes(24))
    with pytest.raises(UserError, match=r"mapped-0\.bin does not match"):
        checkpoint.load(tmp_path / "1")


def test_an_optimizer_survives(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path / "1", {"optimizer": optimizer.state_dict()})
    assert same(checkpoint.load(tmp_path / "1")["optimizer"], optimizer.state_dict())


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for name in ("000001", "000002", "000010"):
        checkpoint.save(tmp_path / name, {"name": name})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002", "000010"]
    assert checkpoint.latest(tmp_path) == tmp_path / "000010"


def test_latest_ignores_what_is_not_complete(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nowhere") is None
    checkpoint.save(tmp_path / "000001", {})
    (tmp_path / ".000002.partial").mkdir()
    (tmp_path / "000003").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "000001"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "000001", {"weights": torch.arange(1000.0)})


def test_a_flipped_bit_is_noticed(saved: Path) -> None:
    content = bytearray((saved / checkpoint.TENSORS).read_bytes())
    content[-1] ^= 1
    (saved / checkpoint.TENSORS).write_bytes(content)
    with pytest.raises(UserError, match="corrupt"):
        checkpoint.load(saved)


def test_a_truncated_file_is_noticed(saved: Path) -> None:
    content = (saved / checkpoint.TENSORS).read_bytes()
    (saved / checkpoint.TENSORS).write_bytes(content[:100])
    with pytest.raises(UserError, match="corrupt"):
        checkpoint.load(saved)


@pytest.mark.parametrize("content", ["", "[1]", "not json", json.dumps({"format": "other/1"}), json.dumps({})])
def test_a_foreign_file_is_refused(saved: Path, content: str) -> None:
    (saved / checkpoint.STATE).write_text(content)
    with pytest.raises(UserError, match="checkpoint"):
        checkpoint.load(saved)


def test_what_cannot_be_saved_is_refused_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"object.*at /a/0"):
        checkpoint.save(tmp_path / "1", {"a": [object()]})

"""Published weights in and out: what is damaged or does not fit is said in one line and changes nothing."""

import json

import pytest
import torch
from torch import nn

from embodied_rl.errors import UserError
from embodied_rl.policies.pretrained import load_strict, read_json, read_weights, write_weights


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(8, 8),
        "b.weight": torch.randn(16, 8).bfloat16(),
        "b.transposed": torch.randn(4, 6).T,
        "c.count": torch.arange(5),
    }


def equal(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert value.dtype == two[key].dtype
        assert torch.equal(value, two[key]), key


@pytest.mark.parametrize("shard_bytes", [5e9, 500, 1])
def test_weights_survive_a_round_trip_in_one_file_and_in_shards(tmp_path, weights, shard_bytes):
    write_weights(tmp_path, weights, shard_bytes=shard_bytes)
    equal(weights, read_weights(tmp_path))
    count = len(list(tmp_path.glob("model-*.safetensors")))
    assert count == {5e9: 0, 500: 2, 1: 4}[shard_bytes]
    if count:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())


def test_a_second_write_leaves_nothing_of_the_first(tmp_path, weights):
    other = {"only": torch.ones(3)}
    for shard_bytes in (5e9, 500, 1, 5e9):
        write_weights(tmp_path, weights, shard_bytes=shard_bytes)
        equal(weights, read_weights(tmp_path))
    write_weights(tmp_path, other)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    equal(other, read_weights(tmp_path))


def test_a_checkpoint_can_be_written_over_the_one_it_was_read_from(tmp_path, weights):
    write_weights(tmp_path, weights)
    read = read_weights(tmp_path)
    write_weights(tmp_path, {**read, "a.weight": read["a.weight"] + 1})
    again = read_weights(tmp_path)
    equal({**weights, "a.weight": weights["a.weight"] + 1}, again)
    equal(weights, read)


def test_what_was_read_can_be_changed_without_changing_the_file(tmp_path, weights):
    write_weights(tmp_path, weights)
    for value in read_weights(tmp_path).values():
        value.add_(1)
    equal(weights, read_weights(tmp_path))


def fails(message, act):
    with pytest.raises(UserError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_what_is_damaged_is_named(tmp_path, weights):
    fails("neither model.safetensors nor", lambda: read_weights(tmp_path))
    write_weights(tmp_path, weights, shard_bytes=500)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    fails("model-00002-of-00002.safetensors is truncated or damaged", lambda: read_weights(tmp_path))
    shard.write_bytes(b"")
    fails("truncated or damaged", lambda: read_weights(tmp_path))
    shard.unlink()
    fails("lists model-00002-of-00002.safetensors, which is not in", lambda: read_weights(tmp_path))
    shard.write_bytes(whole)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = shard.name
    index.write_text(json.dumps(content))
    fails("lists ghost, which no shard holds", lambda: read_weights(tmp_path))
    content["weight_map"]["ghost"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    fails("not in", lambda: read_weights(tmp_path))
    index.write_text("{}")
    fails("no weight_map", lambda: read_weights(tmp_path))
    index.write_text("{")
    fails("is not JSON", lambda: read_weights(tmp_path))
    fails("cannot be read", lambda: read_json(tmp_path / "absent.json"))


def test_a_module_takes_exactly_its_own_keys(tmp_path):
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    right = {key: torch.full(value.shape, 0.5) for key, value in module.state_dict().items()}
    wrong = {key: value for key, value in right.items() if not key.startswith(("2.", "3."))}
    wrong |= {"0.bias": torch.ones(5), "extra": torch.ones(1)}
    with pytest.raises(UserError) as caught:
        load_strict(module, wrong, "there/model.safetensors")
    message = str(caught.value)
    assert message.startswith("there/model.safetensors does not fit the model: it has no 2.bias, 2.weight, 3.bias")
    assert "and 1 more; it has the unexpected extra; it has another shape of 0.bias ((5,) instead of (2,))" in message
    assert all(value.is_meta for value in module.state_dict().values())
    load_strict(module, right, "there")
    assert module(torch.ones(1, 3)).shape == (1, 4)

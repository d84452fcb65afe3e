"""Checkpoint folders of π₀ and π₀.₅, out and in: openpi's layout and LeRobot's, adapters merged, errors named."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pi0_toys import ACTION, SEEN, both, build, configure, noise
from safetensors.torch import load_file, save_file

from embodied_rl.errors import UserError
from embodied_rl.policies.check import synthesise
from embodied_rl.policies.pi0.checkpoint import LEROBOT, UNUSED
from embodied_rl.policies.pi0.config import tiny
from embodied_rl.policies.pi0.policy import Pi0Policy


def reload(folder, adaptive, **settings):
    settings = {"network": tiny(adaptive), "tokenizer": "bytes", "prompt_length": 96, "chunk": 2, **settings}
    settings = {"value_hidden": (16,), "denoise_steps": 3, **settings}
    return Pi0Policy.from_pretrained(folder, SEEN, ACTION, **settings)


def same_acts(one, two, tolerance=1e-6):
    inputs = one.prepare(synthesise(one.observation_spec))
    a, b = one.act(inputs, noise=noise()), two.act(inputs, noise=noise())
    torch.testing.assert_close(a.actions, b.actions, rtol=0, atol=tolerance)
    torch.testing.assert_close(a.value, b.value, rtol=0, atol=tolerance)


def fails(message, act):
    with pytest.raises(UserError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


@both
@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
def test_a_folder_is_written_and_read(tmp_path, adaptive, layout):
    policy = build(adaptive, method="noise")
    policy.set_statistics(np.arange(5.0), np.arange(1.0, 6.0))
    policy.save_pretrained(tmp_path / "one", layout)
    loaded = reload(tmp_path / "one", adaptive, method="noise")
    assert loaded.horizon == 4
    same_acts(policy, loaded, 1e-6 if layout == "openpi" else 1e-5)  # LeRobot has other epsilons
    loaded.save_pretrained(tmp_path / "two", layout)
    for name in ("model.safetensors", "heads.safetensors"):
        one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in one)
    assert all(
        key.startswith(LEROBOT) == (layout == "lerobot") for key in load_file(tmp_path / "one" / "model.safetensors")
    )


def test_a_folder_keeps_its_layout_and_its_other_files(tmp_path):
    build(True).save_pretrained(tmp_path / "one", "lerobot")
    (tmp_path / "one" / "README.md").write_text("by its authors")
    loaded = reload(tmp_path / "one", True)
    loaded.save_pretrained(tmp_path / "two")
    one, two = ({file.name: file for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(one[name].read_bytes() == two[name].read_bytes() for name in one)
    loaded.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "README.md").is_file()
    loaded.save_pretrained(tmp_path / "three", "openpi")
    same_acts(loaded, reload(tmp_path / "three", True), 1e-5)
    fails("is inside the checkpoint", lambda: loaded.save_pretrained(tmp_path / "one" / "mine"))
    fails("unknown checkpoint layout 'hf'", lambda: loaded.save_pretrained(tmp_path / "four", "hf"))

    processor = tmp_path / "one" / "policy_preprocessor.json"
    content = json.loads(processor.read_text())
    content["steps"][2]["config"]["norm_map"]["ACTION"] = "MEAN_STD"
    processor.write_text(json.dumps(content))
    other = reload(tmp_path / "one", True)
    assert other.action_normaliser.name == "lerobot_mean_std"
    fails(
        "openpi normalises pi05 by quantile, this policy's actions by lerobot_mean_std",
        lambda: other.save_pretrained(tmp_path / "five", "openpi"),
    )
    content["steps"][2]["config"]["norm_map"]["ACTION"] = "QUANTILE10"
    processor.write_text(json.dumps(content))
    fails("normalisation QUANTILE10 of ACTION is not one of", lambda: reload(tmp_path / "one", True))
    content["steps"].pop(2)
    processor.write_text(json.dumps(content))
    fails("has no normalizer_processor", lambda: reload(tmp_path / "one", True))


def test_types_and_the_unused_layer_are_kept(tmp_path):
    build().save_pretrained(tmp_path / "one")
    weights = load_file(tmp_path / "one" / "model.safetensors")
    weights = {key: value if "norm" in key else value.bfloat16() for key, value in weights.items()}
    weights[UNUSED] = torch.randn(weights[UNUSED].shape).half()
    save_file(weights, tmp_path / "one" / "model.safetensors")
    policy = reload(tmp_path / "one", False)
    assert policy.act(policy.prepare(synthesise(policy.observation_spec))).actions.dtype == torch.float32
    policy.save_pretrained(tmp_path / "two")
    again = load_file(tmp_path / "two" / "model.safetensors")
    assert weights.keys() == again.keys()
    assert all(weights[key].dtype == again[key].dtype and torch.equal(weights[key], again[key]) for key in weights)
    policy = reload(tmp_path / "two", False, dtype="float32")
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_adapters_are_merged_in_the_published_layout(tmp_path):
    policy = build(lora_rank=3, frozen=("vision",))
    policy.save_pretrained(tmp_path)
    same_acts(policy, reload(tmp_path, False), 1e-5)
    adapters = [name for name, p in policy.named_parameters() if "lora_" in name and p.requires_grad]
    assert any(name.startswith("network.expert.layers.1.mlp") for name in adapters)
    assert any(name.startswith("network.language") for name in adapters)
    assert not any(name.startswith("network.vision") for name in adapters)


def test_a_checkpoint_keeps_its_statistics(tmp_path):
    policy = build()
    policy.set_statistics(np.arange(5.0), np.ones(5))
    policy.save_pretrained(tmp_path)
    loaded = reload(tmp_path, False)
    loaded.set_statistics(np.full(5, 9.0), np.ones(5))
    kept, before = loaded.state_normaliser.as_dict(), policy.state_normaliser.as_dict()
    assert kept == {name: before[name] for name in ("mean", "std", "q01", "q99")}  # what openpi's files hold


def test_statistics_may_cover_the_padding_but_not_more(tmp_path):
    build().save_pretrained(tmp_path)
    file = tmp_path / "assets" / "embodied_rl" / "norm_stats.json"
    content = json.loads(file.read_text())
    actions = content["norm_stats"]["actions"]
    for values in actions.values():
        values += [0.0] * 29
    file.write_text(json.dumps(content))
    assert reload(tmp_path, False).action_normaliser.as_dict().keys() == actions.keys()
    actions["std"][3] = 1.0
    file.write_text(json.dumps(content))
    fails("norm_stats.json describes 32 dimensions, the simulator has 3", lambda: reload(tmp_path, False))


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    build().save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    fails(
        "is a pi0 checkpoint, the policy is pi05: use --policy pi0",
        lambda: configure(True, checkpoint=str(tmp_path)).build(SEEN, ACTION),
    )
    fails(
        "trained to predict 4 actions, the policy predicts 7: set --policy.horizon 4",
        lambda: reload(tmp_path, False, horizon=7),
    )
    fails("instead of", lambda: reload(tmp_path, False, network=replace(tiny(False), vocabulary=300)))
    fails("heads.safetensors does not fit", lambda: reload(tmp_path, False, value_hidden=(17,)))

    statistics = tmp_path / "assets" / "embodied_rl" / "norm_stats.json"
    content = json.loads(statistics.read_text())
    fails("unknown asset of .* 'libero': valid: embodied_rl", lambda: reload(tmp_path, False, asset="libero"))
    del content["norm_stats"]["actions"]["std"]
    statistics.write_text(json.dumps(content))
    fails("norm_stats.json has no 'std'", lambda: reload(tmp_path, False))
    del content["norm_stats"]["actions"]
    statistics.write_text(json.dumps(content))
    fails("has no statistics 'actions'; it has state", lambda: reload(tmp_path, False))
    other = tmp_path / "assets" / "droid" / "norm_stats.json"
    other.parent.mkdir()
    other.write_text("{}")
    fails(
        "holds 2 norm_stats.json under assets/; choose one with --policy.asset: droid, embodied_rl",
        lambda: reload(tmp_path, False),
    )

    config.write_text(json.dumps({"use_relative_actions": True}))
    fails("use_relative_actions is not supported", lambda: reload(tmp_path, False))
    config.unlink()
    weights = load_file(file)
    save_file({**weights, "extra.weight": torch.ones(1)}, file)
    fails("unexpected extra.weight", lambda: reload(tmp_path, False, horizon=4))
    save_file({key: value for key, value in weights.items() if "state_proj" not in key}, file)
    fails("has no state_proj.bias, state_proj.weight", lambda: reload(tmp_path, False, horizon=4))
    save_file({"other": torch.ones(1)}, file)
    fails("no key action_in_proj.weight", lambda: reload(tmp_path, False))
    file.write_bytes(b"\x00" * 20)
    fails("model.safetensors is truncated or damaged", lambda: reload(tmp_path, False))
    (tmp_path / "params").mkdir()
    fails("is a JAX checkpoint: convert it", lambda: reload(tmp_path, False))

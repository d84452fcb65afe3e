"""Checkpoint folders of GR00T N1.5, out and in: NVIDIA's layout, adapters merged, errors named."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from gr00t_toys import ACTION, SEEN, SETTINGS, build, noise, observe
from safetensors.torch import load_file, save_file

from embodied_rl.algorithms.imitation import ImitationConfig
from embodied_rl.errors import UserError
from embodied_rl.policies.check import synthesise
from embodied_rl.policies.gr00t.checkpoint import METADATA, OUTPUT_LAYER, TOKEN_TABLE, describe
from embodied_rl.policies.gr00t.policy import Gr00tPolicy
from embodied_rl.policies.gr00t.sizes import GR00T_N1_5, tiny


def reload(folder, **settings):
    return Gr00tPolicy.from_pretrained(folder, SEEN, ACTION, **{**SETTINGS, **settings})


def same_acts(one, two, tolerance=1e-6):
    inputs = one.prepare(synthesise(one.observation_spec))
    theirs = two.prepare(synthesise(two.observation_spec))
    a, b = one.act(inputs, noise=noise()), two.act(theirs, noise=noise())
    torch.testing.assert_close(a.actions, b.actions, rtol=0, atol=tolerance)
    torch.testing.assert_close(a.value, b.value, rtol=0, atol=tolerance)


def fails(message, act):
    with pytest.raises(UserError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_a_folder_is_written_and_read(tmp_path):
    policy = build(method="noise")
    policy.set_statistics(np.arange(5.0), np.arange(1.0, 6.0))
    policy.save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "README.md").write_text("by its authors")
    loaded = reload(tmp_path / "one", method="noise")
    assert loaded.horizon == 4
    same_acts(policy, loaded)
    loaded.set_statistics(np.full(5, 9.0), np.ones(5))  # a checkpoint keeps its own
    assert loaded.state_normaliser.as_dict() == policy.state_normaliser.as_dict()
    loaded.save_pretrained(tmp_path / "two")
    one, two = ({p.relative_to(tmp_path / n): p for p in (tmp_path / n).rglob("*.*")} for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(one[name].read_bytes() == two[name].read_bytes() for name in one if one[name].is_file())
    fails("is inside the checkpoint", lambda: loaded.save_pretrained(tmp_path / "one" / "mine"))


def test_only_the_chosen_embodiment_learns_whatever_the_decay(tmp_path):
    build().save_pretrained(tmp_path / "one")
    file = tmp_path / "one" / "model.safetensors"
    weights = load_file(file)
    tables = {key for key in weights if key.endswith((".W", ".b"))}
    assert len(tables) == 14
    save_file({key: torch.randn_like(value) if key in tables else value for key, value in weights.items()}, file)
    policy, before = reload(tmp_path / "one"), load_file(file)
    assert policy.embodiment == 31
    cloning = ImitationConfig(learning_rate=1e-2, weight_decay=0.1).build(policy, 0)
    batch = {"inputs": observe(policy), "actions": torch.zeros(6, 4, 3), "valid": torch.ones(6, 4, dtype=torch.bool)}
    for _ in range(2):
        cloning.update(batch, torch.Generator().manual_seed(0))
    policy.save_pretrained(tmp_path / "two")
    after = load_file(tmp_path / "two" / "model.safetensors")
    for key in tables:
        assert torch.equal(after[key][:31], before[key][:31])
        assert not torch.equal(after[key][31], before[key][31])
    same_acts(policy, reload(tmp_path / "two"))


def test_types_and_the_unused_output_layer_are_kept(tmp_path):
    build().save_pretrained(tmp_path / "one")
    file = tmp_path / "one" / "model.safetensors"
    weights = {key: value.bfloat16() for key, value in load_file(file).items()}
    table = weights.pop(TOKEN_TABLE)
    assert torch.equal(weights.pop(OUTPUT_LAYER), table)
    for stored in (
        {TOKEN_TABLE: table},
        {OUTPUT_LAYER: table},
        {TOKEN_TABLE: table, OUTPUT_LAYER: torch.randn(table.shape).half()},
    ):
        stored |= weights
        save_file(stored, file)
        policy = reload(tmp_path / "one")
        assert torch.equal(policy.network.state_dict()[TOKEN_TABLE], table)
        assert policy.act(observe(policy)).actions.dtype == torch.float32
        policy.save_pretrained(tmp_path / "two")
        again = load_file(tmp_path / "two" / "model.safetensors")
        assert again.keys() == stored.keys()
        assert all(again[key].dtype == value.dtype and torch.equal(again[key], value) for key, value in stored.items())
    save_file(weights, file)
    fails("has no backbone.eagle_model.language_model.model.embed_tokens", lambda: reload(tmp_path / "one"))


def test_adapters_are_merged_in_the_published_layout(tmp_path):
    policy = build(lora_rank=3, frozen=("vision",))
    policy.save_pretrained(tmp_path)
    same_acts(policy, reload(tmp_path), 1e-5)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    adapters = [name for name in trained if "lora_" in name]
    for part in ("language_model", "action_head.model", "action_head.vl_self_attention"):
        assert any(part in name for name in adapters), part
    assert not any("vision_model" in name for name in trained)
    assert "network.action_head.state_encoder.layer1.W" in trained
    assert not any(name.endswith(".base_layer.weight") for name in trained)


def test_parts_of_state_and_action_are_joined_in_the_order_told(tmp_path):
    build().save_pretrained(tmp_path)
    file = tmp_path / METADATA
    content = json.loads(file.read_text())
    both = {name: {"min": [0.0] * n, "max": [float(n)] * n} for name, n in (("x", 2), ("y", 3), ("hand", 4))}
    content["new_embodiment"]["statistics"]["state"] = both
    file.write_text(json.dumps(content))
    fails(
        r"state describes 9 dimensions \(x, y, hand\), the simulator has 5: .*--policy.state-keys",
        lambda: reload(tmp_path),
    )
    loaded = reload(tmp_path, state_keys=("y", "x"))
    assert loaded.state_normaliser.as_dict()["max"] == [3.0, 3.0, 3.0, 2.0, 2.0]
    fails("has no statistics 'z'; it has x, y, hand", lambda: reload(tmp_path, state_keys=("z",)))
    fails("has no statistics 'gr1'; it has new_embodiment", lambda: reload(tmp_path, embodiment="gr1"))
    del both["y"]["min"]
    file.write_text(json.dumps(content))
    fails("has no 'min', which this policy normalises with", lambda: reload(tmp_path, state_keys=("y", "x")))
    file.unlink()
    fails("metadata.json cannot be read", lambda: reload(tmp_path))


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    build().save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    content = describe(tiny(), 4)
    assert json.loads(config.read_text()) == content
    fails("action_horizon is 4, the policy's 7", lambda: reload(tmp_path, horizon=7))
    heads = json.loads(json.dumps(content))
    heads["action_head_cfg"]["diffusion_model_cfg"]["num_attention_heads"] = 2
    config.write_text(json.dumps(heads))
    fails("action_head_cfg.diffusion_model_cfg.num_attention_heads is 2, the policy's 4", lambda: reload(tmp_path))
    config.write_text(json.dumps({**content, "model_type": "Gr00tN1d7"}))
    fails("model_type is Gr00tN1d7, not gr00t_n1_5", lambda: reload(tmp_path))
    config.write_text(json.dumps({"model_type": "gr00t_n1_5"}))
    bigger = replace(tiny(), backbone=replace(tiny().backbone, vision=replace(tiny().backbone.vision, mlp=65)))
    fails("has another shape of backbone", lambda: reload(tmp_path, network=bigger))
    fails("heads.safetensors does not fit", lambda: reload(tmp_path, value_hidden=(17,)))
    weights = load_file(file)
    save_file({**weights, "extra.weight": torch.ones(1)}, file)
    fails("unexpected extra.weight", lambda: reload(tmp_path))
    save_file({key: value for key, value in weights.items() if "vlln" not in key}, file)
    fails("has no action_head.vlln.bias, action_head.vlln.weight", lambda: reload(tmp_path))
    file.write_bytes(b"\x00" * 20)
    fails("model.safetensors is truncated or damaged", lambda: reload(tmp_path))
    config.unlink()
    fails("config.json cannot be read", lambda: reload(tmp_path))


def test_the_published_settings_are_the_published_sizes():
    """The values of nvidia/GR00T-N1.5-3B's config.json that public code quotes."""
    attention = {"attention_head_dim": 64, "num_attention_heads": 32, "num_layers": 4, "positional_embeddings": None}
    dit = {
        "attention_head_dim": 48,
        "cross_attention_dim": 2048,
        "interleave_self_attention": True,
        "norm_type": "ada_norm",
        "num_attention_heads": 32,
        "num_layers": 16,
        "output_dim": 1024,
        "positional_embeddings": None,
    }
    head = {
        "action_dim": 32,
        "action_horizon": 16,
        "add_pos_embed": True,
        "backbone_embedding_dim": 2048,
        "diffusion_model_cfg": dit,
        "hidden_size": 1024,
        "input_embedding_dim": 1536,
        "max_state_dim": 64,
        "num_target_vision_tokens": 32,
        "num_timestep_buckets": 1000,
        "use_vlln": True,
        "vl_self_attention_cfg": attention,
    }
    ours = describe(GR00T_N1_5, 16)
    assert {key: ours["action_head_cfg"][key] for key in head} == head
    del ours["action_head_cfg"]
    assert ours == {
        "action_dim": 32,
        "action_horizon": 16,
        "hidden_size": 2048,
        "model_type": "gr00t_n1_5",
        "backbone_cfg": {"select_layer": 12, "project_to_dim": None},
    }

"""π₀ and π₀.₅ as policies: what they see, what they train, and folders in and out, with a tiny network."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embodied_rl.algorithms.flow_actor_critic import FlowActorCriticConfig
from embodied_rl.algorithms.imitation import ImitationConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies import check
from embodied_rl.policies.check import synthesise
from embodied_rl.policies.pi0.checkpoint import LEROBOT, UNUSED, to_published
from embodied_rl.policies.pi0.config import PI0, PI05, Pi0Config, Pi05Config, tiny
from embodied_rl.policies.pi0.network import Network
from embodied_rl.policies.pi0.policy import Pi0Policy
from embodied_rl.policies.pi0.preprocessing import find_views, load_tokenizer
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec, connect
from embodied_rl.types import Trajectory

SEEN = ObservationSpec(state=5, cameras={"agentview": CameraSpec(20, 30), "wrist": CameraSpec(32, 32)})
ACTION = ActionSpec((-1.0, -2.0, 0.0), (1.0, 2.0, 1.0), (0.0, 0.0, 0.0))


def configure(adaptive=False, **settings):
    kind = Pi05Config if adaptive else Pi0Config
    defaults = {
        "network": tiny(adaptive),
        "tokenizer": "bytes",
        "prompt_length": 96,
        "horizon": 4,
        "chunk": 2,
        "denoise_steps": 3,
        "value_hidden": (16,),
        "frozen": (),
    }
    return kind(**{**defaults, **settings})


def build(adaptive=False, **settings):
    """With every parameter away from its first value, so that nothing is the identity by chance."""
    torch.manual_seed(0)
    policy = configure(adaptive, **settings).build(SEEN, ACTION)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return policy


both = pytest.mark.parametrize("adaptive", [False, True], ids=["pi0", "pi05"])


def noise(rows=6):
    return RowNoise(1, np.arange(rows), np.zeros(rows, np.int64))


# -- the contract -----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "noise", "joint": True, "frozen": ("vision", "language"), "value_trains_prefix": True},
        {"gradient_checkpointing": True, "lora_rank": 2, "frozen": ("vision",)},
    ],
    ids=["sde", "noise_frozen", "lora"],
)
def test_keeps_the_contract(adaptive, settings):
    check(build(adaptive, **settings))


@both
def test_keeps_the_contract_in_bfloat16(adaptive):
    policy = build(adaptive, dtype="bfloat16")
    assert {p.dtype for p in policy.network.expert.layers[0].mlp.parameters()} == {torch.bfloat16}
    assert policy.network.action_out_proj.weight.dtype == torch.float32
    sample = policy.act(policy.prepare(synthesise(policy.observation_spec)), noise=noise())
    assert all(value.dtype == torch.float32 for value in (sample.actions, sample.log_prob, sample.value))
    check(policy, tolerance=2e-2)


# -- gradients --------------------------------------------------------------------------------------------------------


def losses(policy, inputs):
    trace = policy.act(inputs, noise=noise()).trace
    actions = torch.zeros(6, policy.horizon, 3)
    torch.manual_seed(0)
    return {
        "score": policy.evaluate_actions(inputs, trace).log_prob.sum(),
        "imitation": policy.imitation_loss(inputs, actions, torch.ones(6, policy.horizon, dtype=torch.bool)).sum(),
        "sample": policy.sample(inputs, torch.ones(6, policy.horizon, 32)).sum(),
    }


def gradients(policy, loss):
    trained = [p for p in policy.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, trained, allow_unused=True)


@both
@pytest.mark.parametrize("frozen", [(), ("vision", "language")])
def test_recomputing_activations_changes_no_gradient(adaptive, frozen):
    plain = build(adaptive, joint=True, frozen=frozen)
    saving = build(adaptive, joint=True, frozen=frozen, gradient_checkpointing=True)
    inputs = plain.prepare(synthesise(plain.observation_spec))
    for (name, one), two in zip(losses(plain, inputs).items(), losses(saving, inputs).values(), strict=True):
        for a, b in zip(gradients(plain, one), gradients(saving, two), strict=True):
            assert (a is None) == (b is None), name
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@both
def test_a_frozen_prefix_keeps_no_graph_and_the_expert_learns_the_same(adaptive):
    policy, frozen = build(adaptive, joint=True), build(adaptive, joint=True, frozen=("vision", "language"))
    inputs = policy.prepare(synthesise(policy.observation_spec))
    prefix = frozen.encode(inputs)
    assert not any(past.keys.requires_grad or past.values.requires_grad for past in prefix.past)
    assert policy.encode(inputs).past[0].keys.requires_grad
    names = [name for name, p in frozen.named_parameters() if p.requires_grad]
    assert not any(name.startswith(("network.vision", "network.projector", "network.language")) for name in names)
    mine = dict(zip(names, gradients(frozen, losses(frozen, inputs)["score"]), strict=True))
    theirs = dict(zip(dict(policy.named_parameters()), gradients(policy, losses(policy, inputs)["score"]), strict=True))
    for name, gradient in mine.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)
    assert mine["network.action_out_proj.weight"] is not None
    assert theirs["network.vision.post_layernorm.weight"].abs().sum() > 0


@both
def test_the_value_sees_the_observation_and_trains_what_it_is_told_to(adaptive):
    for trains in (False, True):
        policy = build(adaptive, value_trains_prefix=trains)
        inputs = policy.prepare(synthesise(policy.observation_spec))
        got = gradients(policy, policy.value(inputs).sum())
        touched = {name for (name, _), g in zip(policy.named_parameters(), got, strict=True) if g is not None}
        assert any(name.startswith("network.language") for name in touched) == trains
        assert not any(name.startswith(("network.expert", "network.action")) for name in touched)
        other = {**inputs, "tokens": inputs["tokens"].flip(0)}
        assert not torch.allclose(policy.value(other), policy.value(inputs))
        assert not policy.features(inputs).requires_grad


@both
def test_groups_are_frozen_by_name(adaptive):
    groups = build(adaptive, frozen=("expert", "value"), method="noise").parameter_groups()
    assert list(groups) == ["vision", "language", "expert", "value"]
    assert all(group for group in groups.values())
    trained = {name for name, group in groups.items() if any(p.requires_grad for p in group)}
    assert trained == {"vision", "language"}


def test_training_times_follow_openpis_beta_distribution():
    policy, seen = build(), []
    policy.encode = lambda inputs: None
    policy.velocity = lambda prefix, x, t: (seen.append(t) or x, None)
    generator = torch.Generator().manual_seed(0)
    actions = torch.zeros(20_000, 4, 3)
    policy.imitation_loss({}, actions, torch.ones(20_000, 4, dtype=torch.bool), generator=generator)
    t = (seen[0] - 0.001) / 0.999
    assert seen[0].min() >= 0.001
    assert seen[0].max() <= 1
    assert float(t.mean()) == pytest.approx(1.5 / 2.5, abs=0.01)
    assert float(t.var()) == pytest.approx(1.5 / (2.5**2 * 3.5), abs=0.003)


# -- what it sees -----------------------------------------------------------------------------------------------------


@both
def test_a_missing_camera_is_as_good_as_a_masked_one(adaptive):
    policy = build(adaptive)
    inputs = policy.prepare(synthesise(policy.observation_spec))
    assert set(policy.views.items()) == {("base_0_rgb", "agentview"), ("left_wrist_0_rgb", "wrist")}
    masked = {**inputs, "image_mask.left_wrist_0_rgb": torch.zeros(6, dtype=torch.bool)}
    one = policy.act(masked, deterministic=True, noise=noise())
    del policy.views["left_wrist_0_rgb"]
    two = policy.act(inputs, deterministic=True, noise=noise())
    torch.testing.assert_close(one.actions, two.actions, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.value, two.value, rtol=1e-5, atol=1e-5)


def test_inputs_are_uint8_and_static():
    policy = build()
    inputs = policy.prepare(synthesise(policy.observation_spec))
    assert {name: (value.dtype, tuple(value.shape[1:])) for name, value in inputs.items()} == {
        "image.base_0_rgb": (torch.uint8, (32, 32, 3)),
        "image.left_wrist_0_rgb": (torch.uint8, (32, 32, 3)),
        "image_mask.base_0_rgb": (torch.bool, ()),
        "image_mask.left_wrist_0_rgb": (torch.bool, ()),
        "state": (torch.float32, (32,)),
        "tokens": (torch.int64, (96,)),
        "token_mask": (torch.bool, (96,)),
    }
    assert (inputs["image.base_0_rgb"][0, :5] == 0).all()  # 20 x 30 becomes 21 x 32 between black bars
    assert (inputs["image.base_0_rgb"][0, 5:26] != 0).any(2).all()


def test_cameras_are_found_by_name_by_alias_or_as_told():
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")

    def found(names, chosen=None):
        spec = ObservationSpec(cameras={name: CameraSpec(8, 8) for name in names})
        return find_views(spec, cameras, chosen or {})

    assert found(["base_camera"]) == {"base_0_rgb": "base_camera"}
    assert found(cameras) == {name: name for name in cameras}
    assert found(["top", "hand_camera"], {"base_0_rgb": "top"}) == {
        "base_0_rgb": "top",
        "left_wrist_0_rgb": "hand_camera",
    }
    with pytest.raises(SpecError, match="'base_0_rgb'; the simulator's cameras: top"):
        found(["top"])
    with pytest.raises(SpecError, match="choose its observation mode with images"):
        found([])
    with pytest.raises(UserError, match="did you mean top"):
        found(["top"], {"base_0_rgb": "tap"})


def test_an_image_that_is_upside_down_is_turned():
    simulator = replace(SEEN, cameras={"agentview": CameraSpec(20, 30, rotated=True)})
    policy = configure().build(simulator, ACTION)
    connection = connect(simulator, ACTION, policy.observation_spec, policy.action_spec)
    assert connection.names == ["rotate agentview by 180"]


def test_an_instruction_that_is_too_long_is_named():
    policy = build(prompt_length=20)
    with pytest.raises(UserError, match="'pick up the red cube' has 22 tokens, the policy takes 20"):
        policy.prepare(synthesise(policy.observation_spec))


def test_a_tokenizer_is_needed_only_to_prepare():
    policy = build(tokenizer="")
    with pytest.raises(UserError, match=r"pi0 needs a tokenizer: set --policy\.tokenizer"):
        policy.prepare(synthesise(policy.observation_spec))


def test_a_tokenizer_comes_from_a_local_folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "open": 4, "drawer": 5}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "good")
    assert load_tokenizer(str(tmp_path / "good")).encode("open drawer", add_special_tokens=False) == [4, 5]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no tokenizer that can be loaded") as caught:
        load_tokenizer(str(tmp_path / "empty"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"no folder .*absent"):
        load_tokenizer(str(tmp_path / "absent"))


def test_too_many_numbers_do_not_fit():
    with pytest.raises(SpecError, match="takes 32 states and actions at most, not 33 and 3"):
        configure().build(replace(SEEN, state=33), ACTION)


@both
def test_actions_go_to_the_network_and_back(adaptive):
    policy = build(adaptive)
    actions = torch.tensor([[[0.3, -1.5, 0.25], [-1.0, 2.0, 1.0]]])
    network = policy.to_network(actions)
    assert network.shape == (1, 2, 32)
    assert network.dtype == torch.float32
    torch.testing.assert_close(
        network[..., :3], torch.tensor([[[0.3, -0.75, -0.5], [-1.0, 1.0, 1.0]]]), rtol=0, atol=1e-5
    )
    assert (network[..., 3:] == 0).all()
    torch.testing.assert_close(policy.to_simulator(network), actions)
    assert policy.to_simulator(10 * network).abs().max() == 2


# -- sizes and settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "count"), [(PI0, 3_501_372_176), (PI05, 3_616_757_520)], ids=["pi0", "pi05"])
def test_published_sizes(sizes, count):
    with torch.device("meta"):
        network = Network(sizes, 50)
        published = to_published(network.state_dict(), torch.empty(257_152, 1024))
    assert sum(value.numel() for value in published.values()) == count
    assert len(published) == {False: 777, True: 812}[sizes.adaptive]
    shape = {key: tuple(value.shape) for key, value in published.items()}
    tower = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
    assert shape[tower + "embeddings.patch_embedding.weight"] == (1152, 3, 14, 14)
    assert shape[tower + "embeddings.position_embedding.weight"] == (256, 1152)
    assert shape[tower + "encoder.layers.26.mlp.fc1.weight"] == (4304, 1152)
    assert shape["paligemma_with_expert.paligemma.lm_head.weight"] == (257_152, 2048)
    assert shape["paligemma_with_expert.paligemma.model.language_model.layers.17.self_attn.k_proj.weight"] == (
        256,
        2048,
    )
    assert shape["paligemma_with_expert.gemma_expert.model.layers.17.self_attn.o_proj.weight"] == (1024, 2048)
    norm = "paligemma_with_expert.gemma_expert.model.norm."
    assert shape[norm + "dense.weight" if sizes.adaptive else norm + "weight"] == (
        (3072, 1024) if sizes.adaptive else (1024,)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk": 9}, "1 <= chunk <= horizon"),
        ({"frozen": ("visoin",)}, "did you mean vision"),
        ({"cameras": {"wrist_0_rgb": "a"}}, "unknown camera"),
        ({"noise_std": (0.2, 0.1)}, "ascending"),
        ({"lora_rank": -1}, "lora_rank >= 0"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        configure(**settings)


# -- folders ----------------------------------------------------------------------------------------------------------


def reload(folder, adaptive, **settings):
    settings = {"network": tiny(adaptive), "tokenizer": "bytes", "prompt_length": 96, "chunk": 2, **settings}
    settings = {"value_hidden": (16,), "denoise_steps": 3, **settings}
    return Pi0Policy.from_pretrained(folder, SEEN, ACTION, **settings)


def same_acts(one, two, tolerance=1e-6):
    inputs = one.prepare(synthesise(one.observation_spec))
    a, b = one.act(inputs, noise=noise()), two.act(inputs, noise=noise())
    torch.testing.assert_close(a.actions, b.actions, rtol=0, atol=tolerance)
    torch.testing.assert_close(a.value, b.value, rtol=0, atol=tolerance)


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
    assert loaded.state_normaliser.as_dict() == policy.state_normaliser.as_dict()


def fails(message, act):
    with pytest.raises(UserError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


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
    fails("holds 1 norm_stats|cannot be read", lambda: reload(tmp_path, False, asset="libero"))
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


# -- algorithms -------------------------------------------------------------------------------------------------------


def moved(policy, learn):
    """Names of the parameters that `learn` changed."""
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    learn()
    return {name for name, p in policy.named_parameters() if not torch.equal(before[name], p)}


def trajectory(policy):
    """Two decisions in three environments, with made-up rewards."""
    inputs = policy.prepare(synthesise(policy.observation_spec))
    sample = policy.act(inputs, noise=noise())

    def fold(x):
        return x.unflatten(0, (2, 3))

    no = torch.zeros(2, 3, 2, dtype=torch.bool)
    return Trajectory(
        inputs={name: fold(value) for name, value in inputs.items()},
        trace={name: fold(value) for name, value in sample.trace.items()},
        actions=fold(sample.actions),
        log_prob=fold(sample.log_prob),
        value=fold(sample.value),
        last_value=torch.zeros(3),
        final_value=torch.zeros(2, 3),
        reward=torch.arange(12.0).view(2, 3, 2),
        terminated=no,
        truncated=no,
        valid=~no,
        tickets=torch.zeros(2, 3, dtype=torch.int64),
        version=0,
    )


@both
def test_ppo_improves_the_unfrozen_groups(adaptive):
    policy = build(adaptive, method="noise", joint=True, frozen=("vision",))
    algorithm = PPOConfig(epochs=1, minibatches=1, critic_warmup=0).build(policy, 0)
    data, metrics = trajectory(policy), {}
    names = moved(policy, lambda: metrics.update(algorithm.learn(data, torch.Generator().manual_seed(0))))
    assert abs(metrics["approx_kl"]) < 1e-8
    assert not any(name.startswith(("network.vision", "network.projector")) for name in names)
    for part in ("network.language.", "network.expert.", "network.action_in_proj.", "noise_head.", "value_head."):
        assert any(name.startswith(part) for name in names), part


@both
def test_cloning_and_critics_improve_it_too(adaptive):
    policy = build(adaptive, frozen=("vision", "language"))
    inputs = policy.prepare(synthesise(policy.observation_spec))
    generator = torch.Generator().manual_seed(0)
    anchor = {"inputs": inputs, "actions": torch.zeros(6, 4, 3), "valid": torch.ones(6, 4, dtype=torch.bool)}
    cloning = ImitationConfig().build(policy, 0)
    names = moved(policy, lambda: cloning.update(anchor, generator))
    assert any(name.startswith("network.expert.") for name in names)
    assert not any(name.startswith(("network.vision", "network.language", "value_head")) for name in names)
    critics = FlowActorCriticConfig(critic_hidden=(16,), critic_warmup_updates=0, actor_every=1).build(policy, 0)
    replay = {
        "inputs": inputs,
        "next_inputs": inputs,
        "actions": torch.zeros(6, 2, 3),
        "valid": torch.ones(6, 2, dtype=torch.bool),
        "reward": torch.ones(6),
        "discount": torch.full((6,), 0.9),
        "anchor": anchor,
    }
    assert any(name.startswith("network.expert.") for name in moved(policy, lambda: critics.update(replay, generator)))

"""π₀ and π₀.₅ as policies: what they see, what they train, and folders in and out, with a tiny network."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pi0_toys import ACTION, SEEN, both, build, configure, noise

from embodied_rl.algorithms.flow_actor_critic import FlowActorCriticConfig
from embodied_rl.algorithms.imitation import ImitationConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import from_dict, override, to_dict
from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies import check
from embodied_rl.policies.check import synthesise
from embodied_rl.policies.pi0.checkpoint import to_published
from embodied_rl.policies.pi0.config import PI0, PI05, Pi05Config
from embodied_rl.policies.pi0.network import Network
from embodied_rl.policies.pi0.preprocessing import find_views, load_tokenizer, pi0_prompt
from embodied_rl.recipes.quickstart import quickstart
from embodied_rl.specs import CameraSpec, ObservationSpec, connect
from embodied_rl.types import Trajectory

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
    assert policy.network.expert.dtype == policy.network.language.dtype == torch.bfloat16
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


def named_gradients(policy, loss):
    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    return dict(zip(names, gradients(policy, loss), strict=True))


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
    mine = named_gradients(frozen, losses(frozen, inputs)["score"])
    theirs = named_gradients(policy, losses(policy, inputs)["score"])
    assert not any(name.startswith(("network.vision", "network.projector", "network.language")) for name in mine)
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
        got = named_gradients(policy, policy.value(inputs).sum())
        touched = {name for name, gradient in got.items() if gradient is not None}
        assert any(name.startswith("network.language") for name in touched) == trains
        assert not any(name.startswith(("network.expert", "network.action")) for name in touched)
        other = {**inputs, "tokens": inputs["tokens"].flip(0)}
        assert not torch.allclose(policy.value(other), policy.value(inputs))
        assert not policy.features(inputs).requires_grad


def test_pi05_without_its_state_has_the_prompt_of_pi0():
    with_state, without, pi0 = build(True), build(True, state_in_prompt=False), build(False)
    observation = synthesise(pi0.observation_spec)
    blind = without.prepare(observation)
    assert torch.equal(blind["tokens"], pi0.prepare(observation)["tokens"]) and "state" not in blind
    assert not torch.equal(blind["tokens"], with_state.prepare(observation)["tokens"])
    check(without)


@both
def test_groups_are_frozen_by_name(adaptive):
    groups = build(adaptive, frozen=("expert", "value"), method="noise").parameter_groups()
    assert list(groups) == ["vision", "language", "expert", "value"]
    assert all(group for group in groups.values())
    trained = {name for name, group in groups.items() if any(p.requires_grad for p in group)}
    assert trained == {"vision", "language"}


def test_training_times_follow_openpis_beta_distribution(monkeypatch):
    policy, seen = build(), []
    monkeypatch.setattr(policy, "encode", lambda inputs: None)
    monkeypatch.setattr(policy, "velocity", lambda prefix, x, t: (seen.append(t) or x, None))
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


def test_a_tokenizer_of_another_network_is_refused():
    foreign = SimpleNamespace(bos_token_id=2, encode=lambda text: [257_000])
    policy = configure().build(SEEN, ACTION, tokenizer=foreign)
    with pytest.raises(UserError, match=r"the tokenizer gives id 257000, the network knows \d+"):
        policy.prepare(synthesise(policy.observation_spec))


def test_a_tokenizer_is_needed_only_to_prepare():
    policy = build(tokenizer="")
    with pytest.raises(UserError, match=r"pi0 needs a tokenizer: set --policy\.tokenizer"):
        policy.prepare(synthesise(policy.observation_spec))


def test_a_tokenizer_comes_from_a_local_folder(tmp_path):
    import tokenizers
    import transformers

    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "open": 4, "drawer": 5}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "good")
    assert pi0_prompt(load_tokenizer(str(tmp_path / "good")), " open_drawer") == [2, 4, 5]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no tokenizer that can be loaded") as caught:
        load_tokenizer(str(tmp_path / "empty"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"no folder .*absent"):
        load_tokenizer(str(tmp_path / "absent"))


def test_too_many_numbers_do_not_fit():
    with pytest.raises(SpecError, match="takes 32 states and 32 actions at most, not 33 and 3"):
        configure().build(replace(SEEN, state=33), ACTION)


@both
def test_actions_go_to_the_network_and_back(adaptive):
    policy = build(adaptive)
    actions = torch.tensor([[[0.3, -1.5, 0.25], [-1.0, 2.0, 1.0]]])
    network = policy.to_network(actions, {})
    assert network.shape == (1, 2, 32)
    assert network.dtype == torch.float32
    torch.testing.assert_close(
        network[..., :3], torch.tensor([[[0.3, -0.75, -0.5], [-1.0, 1.0, 1.0]]]), rtol=0, atol=1e-5
    )
    assert (network[..., 3:] == 0).all()
    torch.testing.assert_close(policy.to_simulator(network, {}), actions)
    assert policy.to_simulator(10 * network, {}).abs().max() == 2


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
        ({"relative_to_state": -1}, "relative_to_state >= 0"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        configure(**settings)


@both
def test_settings_survive_json(adaptive):
    policy = configure(adaptive, cameras={"base_0_rgb": "top"}, lora_rank=4)
    run = replace(quickstart(), policy=policy)
    assert from_dict(json.loads(json.dumps(to_dict(run)))) == run
    named = override(run, ["--policy", "pi05", "--policy.network.vision.width", "64", "--policy.frozen", "value"])
    assert isinstance(named.policy, Pi05Config)
    assert named.policy.network.vision.width == 64
    assert named.policy.frozen == ("value",)


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
def test_acting_and_an_update_encode_once(adaptive, monkeypatch):
    policy, calls = build(adaptive, frozen=("vision", "language")), []
    encode = policy.network.encode
    monkeypatch.setattr(policy.network, "encode", lambda *inputs: calls.append(1) or encode(*inputs))
    data = trajectory(policy)
    assert len(calls) == 1
    algorithm = PPOConfig(epochs=1, minibatches=1, critic_warmup=0).build(policy, 0)
    algorithm.learn(data, torch.Generator().manual_seed(0))
    assert len(calls) == 2


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

"""GR00T N1.5 as a policy: what it sees, what it trains, and folders in and out, with a tiny network."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embodied_rl.config import from_dict, to_dict
from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies import check
from embodied_rl.policies.check import synthesise
from embodied_rl.policies.gr00t.checkpoint import METADATA, OUTPUT_LAYER, TOKEN_TABLE, describe
from embodied_rl.policies.gr00t.config import Gr00tConfig
from embodied_rl.policies.gr00t.eagle import Eagle
from embodied_rl.policies.gr00t.network import Network
from embodied_rl.policies.gr00t.policy import Gr00tPolicy
from embodied_rl.policies.gr00t.preprocessing import MinMax, prompt, see
from embodied_rl.policies.gr00t.sizes import GR00T_N1_5, tiny
from embodied_rl.policies.pi0.preprocessing import Bytes
from embodied_rl.randomness import RowNoise
from embodied_rl.recipes.quickstart import quickstart
from embodied_rl.registry import policies
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec, connect

SEEN = ObservationSpec(state=5, cameras={"agentview": CameraSpec(20, 30), "wrist": CameraSpec(32, 32)})
ACTION = ActionSpec((-1.0, -2.0, 0.0), (1.0, 2.0, 1.0), (0.0, 0.0, 0.0))
LENGTH = 220
"""Two images of 16 tokens, and the chat prompt in bytes."""
SETTINGS = {
    "network": tiny(),
    "tokenizer": "bytes",
    "prompt_length": LENGTH,
    "chunk": 2,
    "denoise_steps": 3,
    "value_hidden": (16,),
    "frozen": (),
}


def configure(**settings):
    return Gr00tConfig(**{**SETTINGS, "horizon": 4, **settings})


def build(**settings):
    """With every parameter away from its first value, so that nothing is the identity by chance."""
    torch.manual_seed(0)
    policy = configure(**settings).build(SEEN, ACTION)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return policy


def noise(rows=6):
    return RowNoise(1, np.arange(rows), np.zeros(rows, np.int64))


def observe(policy):
    return policy.prepare(synthesise(policy.observation_spec))


# -- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "noise", "joint": True, "frozen": ("vision", "language"), "value_trains_prefix": True},
        {"method": "cps", "gradient_checkpointing": True, "lora_rank": 2, "frozen": ("vision",)},
    ],
    ids=["sde", "noise_frozen", "cps_lora"],
)
def test_keeps_the_contract(settings):
    check(build(**settings))


def test_keeps_the_contract_in_bfloat16():
    policy = build(dtype="bfloat16")
    assert {p.dtype for p in policy.network.parameters()} == {torch.bfloat16}
    assert policy.network.eagle.language_model["model"].rotary_emb.inv_freq.dtype == torch.float32
    sample = policy.act(observe(policy), noise=noise())
    assert all(value.dtype == torch.float32 for value in (sample.actions, sample.log_prob, sample.value))
    check(policy, tolerance=2e-2)


def test_it_is_registered():
    assert policies.load("gr00t") is Gr00tConfig


# -- gradients --------------------------------------------------------------------------------------------------------


def losses(policy, inputs):
    trace = policy.act(inputs, noise=noise()).trace
    torch.manual_seed(0)
    return {
        "score": policy.evaluate_actions(inputs, trace).log_prob.sum(),
        "imitation": policy.imitation_loss(inputs, torch.zeros(6, 4, 3), torch.ones(6, 4, dtype=torch.bool)).sum(),
        "sample": policy.sample(inputs, torch.ones(6, 4, 32)).sum(),
    }


def gradients(policy, loss):
    named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, [*named.values()], allow_unused=True), strict=True))


@pytest.mark.parametrize("frozen", [(), ("vision", "language")])
def test_recomputing_activations_changes_no_gradient(frozen):
    plain = build(joint=True, frozen=frozen)
    saving = build(joint=True, frozen=frozen, gradient_checkpointing=True)
    inputs = observe(plain)
    for (name, one), two in zip(losses(plain, inputs).items(), losses(saving, inputs).values(), strict=True):
        theirs = gradients(saving, two)
        for parameter, a in gradients(plain, one).items():
            b = theirs[parameter]
            assert (a is None) == (b is None), name
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_frozen_backbone_keeps_no_graph_and_the_head_learns_the_same():
    policy, frozen = build(joint=True), build(joint=True, frozen=("vision", "language"))
    inputs = observe(policy)
    assert not frozen.encode(inputs).features.requires_grad
    assert policy.encode(inputs).features.requires_grad
    mine, theirs = (gradients(each, losses(each, inputs)["score"]) for each in (frozen, policy))
    assert not any("eagle" in name for name in mine)
    for name, gradient in mine.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)
    assert mine["network.action_head.vlln.weight"] is not None
    vision = "network.backbone.eagle_model.vision_model.vision_model.embeddings.patch_embedding.weight"
    assert theirs[vision].abs().sum() > 0


def test_only_the_chosen_embodiment_learns():
    policy = build(embodiment="gr1")
    assert policy.embodiment == 24
    got = gradients(policy, losses(policy, observe(policy))["imitation"])
    rows = got["network.action_head.action_decoder.layer2.W"].abs().sum((1, 2))
    assert rows.nonzero().flatten().tolist() == [24]


def test_the_value_sees_the_observation_and_trains_what_it_is_told_to():
    for trains in (False, True):
        policy = build(value_trains_prefix=trains)
        inputs = observe(policy)
        touched = {name for name, g in gradients(policy, policy.value(inputs).sum()).items() if g is not None}
        assert any("language_model" in name for name in touched) == trains
        assert not any("action_head" in name for name in touched)
        for name in ("image.wrist", "tokens", "state"):
            other = {**inputs, name: inputs[name].flip(0)}
            assert not torch.allclose(policy.value(other), policy.value(inputs)), name
        padding = torch.where(inputs["token_mask"], inputs["tokens"], 7)
        torch.testing.assert_close(policy.value({**inputs, "tokens": padding}), policy.value(inputs))
        assert not policy.features(inputs).requires_grad


def test_groups_are_frozen_by_name():
    policy = build(frozen=("heads", "value"), method="noise")
    groups = policy.parameter_groups()
    assert list(groups) == ["vision", "language", "heads", "value"]
    trained = {name for name, group in groups.items() if any(p.requires_grad for p in group)}
    assert trained == {"vision", "language"}
    assert sum(map(len, groups.values())) == len(list(policy.parameters()))
    names = {id(p): name for name, p in policy.named_parameters()}
    assert {names[id(p)].split(".")[3] for p in groups["vision"]} == {"vision_model", "mlp1"}
    assert {names[id(p)].split(".")[0] for p in groups["heads"]} == {"network", "noise_head"}


def test_imitation_counts_the_real_dimensions_at_the_reference_times(monkeypatch):
    policy, seen = build(), []
    monkeypatch.setattr(policy, "encode", lambda inputs: None)
    monkeypatch.setattr(policy, "velocity", lambda prefix, x, t: (seen.append(t) or torch.zeros_like(x), None))
    zeros, valid = torch.zeros(20_000, 4, 3), torch.ones(20_000, 4, dtype=torch.bool)
    valid[:, 3] = False
    zero_action = policy.to_simulator(torch.zeros(20_000, 4, 32))
    drawn = torch.zeros(20_000, 4, 32)
    drawn[:, :, 3:] = 9.0
    drawn[:, 3] = 9.0
    assert policy.imitation_loss({}, zero_action, valid, noise=drawn).abs().max() < 1e-10
    drawn[:, :3, 0] = 3.0
    assert policy.imitation_loss({}, zero_action, valid, noise=drawn)[0].item() == pytest.approx(9 / 3)
    policy.imitation_loss({}, zeros, valid, generator=torch.Generator().manual_seed(0))
    t = seen[-1] * 0.999
    assert float(t.mean()) == pytest.approx(1.5 / 2.5, abs=0.01)
    assert float(t.var()) == pytest.approx(1.5 / (2.5**2 * 3.5), abs=0.003)


# -- what it sees -----------------------------------------------------------------------------------------------------


def test_inputs_are_uint8_and_static():
    policy = build()
    observation = synthesise(policy.observation_spec)
    inputs = policy.prepare(observation)
    assert {name: (value.dtype, tuple(value.shape[1:])) for name, value in inputs.items()} == {
        "image.agentview": (torch.uint8, (32, 32, 3)),
        "image.wrist": (torch.uint8, (32, 32, 3)),
        "tokens": (torch.int64, (LENGTH,)),
        "token_mask": (torch.bool, (LENGTH,)),
        "state": (torch.float32, (64,)),
    }
    assert (inputs["image.wrist"][1] == 0).all()  # a row without cameras
    assert (inputs["tokens"] == tiny().backbone.image_token).sum(1).tolist() == [32] * 6
    assert (inputs["tokens"][~inputs["token_mask"]] == 0).all()


@pytest.mark.parametrize("shape", [(20, 30), (64, 64), (257, 255), (32, 32)])
def test_images_are_those_of_the_published_transforms(shape):
    """VideoToTensor, VideoCrop (evaluation), VideoResize and VideoToNumpy, which are torchvision's."""
    from torchvision.transforms import v2

    image = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    for crop in (0.95, 1.0):
        x = torch.tensor(image).permute(0, 3, 1, 2).float() / 255
        x = v2.CenterCrop([int(shape[0] * crop), int(shape[1] * crop)])(x)
        x = v2.Resize([32, 32], interpolation=v2.InterpolationMode.BILINEAR, antialias=True)(x)
        expected = (x * 255).to(torch.uint8).permute(0, 2, 3, 1)
        assert torch.equal(see(image, np.ones(2, bool), crop, 32), expected)


class Recorder:
    """A tokenizer that keeps what it was asked for."""

    def __init__(self):
        self.texts = []

    def encode(self, text):
        self.texts.append(text)
        return [100 + len(self.texts)]


def test_the_prompt_is_the_backbone_chat():
    recorder = Recorder()
    assert prompt(recorder, "open the drawer", 2, 1, 3) == [101, 1, 1, 1, 102, 1, 1, 1, 103]
    assert "*".join(recorder.texts) == (
        "<|im_start|>system\nYou are a helpful assistant.\n<|im_end|>\n<|im_start|>user\n<image 1><img>*</img>"
        "<image 2><img>*</img>open the drawer<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(UserError, match="holds the token of an image"):
        prompt(Bytes(), "open", 1, 3 + ord("o"), 3)


def test_an_instruction_that_is_too_long_is_named():
    policy = build(prompt_length=60)
    with pytest.raises(UserError, match=r"'pick up the red cube' has \d+ tokens, the policy takes 60"):
        observe(policy)


def test_a_tokenizer_is_needed_only_to_prepare(tmp_path):
    with pytest.raises(UserError, match=r"gr00t needs a tokenizer: set --policy\.tokenizer"):
        observe(build(tokenizer=""))
    with pytest.raises(UserError, match="holds no tokenizer that can be loaded"):
        observe(build(tokenizer=str(tmp_path)))
    with pytest.raises(UserError, match="no folder absent"):
        observe(build(tokenizer="absent"))


def test_cameras_come_in_the_order_told():
    assert build().cameras == ("agentview", "wrist")
    policy = build(cameras=("wrist", "agentview"))
    assert policy.cameras == ("wrist", "agentview")
    with pytest.raises(UserError, match="unknown camera of the simulator 'wrst': did you mean wrist"):
        build(cameras=("wrst",))
    with pytest.raises(SpecError, match="needs images"):
        configure().build(replace(SEEN, cameras={}), ACTION)
    turned = replace(SEEN, cameras={"wrist": CameraSpec(32, 32, rotated=True)})
    policy = configure().build(turned, ACTION)
    assert connect(turned, ACTION, policy.observation_spec, ACTION).names == ["rotate wrist by 180"]


def test_the_backbone_reads_images_at_their_places_and_padding_stands_alone():
    torch.manual_seed(0)
    eagle = Eagle(tiny().backbone)
    tokens = torch.randint(3, 272, (2, 40))
    tokens[:, 4:20] = 1
    tokens[0, 24:40] = 1
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 30:] = False
    images = [torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8) for _ in range(2)]
    with torch.no_grad():
        both = eagle(images, tokens[:1], mask[:1])
        assert not torch.allclose(eagle(images[::-1], tokens[:1], mask[:1])[:, 4:20], both[:, 4:20])
        embedded = eagle.language_model["model"].embed_tokens(tokens[:1])
        embedded[0, 4:20], embedded[0, 24:40] = eagle.see(images[:1])[0], eagle.see(images[1:])[0]
        expected = eagle.language_model["model"](
            inputs_embeds=embedded, attention_mask={"full_attention": torch.ones(1, 1, 40, 40).tril().bool()}
        ).last_hidden_state
        torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)

        padded = eagle(images[:1], tokens[1:], mask[1:])
        alone = eagle(images[:1], tokens[1:, :30], mask[1:, :30])
        torch.testing.assert_close(padded[:, :30], alone, rtol=1e-5, atol=1e-5)
        # attention gives padding nothing, so that the token alone decides: the reference's flash attention
        tokens[1, 30:] = 7
        padded = eagle(images[:1], tokens[1:], mask[1:])
        torch.testing.assert_close(padded[0, 30:], padded[0, 30].expand(10, -1), rtol=0, atol=0)
        x = eagle.language_model["model"].embed_tokens(torch.tensor(7))
        for layer in eagle.language_model["model"].layers:
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        torch.testing.assert_close(padded[0, 30], eagle.language_model["model"].norm(x), rtol=1e-5, atol=1e-5)


# -- states and actions -----------------------------------------------------------------------------------------------


def test_min_and_max_become_one_and_a_constant_becomes_zero():
    normaliser = MinMax(3)
    assert torch.equal(normaliser.normalise(torch.tensor([0.5, -2.0, 3.0])), torch.tensor([0.5, -2.0, 3.0]).double())
    normaliser.fit({"min": [0.0, 2.0, -1.0], "max": [4.0, 2.0, 1.0]}, "the test")
    y = normaliser.normalise(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, -1.0]]))
    assert torch.equal(y, torch.tensor([[-0.5, 0.0, 3.0], [1.0, 0.0, -1.0]]).double())
    x = normaliser.unnormalise(torch.tensor([-0.5, 0.3, 3.0]))
    torch.testing.assert_close(x, torch.tensor([1.0, 2.0, 3.0]).double(), rtol=0, atol=1e-7)


def test_actions_go_to_the_network_and_back():
    policy = build()
    actions = torch.tensor([[[0.3, -1.5, 0.25], [-1.0, 2.0, 1.0]]])
    network = policy.to_network(actions)
    assert network.shape == (1, 2, 32)
    torch.testing.assert_close(network[0, :, :3], torch.tensor([[0.3, -0.75, -0.5], [-1.0, 1.0, 1.0]]))
    assert (network[..., 3:] == 0).all()
    torch.testing.assert_close(policy.to_simulator(network), actions)
    assert policy.to_simulator(10 * network).abs().max() == 2


def test_a_gripper_from_zero_to_one_is_turned_into_the_simulators():
    simulator = ActionSpec((-1.0,) * 2, (1.0,) * 2, (0.0,) * 2, gripper=1, gripper_open=-1)
    policy = configure(unit_gripper=True).build(SEEN, simulator)
    connection = connect(SEEN, simulator, policy.observation_spec, policy.action_spec)
    assert connection.action(np.array([[0.5, 0.0], [0.5, 1.0]], np.float32)).tolist() == [[0.5, 1.0], [0.5, -1.0]]
    with pytest.raises(SpecError, match="names no gripper"):
        configure(unit_gripper=True).build(SEEN, ACTION)


def test_too_many_numbers_do_not_fit():
    with pytest.raises(SpecError, match="takes 64 states and 32 actions at most, not 65 and 3"):
        configure().build(replace(SEEN, state=65), ACTION)


# -- sizes and settings -----------------------------------------------------------------------------------------------


def test_published_sizes():
    """Sizes and names as public code and converters have them; the weights themselves were not at hand."""
    with torch.device("meta"):
        weights = Network(GR00T_N1_5).state_dict()
    shape = {key: tuple(value.shape) for key, value in weights.items()}
    eagle, head = "backbone.eagle_model.", "action_head."
    assert all(key.startswith((eagle, head)) for key in shape)
    assert shape[eagle + "vision_model.vision_model.encoder.layers.26.mlp.fc1.weight"] == (4304, 1152)
    assert shape[eagle + "vision_model.vision_model.embeddings.position_embedding.weight"] == (256, 1152)
    assert shape[eagle + "vision_model.vision_model.head.probe"] == (1, 1, 1152)
    assert shape[eagle + "mlp1.0.weight"] == (2048, 1152)
    assert shape[TOKEN_TABLE] == (151_680, 2048)
    assert shape[eagle + "language_model.model.layers.11.self_attn.k_proj.weight"] == (1024, 2048)
    assert shape[eagle + "language_model.model.layers.11.self_attn.q_norm.weight"] == (128,)
    assert eagle + "language_model.model.layers.12.mlp.up_proj.weight" not in shape
    assert shape[head + "model.transformer_blocks.14.attn1.to_k.weight"] == (1536, 2048)
    assert shape[head + "model.transformer_blocks.15.attn1.to_k.weight"] == (1536, 1536)
    assert shape[head + "model.transformer_blocks.15.norm1.linear.weight"] == (3072, 1536)
    assert shape[head + "model.proj_out_2.weight"] == (1024, 1536)
    assert shape[head + "vl_self_attention.transformer_blocks.3.ff.net.0.proj.weight"] == (8192, 2048)
    assert shape[head + "action_encoder.W2.W"] == (32, 3072, 1536)
    assert shape[head + "action_decoder.layer2.W"] == (32, 1024, 32)
    assert shape[head + "state_encoder.layer1.W"] == (32, 64, 1024)
    assert shape[head + "position_embedding.weight"] == (1024, 1536)
    # public training logs count these; the first includes the language model's output layer
    output_layer = 151_680 * 2048
    assert sum(value.numel() for value in weights.values()) + output_layer == 2_724_163_520
    assert sum(value.numel() for key, value in weights.items() if key.startswith(head)) == 1_068_806_144


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk": 9}, "1 <= chunk <= horizon"),
        ({"horizon": 99}, "horizon <= 64"),
        ({"frozen": ("head",)}, "did you mean heads"),
        ({"embodiment": "gr2"}, "did you mean gr1"),
        ({"noise_std": (0.2, 0.1)}, "ascending"),
        ({"crop": 0.0}, "crop above 0"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        configure(**settings)


def test_settings_survive_json():
    run = replace(quickstart(), policy=configure(cameras=("wrist",), state_keys=("x", "y")))
    assert from_dict(json.loads(json.dumps(to_dict(run)))) == run


# -- folders ----------------------------------------------------------------------------------------------------------


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

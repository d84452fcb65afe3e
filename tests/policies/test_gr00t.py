"""GR00T N1.5 as a policy: what it sees, what it trains, and folders in and out, with a tiny network."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from gr00t_toys import ACTION, LENGTH, SEEN, build, configure, noise, observe
from image_toys import roll_out, simulate

from embodied_rl.algorithms.imitation import ImitationConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import from_dict, to_dict
from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies import check
from embodied_rl.policies.check import synthesise
from embodied_rl.policies.gr00t.checkpoint import TOKEN_TABLE
from embodied_rl.policies.gr00t.config import Gr00tConfig
from embodied_rl.policies.gr00t.eagle import Eagle
from embodied_rl.policies.gr00t.network import Network
from embodied_rl.policies.gr00t.preprocessing import MinMax, load_tokenizer, prompt, see
from embodied_rl.policies.gr00t.sizes import GR00T_N1_5, tiny
from embodied_rl.policies.pi0.preprocessing import Bytes
from embodied_rl.recipes.quickstart import quickstart
from embodied_rl.registry import policies
from embodied_rl.specs import ActionSpec, CameraSpec, connect
from embodied_rl.types import Trajectory

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


def test_two_ppo_updates_change_exactly_what_is_trained():
    with simulate() as simulator:
        policy = configure(frozen=("language",)).build(simulator.observation_spec, simulator.action_spec)
        ppo = PPOConfig(epochs=1, minibatches=1, critic_warmup=0).build(policy, 0)
        worker, generator = roll_out(simulator, policy), torch.Generator().manual_seed(0)
        before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
        for version in range(2):
            ppo.learn(worker.collect(4, version), generator)
    changed = {name for name, parameter in policy.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert {policy.group(name) for name in changed} == {"vision", "heads", "value"}


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
    zero_action = policy.to_simulator(torch.zeros(20_000, 4, 32), {})
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


def trajectory(policy):
    """Two decisions in three environments, with made-up rewards."""
    inputs = observe(policy)
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


def test_ppo_and_cloning_improve_the_groups_that_are_not_frozen():
    policy = build(frozen=("vision",))
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}

    def moved():
        return {name for name, p in policy.named_parameters() if not torch.equal(before[name], p)}

    algorithm = PPOConfig(epochs=1, minibatches=1, critic_warmup=0).build(policy, 0)
    metrics = algorithm.learn(trajectory(policy), torch.Generator().manual_seed(0))
    assert abs(metrics["approx_kl"]) < 1e-8
    for part in ("language_model", "action_head.model", "action_head.state_encoder", "value_head"):
        assert any(part in name for name in moved()), part
    assert not any("vision_model" in name or "mlp1" in name for name in moved())
    values = {name: p.detach().clone() for name, p in policy.value_head.named_parameters()}
    anchor = {"inputs": observe(policy), "actions": torch.zeros(6, 4, 3), "valid": torch.ones(6, 4, dtype=torch.bool)}
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    ImitationConfig().build(policy, 0).update(anchor, torch.Generator().manual_seed(0))
    assert any("action_head.action_decoder" in name for name in moved())
    assert all(torch.equal(values[name], p) for name, p in policy.value_head.named_parameters())


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


def test_a_tokenizer_comes_from_a_local_folder(tmp_path):
    import tokenizers
    import transformers

    words = {"<unk>": 0, "open": 5, "drawer": 6, "</img>": 7, "<img>": 8, "<|im_end|>": 9}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<img>", "</img>", "<|im_end|>"]})
    fast.save_pretrained(tmp_path)
    ids = prompt(load_tokenizer(str(tmp_path)), "open drawer", 1, 99, 3)
    assert [token for token in ids if token] == [9, 8, 99, 99, 99, 7, 5, 6, 9]


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
    network = policy.to_network(actions, {})
    assert network.shape == (1, 2, 32)
    torch.testing.assert_close(network[0, :, :3], torch.tensor([[0.3, -0.75, -0.5], [-1.0, 1.0, 1.0]]))
    assert (network[..., 3:] == 0).all()
    torch.testing.assert_close(policy.to_simulator(network, {}), actions)
    assert policy.to_simulator(10 * network, {}).abs().max() == 2


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

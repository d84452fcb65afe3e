"""The OpenVLA policies at toy size: the contract, settings, checkpoint folders and their errors. The numbers of the
original code are in tests/parity."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from openvla_toys import (
    ACTION,
    OBSERVATION,
    SMALL,
    TEXT,
    TINY,
    VISION,
    autoregressive,
    parallel,
    regression,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies import check
from embodied_rl.policies.check import synthesise
from embodied_rl.policies.openvla.architecture import SIZES
from embodied_rl.policies.openvla.checkpoint import exported_weights
from embodied_rl.policies.openvla.config import OpenVLAConfig, OpenVLAOFTConfig
from embodied_rl.policies.openvla.network import OpenVLANetwork
from embodied_rl.policies.openvla.tokens import TokenDistribution, choose
from embodied_rl.randomness import RowNoise
from embodied_rl.registry import policies
from embodied_rl.specs import ActionSpec, ObservationSpec, connect
from embodied_rl.types import Trajectory


def inputs_of(policy):
    return policy.prepare(synthesise(policy.observation_spec))


def noise(rows=6):
    return RowNoise(0, np.arange(rows), np.zeros(rows, np.int64))


POLICIES = {
    "autoregressive": autoregressive,
    "autoregressive, full vocabulary, top k": lambda: autoregressive(vocabulary="all", temperature=1.6, top_k=5),
    "autoregressive, adapters": lambda: autoregressive(gradient_checkpointing=True, lora_rank=2),
    "parallel": parallel,
    "parallel, two cameras, state, one executed action": lambda: parallel(
        sizes={"proprio_dim": 4}, stop_token=False, chunk=1, top_k=4, cameras=("primary", "wrist")
    ),
    "regression, FiLM": regression,
}


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_the_contract(make):
    check(make())


@pytest.mark.parametrize("make", [autoregressive, parallel])
def test_the_contract_in_bfloat16(make):
    check(make(dtype="bfloat16"), tolerance=2e-2)


def test_both_are_registered():
    assert policies.load("openvla") is OpenVLAConfig
    assert policies.load("openvla_oft") is OpenVLAOFTConfig


@pytest.mark.parametrize("make", [autoregressive, regression])
def test_a_cast_leaves_the_rotary_frequencies_exact(make):
    exact = make().network.language_model.model.rotary_emb.inv_freq
    cast = make(dtype="bfloat16").network
    assert cast.projector.fc1.weight.dtype == torch.bfloat16
    assert torch.equal(cast.language_model.model.rotary_emb.inv_freq, exact)


# -- sizes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    """{size: {published name: shape}}, without a byte of weights."""
    shapes = {}
    for name, architecture in SIZES.items():
        with torch.device("meta"):
            network = OpenVLANetwork(architecture)
        state = {key.replace(".gamma", ".scale_factor"): value.shape for key, value in network.state_dict().items()}
        shapes[name] = {key: tuple(shape) for key, shape in state.items()}
    return shapes


def test_the_published_network_has_its_number_of_parameters(published):
    shapes = published["openvla-7b"]
    assert 2 * sum(int(np.prod(shape)) for shape in shapes.values()) == 15_082_474_368  # bytes in bfloat16
    assert shapes["language_model.lm_head.weight"] == (32064, 4096)
    assert shapes["language_model.model.layers.31.mlp.down_proj.weight"] == (4096, 11008)
    assert shapes["projector.fc1.weight"] == (8704, 2176)
    assert shapes["vision_backbone.featurizer.pos_embed"] == (1, 256, 1024)
    assert shapes["vision_backbone.featurizer.blocks.23.ls2.scale_factor"] == (1024,)
    assert shapes["vision_backbone.fused_featurizer.attn_pool.latent"] == (1, 1, 1152)
    assert shapes["vision_backbone.fused_featurizer.blocks.26.mlp.fc1.weight"] == (4304, 1152)


def test_the_published_network_has_the_keys_of_the_reference_with_more_layers(published):
    with safe_open(
        Path(__file__).parents[1] / "fixtures/parity/openvla/ar_fp32_vocab704/model.safetensors", "np"
    ) as reference:
        templates = {re.sub(r"(blocks|layers)\.\d+\.", r"\1.{}.", key) for key in reference.keys()}  # noqa: SIM118
    depth = {"vision_backbone.featurizer": 24, "vision_backbone.fused_featurizer": 27, "language_model.model": 32}

    def layers(template: str) -> int:
        return (
            next(count for part, count in depth.items() if template.startswith(part + ".")) if "{}" in template else 1
        )

    expected = {template.format(i) for template in templates for i in range(layers(template))}
    assert published["openvla-7b"].keys() == expected


def test_parallel_decoding_adds_its_parts(published):
    base = published["openvla-7b"]
    assert published["openvla-oft-7b-discrete"] == base
    libero, aloha = published["openvla-oft-7b-libero"], published["openvla-oft-7b-aloha"]
    assert base.items() <= libero.items()
    assert libero["action_head.model.fc1.weight"] == (4096, 7 * 4096)
    assert libero["proprio_projector.fc1.weight"] == (4096, 8)
    assert aloha["vision_backbone.featurizer.blocks.0.scale.weight"] == (1024, 4096)
    assert aloha["vision_backbone.featurizer.patch_embed.proj.lora_A.default.weight"] == (32, 3, 14, 14)
    assert aloha["action_head.model.fc2.bias"] == (14,)


# -- tokens --------------------------------------------------------------------------------------------------------


def test_drawn_tokens_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0])
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    drawn = choose(logits.expand(20_000, 4), uniform)
    shares = drawn.bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, logits.softmax(0), atol=1e-4, rtol=0)
    edges = torch.tensor([0.0, 1 - 2**-24])
    assert choose(torch.tensor([-torch.inf, 0.0, -torch.inf]).expand(2, 3), edges).tolist() == [1, 1]


def test_top_k_keeps_its_tokens_when_the_network_changes():
    logits = torch.randn(2, 3, 20)
    trace, log_prob = TokenDistribution(100, 1.3, 4).draw(logits, torch.rand(2, 3))
    likeliest = logits.topk(4).indices + 100
    assert (likeliest == trace["tokens"][..., None]).any(-1).all()
    other = TokenDistribution(100)
    torch.testing.assert_close(other.score(logits, trace)[0], log_prob)
    moved, entropy = other.score(-logits, trace)
    assert torch.isfinite(moved).all() and (entropy > 0).all()


def test_a_score_is_of_the_settings_that_acted():
    policy = autoregressive(temperature=1.6, top_k=3)
    inputs = inputs_of(policy)
    sample = policy.act(inputs, noise=noise())
    policy.config = replace(policy.config, temperature=1.0, top_k=0)
    torch.testing.assert_close(policy.evaluate_actions(inputs, sample.trace).log_prob, sample.log_prob)


def test_action_logits_are_those_of_the_full_vocabulary():
    network = parallel().network
    hidden = torch.randn(2, 32)
    whole = network.logits(hidden, actions_only=False)
    assert whole.shape == (2, 704)
    torch.testing.assert_close(network.logits(hidden, actions_only=True), whole[:, 384:640])


def test_dearer_temperature_means_more_entropy_and_tokens_stay_actions():
    policy = parallel(temperature=5.0)
    inputs = inputs_of(policy)
    sample = policy.act(inputs, noise=noise())
    assert ((sample.trace["tokens"] >= 384) & (sample.trace["tokens"] < 640)).all()
    hot = policy.evaluate_actions(inputs, sample.trace).entropy
    cold = policy.evaluate_actions(inputs, sample.trace | {"temperature": torch.full((6,), 0.1)}).entropy
    assert (hot > cold).all()


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [autoregressive, regression])
def test_recomputing_activations_changes_no_gradient(make):
    gradients = []
    for on in (False, True):
        policy = make(gradient_checkpointing=on)
        policy.train()
        actions = torch.zeros(6, policy.horizon, 3)
        policy.imitation_loss(
            inputs_of(policy), actions, torch.ones(6, policy.horizon, dtype=torch.bool)
        ).sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("make", [autoregressive, parallel, regression])
def test_imitation_fits_actions(make):
    policy = make(frozen=("vision",))
    inputs = {name: value[:2] for name, value in inputs_of(policy).items()}
    # parallel decoding starts from equal placeholders: two layers hardly tell positions apart
    target = torch.full((2, policy.horizon, 3), 0.4)
    valid = torch.ones(2, policy.horizon, dtype=torch.bool)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        policy.imitation_loss(inputs, target, valid).mean().backward()
        optimizer.step()
    actions = policy.act(inputs, deterministic=True).actions
    torch.testing.assert_close(actions, target, atol=0.1, rtol=0)


def test_groups_freezing_and_adapters():
    policy = regression(frozen=("heads",))
    groups = policy.parameter_groups()
    assert sorted(groups) == ["heads", "language", "projector", "value", "vision"]
    assert not any(p.requires_grad for p in groups["heads"])
    adapted = autoregressive(lora_rank=2)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert all(".lora_" in name or name.startswith("value_head.") for name in trained)
    for part in ("vision_backbone", "projector", "language_model"):
        assert any(name.startswith(f"network.{part}.") for name in trained)
    assert not any("lm_head" in name for name in trained)


def one_segment(policy, inputs, decisions=3):
    samples = [policy.act(inputs, noise=RowNoise(0, np.arange(6), np.full(6, t))) for t in range(decisions)]
    trace = {name: torch.stack([sample.trace[name] for sample in samples]) for name in samples[0].trace}
    shape = (decisions, 6, policy.chunk)
    actions, log_prob, value = (
        torch.stack([getattr(sample, name) for sample in samples]) for name in ("actions", "log_prob", "value")
    )
    return Trajectory(
        inputs={name: one.expand(decisions, *one.shape) for name, one in inputs.items()},
        trace=trace,
        actions=actions,
        log_prob=log_prob,
        value=value,
        last_value=torch.zeros(6),
        final_value=torch.zeros(decisions, 6),
        reward=actions.mean(-1),
        terminated=torch.ones(shape, dtype=torch.bool) & (torch.arange(policy.chunk) == policy.chunk - 1),
        truncated=torch.zeros(shape, dtype=torch.bool),
        valid=torch.ones(shape, dtype=torch.bool),
        tickets=torch.zeros(decisions, 6, dtype=torch.int64),
        version=0,
    )


@pytest.mark.parametrize("make", [autoregressive, parallel])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_starts_at_ratio_one_and_moves_the_policy(make, dtype):
    policy = make(dtype=dtype, temperature=1.6, top_k=20, lora_rank=2, gradient_checkpointing=True)
    policy.train()
    segment = one_segment(policy, inputs_of(policy))
    config = PPOConfig(epochs=1, minibatches=1, critic_warmup=0, granularity="token", learning_rate=1e-2)
    metrics = config.build(policy, seed=0).learn(segment, torch.Generator().manual_seed(0))
    assert metrics["clip_fraction"] == 0 and abs(metrics["approx_kl"]) < 1e-4
    flat = {name: value.flatten(0, 1) for name, value in segment.trace.items()}
    inputs = {name: value.flatten(0, 1) for name, value in segment.inputs.items()}
    moved = policy.evaluate_actions(inputs, flat).log_prob - segment.log_prob.flatten(0, 1)
    assert moved.abs().max() > 0.01


def test_without_a_value_head_there_is_no_value():
    policy = parallel(value_head=False)
    inputs = inputs_of(policy)
    assert policy.act(inputs).value is None
    with pytest.raises(TypeError, match="value_head"):
        policy.value(inputs)


@pytest.mark.parametrize("normalization", ["bounds_q99", "bounds"])
def test_random_weights_fit_the_simulator_and_the_demonstrations(normalization, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", replace(TINY, proprio_dim=9, regression=True))
    seen, action = replace(OBSERVATION, state=6), ActionSpec((-2.0, 0.0), (2.0, 5.0), (0.0, 0.0))
    config = OpenVLAOFTConfig(**SMALL, size="tiny", horizon=2, normalization=normalization)
    policy = config.build(seen, action)
    assert (policy.observation_spec.state, policy.architecture.action_dim) == (6, 2)
    ends = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    torch.testing.assert_close(policy.to_simulator(ends), torch.tensor([[-2.0, 0.0], [2.0, 5.0]]))
    mean, std = np.arange(6.0), np.array([1.0, 2.0, 3.0, 1.0, 1.0, 0.0])
    policy.set_statistics(mean, std)
    reach = {"bounds_q99": 2.3263, "bounds": 3.0}[normalization] * np.array([1.0, 2.0, 3.0, 1.0, 1.0, 1.0])
    for at in (-1.0, 0.5, 0.0, 1.0, 2.0):
        normalised = policy.state_normaliser.normalise(torch.from_numpy(mean + at * reach))
        torch.testing.assert_close(normalised, torch.full((6,), at).double().clamp(-1, 1), atol=1e-7, rtol=0)


def test_without_a_state_there_are_no_statistics_of_it(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", TINY)
    policy = OpenVLAConfig(**SMALL, size="tiny").build(OBSERVATION, ACTION)
    policy.set_statistics(np.zeros(4), np.ones(4))
    assert policy.observation_spec.state == 0


# -- checkpoint folders --------------------------------------------------------------------------------------------

STATISTICS = {
    "q01": [-0.5, -0.2, 0.0],
    "q99": [0.5, 0.6, 1.0],
    "mask": [True, True, False],
}


def write_tokenizer(folder):
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "In": 3, "robot": 4, "cube": 5}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder of OpenVLA at toy size."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = {
        "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "use_fused_vision_backbone": True,
        "timm_model_ids": list(TINY.vision),
        "timm_model_kwargs": [VISION, VISION],
        "image_sizes": [28, 28],
        "text_config": TEXT,
        "pad_to_multiple_of": 64,
        "torch_dtype": "bfloat16",
        "norm_stats": {"bridge_orig": {"action": STATISTICS}, "libero_goal_no_noops": {"action": STATISTICS}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    processor = {
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_resize_params": [{"size": [28, 28], "interpolation": 3}] * 2,
        "tvf_crop_params": [{"output_size": [28, 28]}] * 2,
        "tvf_normalize_params": [{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}] * 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    torch.manual_seed(0)
    save_file(exported_weights(OpenVLANetwork(TINY), torch.bfloat16), folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def load(folder, **settings):
    settings = {"checkpoint": str(folder), "unnorm_key": "libero_goal", **SMALL, **settings}
    return OpenVLAConfig(**settings).build(OBSERVATION, ACTION)


def test_a_loaded_network_has_its_rotary_frequencies(folder):
    exact = autoregressive().network.language_model.model.rotary_emb.inv_freq
    assert torch.equal(load(folder, dtype="bfloat16").network.language_model.model.rotary_emb.inv_freq, exact)


def test_a_folder_gives_a_policy_with_its_own_tokenizer_and_statistics(folder):
    policy = load(folder)
    check(policy)
    prompt = inputs_of(policy)["prompt"][0]
    assert prompt[-1] == 300 and prompt[0] == 640 and 5 in prompt and 4 in prompt
    actions = policy.act(inputs_of(policy), noise=noise()).actions
    assert (actions[..., 0].abs() <= 0.5).all() and (actions[..., 1] >= -0.2).all()


def test_the_unscaled_gripper_is_open_or_closed_in_the_simulators_convention(folder):
    policy = load(folder)
    actions = policy.act(inputs_of(policy), noise=noise()).actions
    assert set(actions[..., 2].unique().tolist()) <= {0.0, 1.0}
    connection = connect(OBSERVATION, ACTION, policy.observation_spec, policy.action_spec)
    assert "flip gripper" in connection.names
    opened = connection.action(np.array([[0.3, -0.2, 1.0], [0.3, -0.2, 0.0]], np.float32))
    np.testing.assert_allclose(opened, [[0.3, -0.2, -1.0], [0.3, -0.2, 1.0]])


def test_adapters_are_merged_on_export_into_the_layout_that_was_loaded(folder, tmp_path):
    policy = load(folder, lora_rank=2)
    for name, parameter in policy.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    policy.save_pretrained(tmp_path / "saved")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "saved"))
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    again = load(tmp_path / "saved")
    inputs = inputs_of(policy)
    torch.testing.assert_close(again.features(inputs), policy.features(inputs), atol=2e-2, rtol=2e-2)
    assert not torch.allclose(load(folder).features(inputs), policy.features(inputs), atol=2e-2, rtol=2e-2)


def test_a_saved_value_head_comes_back(folder, tmp_path):
    policy = load(folder)
    assert not (folder / "heads.safetensors").exists()
    inputs = inputs_of(policy)
    policy.save_pretrained(tmp_path / "saved")
    torch.manual_seed(1)
    again, without = load(tmp_path / "saved"), load(tmp_path / "saved", value_head=False)
    torch.testing.assert_close(again.value(inputs), policy.value(inputs))
    assert without.value_head is None
    again.save_pretrained(tmp_path / "twice")
    torch.testing.assert_close(load(tmp_path / "twice").value(inputs), policy.value(inputs))


def drop_key(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["projector.fc2.bias"]
    save_file(weights, folder / "model.safetensors")


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled_part(folder):
    torch.save({"module.model.fc2.bias": ACTION}, folder / "action_head--1_checkpoint.pt")


DAMAGES = {
    "a missing key": (drop_key, "projector.fc2.bias"),
    "a truncated file": (truncate, "truncated or damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "another family": (lambda folder: edit(folder / "config.json", model_type="llava"), "model_type is 'llava'"),
    "half a configuration": (lambda folder: (folder / "config.json").write_text("{}"), "image_sizes"),
    "another size": (lambda folder: edit(folder / "config.json", image_sizes=[42, 42]), "42"),
    "no processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
    "no tokenizer": (lambda folder: [f.unlink() for f in folder.glob("token*")], "tokenizer"),
    "a part that runs code": (pickled_part, "more than tensors"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_statistics_must_be_chosen_and_complete(folder):
    with pytest.raises(UserError, match=r"unnorm_key to one of bridge_orig, libero_goal_no_noops"):
        load(folder, unnorm_key=None)
    with pytest.raises(UserError, match="statistics 'libero_10'"):
        load(folder, unnorm_key="libero_10")
    (folder / "dataset_statistics.json").write_text(json.dumps({"mine": {"action": {"q01": [0.0] * 3}}}))
    with pytest.raises(UserError, match=r"dataset_statistics.json.*'q99'"):
        load(folder, unnorm_key=None)


def test_what_cannot_be_served_is_refused(folder):
    with pytest.raises(SpecError, match="camera 'primary'"):
        OpenVLAConfig(checkpoint=str(folder), unnorm_key="libero_goal").build(ObservationSpec(state=4), ACTION)
    with pytest.raises(SpecError, match="3 dimensions, not 2"):
        OpenVLAConfig(checkpoint=str(folder), unnorm_key="libero_goal").build(
            OBSERVATION, ActionSpec((-1.0,) * 2, (1.0,) * 2, (0.0,) * 2)
        )
    with pytest.raises(UserError, match="prompt_length"):
        inputs_of(load(folder, prompt_length=5))
    with pytest.raises(UserError, match="another folder"):
        load(folder).save_pretrained(folder)
    with pytest.raises(UserError, match="use policy openvla_oft"):
        OpenVLAConfig(size="openvla-oft-7b-libero").build(OBSERVATION, ACTION)
    with pytest.raises(UserError, match="random weights"):
        autoregressive().save_pretrained(folder / "new")


def test_settings_that_make_no_sense_are_refused():
    for settings, message in (
        ({"size": "openvla-8b"}, "openvla-7b"),
        ({"frozen": ("visoin",)}, "vision"),
        ({"temperature": 0.0}, "temperature"),
        ({"cameras": ()}, "camera"),
    ):
        with pytest.raises(UserError, match=message):
            OpenVLAConfig(**settings)
    with pytest.raises(UserError, match="chunk"):
        OpenVLAOFTConfig(horizon=4, chunk=5)

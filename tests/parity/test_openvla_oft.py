"""OpenVLA-OFT, number by number against the original code (fixtures `openvla_oft`)."""

import numpy as np
import pytest
import torch
from openvla_case import PARITY, Case, close, require, same_weights
from safetensors.torch import load_file

from embodied_rl.policies.openvla.parallel import RegressionPolicy, parallel_hidden
from embodied_rl.policies.openvla.preprocessing import center_crop, jpeg_round_trip, lanczos_resize
from embodied_rl.policies.openvla.tokens import decode
from embodied_rl.policies.pretrained import read_weights

require()
DISCRETE = ["openvla_oft/discrete_bf16_vocab32064_8x7", "openvla_oft/discrete_fp32_vocab704_5x7_2img_proprio"]
SHARDED = "openvla_oft/l1_bf16_vocab32064_8x7_2img_proprio"
FILM = "openvla_oft/l1_film_fp32_vocab704_6x14_3img_proprio"
STOP = {True: "", False: "_no_stop"}


@pytest.fixture(scope="module", params=DISCRETE)
def discrete(request) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module", params=[SHARDED, FILM])
def regression(request) -> Case:
    return Case(request.param)


@torch.no_grad()
def check_vision_and_state(case, instruction=None, atol=1e-4):
    close(case.policy.network.patch_features(case.pixels, instruction), case.expected["patch_features"], atol)
    close(case.policy.network.see(case.pixels, instruction), case.expected["projected_patches"], atol)
    if "proprio_raw" in case.inputs:
        state = case.policy.state_normaliser.normalise(case.inputs["proprio_raw"])
        close(state, case.expected["proprio_normalized"], 1e-6)
        close(case.policy.network.proprio_projector(state.float()), case.expected["proprio_token"])


def test_vision_and_state_of_discrete_checkpoints(discrete):
    check_vision_and_state(discrete)


@torch.no_grad()
def test_vision_and_state_of_regression_checkpoints(regression):
    network = regression.policy.network
    if not network.architecture.film:
        return check_vision_and_state(regression)
    close(
        regression.policy.prefix(regression.policy_inputs(), stop_token=True)[0][:, 1:28],
        regression.expected["projected_patches"],
        2e-4,
    )
    counted = regression.inputs["input_ids"] * regression.inputs["attention_mask"]
    text = [torch.cat([ids[ids != 0], torch.tensor([2])]) for ids in counted]
    instruction = torch.stack([network.embed(ids).mean(0) for ids in text])
    check_vision_and_state(regression, instruction, 2e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("stop_token", [True, False])
@pytest.mark.parametrize("length", [30, 40])
def test_logits_with_and_without_the_stop_token(name, stop_token, length):
    case, suffix = Case(name, stop_token=stop_token, vocabulary="all"), STOP[stop_token]
    inputs, expected = case.policy_inputs(length), case.expected
    hidden = parallel_hidden(case.policy, inputs)
    logits = case.policy.logits(hidden)
    close(case.action_ids(logits), expected["action_logits" + suffix])
    close(logits.logsumexp(-1), expected["logsumexp_full" + suffix])
    assert torch.equal(logits.argmax(-1), expected["greedy_tokens" + suffix].flatten(1))
    close(case.policy.value(inputs), expected["value" + suffix][:, 0])
    if stop_token:
        close(hidden, expected["actions_hidden"])


def test_greedy_actions(discrete):
    sample = discrete.policy.act(discrete.policy_inputs(), deterministic=True)
    close(sample.actions, discrete.expected["actions"], 1e-6)
    close(sample.value, discrete.expected["value"][:, 0])
    normalised = decode(discrete.expected["greedy_tokens"], discrete.meta["vocab_size"])
    assert torch.equal(normalised, discrete.expected["actions_normalized"])
    unnormalise = discrete.policy.action_normaliser.unnormalise
    close(unnormalise(normalised), discrete.expected["actions"], 1e-15)
    sampled = decode(discrete.inputs["sampled_action_tokens"], discrete.meta["vocab_size"])
    close(unnormalise(sampled), discrete.expected["sampled_actions"], 1e-15)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_log_probs_and_entropies(discrete, temperature):
    suffix = "" if temperature == 1.0 else "_t1p6"
    score = discrete.policy.evaluate_actions(discrete.policy_inputs(), discrete.trace(temperature))
    close(score.log_prob, discrete.expected["sampled_logprob_256" + suffix])
    close(score.entropy, discrete.expected["sampled_entropy_256" + suffix])


@torch.no_grad()
def test_log_probs_without_the_stop_token():
    for name in DISCRETE:
        case = Case(name, stop_token=False)
        score = case.policy.evaluate_actions(case.policy_inputs(), case.trace(1.6))
        close(score.log_prob, case.expected["sampled_logprob_256_t1p6_no_stop"])


@torch.no_grad()
@pytest.mark.parametrize("length", [30, 40])
def test_regressed_actions(regression, length):
    policy, inputs = regression.policy, regression.policy_inputs(length)
    assert isinstance(policy, RegressionPolicy)
    hidden = parallel_hidden(policy, inputs)
    close(hidden, regression.expected["actions_hidden"])
    close(policy.network.action_head(hidden), regression.expected["actions_normalized"])
    close(policy.act(inputs).actions, regression.expected["actions"])
    close(policy.sample(inputs), regression.expected["actions"])
    exact = policy.action_normaliser.unnormalise(regression.expected["actions_normalized"])
    close(exact, regression.expected["actions"], 1e-7)  # the reference un-normalises in float32 here and there


@pytest.mark.parametrize("name", [*DISCRETE, SHARDED, FILM])
def test_a_saved_checkpoint_is_the_loaded_one(name, tmp_path):
    case, saved = Case(name), tmp_path / "saved"
    case.policy.save_pretrained(saved)
    # a FiLM checkpoint's own file replaces the vision weights among the others
    same_weights(case.folder, saved, but="vision_backbone." if name == FILM else "nothing")
    parts = sorted(path.stem for path in case.folder.glob("*--150_checkpoint.safetensors"))
    assert parts == sorted(path.stem for path in saved.glob("*--150_checkpoint.safetensors"))
    for part in parts:
        same_weights(case.folder, saved, part)


def test_parts_are_read_from_torch_files_too(tmp_path):
    source = PARITY / SHARDED
    for file in source.iterdir():
        if "--150_checkpoint" in file.name:
            torch.save(load_file(file), tmp_path / file.with_suffix(".pt").name)
        else:
            (tmp_path / file.name).symlink_to(file)
    case = Case(SHARDED, checkpoint=str(tmp_path))
    close(case.policy.act(case.policy_inputs()).actions, case.expected["actions"])
    case.policy.save_pretrained(tmp_path / "saved")
    for part in ("action_head", "proprio_projector"):
        saved = torch.load(tmp_path / "saved" / f"{part}--150_checkpoint.pt", weights_only=True)  # noqa: TID251
        before = read_weights(source, f"{part}--150_checkpoint")
        assert saved.keys() == before.keys()
        assert all(torch.equal(saved[key], before[key]) and saved[key].dtype == before[key].dtype for key in saved)


def levels(actual, expected):
    difference = np.abs(actual.astype(int) - expected.numpy().astype(int))
    return difference.max(), (difference > 0).mean()


def test_images_as_tensorflow_prepares_them():
    folder = PARITY / "openvla_oft" / "preprocess_tf"
    images, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    for name, image in images.items():
        assert levels(center_crop(image.numpy(), 224), expected[f"{name}_center_crop"]) == (0, 0)
    image = images["img_256x256"].numpy()
    most, share = levels(lanczos_resize(image, 224), expected["img_256x256_resize"])
    assert most <= 1 and share < 1e-3
    seen = lanczos_resize(jpeg_round_trip(image), 224)  # another JPEG library: up to 7 levels
    assert levels(seen, expected["img_256x256_jpeg_resize"])[0] <= 7
    assert levels(center_crop(seen, 224), expected["img_256x256_jpeg_resize_center_crop"])[0] <= 7

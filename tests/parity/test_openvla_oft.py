"""OpenVLA-OFT, number by number against the original code (fixtures `openvla_oft`)."""

import numpy as np
import pytest
import torch
from cases import cases, read
from openvla_case import Case, close, same_weights
from safetensors.torch import load_file

from embodied_rl.policies.openvla.parallel import RegressionPolicy, parallel_hidden
from embodied_rl.policies.openvla.preprocessing import center_crop, jpeg_round_trip, lanczos_resize
from embodied_rl.policies.openvla.tokens import decode
from embodied_rl.policies.pretrained import read_weights

DISCRETE, REGRESSION = cases("openvla_oft_discrete"), cases("openvla_oft_l1")
PARTS = "*--*_checkpoint.safetensors"
STOP = {True: "", False: "_no_stop"}


@pytest.fixture(scope="module", params=DISCRETE)
def discrete(request) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module", params=REGRESSION)
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
    patches = regression.expected["projected_patches"]
    prefix = regression.policy.prefix(regression.policy_inputs(), stop_token=True)[0]
    close(prefix[:, 1 : 1 + patches.shape[1]], patches, 2e-4)
    stop = torch.tensor([regression.meta["stop_token_id"]])
    rows = zip(regression.inputs["input_ids"], regression.inputs["attention_mask"].bool(), strict=True)
    text = [torch.cat([ids[valid], stop]) for ids, valid in rows]
    instruction = torch.stack([network.embed(ids).mean(0) for ids in text])
    check_vision_and_state(regression, instruction, 2e-4)


@torch.no_grad()
@pytest.mark.parametrize("folder", DISCRETE)
@pytest.mark.parametrize("stop_token", [True, False])
@pytest.mark.parametrize("spare", [10, 0])
def test_logits_with_and_without_the_stop_token(folder, stop_token, spare):
    case, suffix = Case(folder, stop_token=stop_token, vocabulary="all"), STOP[stop_token]
    inputs, expected = case.policy_inputs(spare), case.expected
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
    close(sample.actions, discrete.expected["actions"], 1e-6, 1e-6)
    close(sample.value, discrete.expected["value"][:, 0])
    normalised = decode(discrete.expected["greedy_tokens"], discrete.meta["vocab_size"])
    assert torch.equal(normalised, discrete.expected["actions_normalized"])
    unnormalise = discrete.policy.action_normaliser.unnormalise
    close(unnormalise(normalised), discrete.expected["actions"], 1e-14, 1e-14)
    sampled = decode(discrete.inputs["sampled_action_tokens"], discrete.meta["vocab_size"])
    close(unnormalise(sampled), discrete.expected["sampled_actions"], 1e-14, 1e-14)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_log_probs_and_entropies(discrete, temperature):
    suffix = "" if temperature == 1.0 else "_t1p6"
    score = discrete.policy.evaluate_actions(discrete.policy_inputs(), discrete.trace(temperature))
    close(score.log_prob, discrete.expected["sampled_logprob_256" + suffix])
    close(score.entropy, discrete.expected["sampled_entropy_256" + suffix])


@torch.no_grad()
@pytest.mark.parametrize("folder", DISCRETE)
def test_log_probs_without_the_stop_token(folder):
    case = Case(folder, stop_token=False)
    score = case.policy.evaluate_actions(case.policy_inputs(), case.trace(1.6))
    close(score.log_prob, case.expected["sampled_logprob_256_t1p6_no_stop"])


@torch.no_grad()
@pytest.mark.parametrize("spare", [10, 0])
def test_regressed_actions(regression, spare):
    policy, inputs = regression.policy, regression.policy_inputs(spare)
    assert isinstance(policy, RegressionPolicy)
    hidden = parallel_hidden(policy, inputs)
    close(hidden, regression.expected["actions_hidden"])
    close(policy.network.action_head(hidden), regression.expected["actions_normalized"])
    close(policy.act(inputs).actions, regression.expected["actions"])
    close(policy.sample(inputs), regression.expected["actions"])
    exact = policy.action_normaliser.unnormalise(regression.expected["actions_normalized"])
    close(exact, regression.expected["actions"], 1e-7, 1e-6)  # the reference un-normalises in float32 here and there


@pytest.mark.parametrize("folder", [*DISCRETE, *REGRESSION])
def test_a_saved_checkpoint_is_the_loaded_one(folder, tmp_path):
    case, saved = Case(folder), tmp_path / "saved"
    case.policy.save_pretrained(saved)
    # a FiLM checkpoint's own file replaces the vision weights among the others
    same_weights(case.folder, saved, but="vision_backbone." if case.meta["use_film"] else "nothing")
    parts = sorted(path.stem for path in case.folder.glob(PARTS))
    assert parts == sorted(path.stem for path in saved.glob(PARTS))
    for part in parts:
        same_weights(case.folder, saved, part)


@pytest.mark.parametrize("folder", REGRESSION)
def test_parts_are_read_from_torch_files_too(folder, tmp_path):
    parts = list(folder.glob(PARTS))
    for file in folder.iterdir():
        if file in parts:
            torch.save(load_file(file), tmp_path / file.with_suffix(".pt").name)
        else:
            (tmp_path / file.name).symlink_to(file)
    case = Case(folder, checkpoint=str(tmp_path))
    close(case.policy.act(case.policy_inputs()).actions, case.expected["actions"])
    case.policy.save_pretrained(tmp_path / "saved")
    for part in parts:
        saved = torch.load(tmp_path / "saved" / f"{part.stem}.pt", weights_only=True)  # noqa: TID251
        before = read_weights(folder, part.stem)
        assert saved.keys() == before.keys()
        assert all(torch.equal(saved[key], before[key]) and saved[key].dtype == before[key].dtype for key in saved)


def levels(actual, expected):
    difference = np.abs(actual.astype(int) - expected.numpy().astype(int))
    return difference.max(), (difference > 0).mean()


@pytest.mark.parametrize("folder", cases("openvla_oft_preprocess"))
def test_images_as_tensorflow_prepares_them(folder):
    meta, images = read(folder / "meta.json"), load_file(folder / "inputs.safetensors")
    expected, size = load_file(folder / "expected.safetensors"), meta["output_size"]
    assert expected.keys() == set(meta["tensors"]) and images
    for key, wanted in expected.items():
        name, does = next((name, key.removeprefix(f"{name}_")) for name in images if key.startswith(f"{name}_"))
        image, most = images[name].numpy(), 1
        if does.startswith("jpeg_"):
            image, most, does = jpeg_round_trip(image), 7, does.removeprefix("jpeg_")  # by another JPEG library
        if does.startswith("resize"):
            image = lanczos_resize(image, size)
        if does.endswith("center_crop"):
            image = center_crop(image, size, meta["crop_scale"])
        largest, share = levels(image, wanted)
        assert largest <= most, key
        if most == 1:
            assert share < (1e-3 if does == "resize" else 1e-4), key

"""OpenVLA, number by number against the original code (fixtures `openvla`)."""

import numpy as np
import pytest
import torch
from cases import cases, folders, read
from openvla_case import Case, close, same_weights
from torch.nn import functional as F

from embodied_rl.policies.openvla.preprocessing import ImageProcessor
from embodied_rl.policies.openvla.prompts import TEMPLATES, Prompts
from embodied_rl.policies.openvla.tokens import decode, encode

CASES = cases("openvla_ar")


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return Case(request.param, vocabulary="all")


@torch.no_grad()
def test_vision_features_and_projected_patches(case):
    close(case.policy.network.patch_features(case.pixels), case.expected["patch_features"])
    close(case.policy.network.see(case.pixels), case.expected["projected_patches"])


def test_greedy_decoding_with_a_static_cache(case, monkeypatch):
    steps, logits_of = [], case.policy.logits
    monkeypatch.setattr(case.policy, "logits", lambda hidden: steps.append(logits_of(hidden)) or steps[-1])
    sample = case.policy.act(case.policy_inputs(), deterministic=True)
    logits = torch.cat(steps, 1)
    assert torch.equal(logits.argmax(-1), case.expected["greedy_tokens"])
    close(case.action_ids(logits), case.expected["greedy_step_logits_action"])
    close(sample.actions[:, 0], case.expected["greedy_actions"], 1e-6, 1e-6)
    close(sample.value, case.expected["value"][:, 0])


@torch.no_grad()
@pytest.mark.parametrize("spare", [10, 0])
def test_teacher_forced_logits_whatever_the_padding(case, spare):
    hidden = case.policy.hidden(case.policy_inputs(spare), case.trace()["tokens"])
    logits = case.policy.logits(hidden)
    close(case.action_ids(logits), case.expected["sampled_logits_action"])
    close(logits.logsumexp(-1), case.expected["sampled_logsumexp_full"])
    close(hidden[:, 0], case.expected["hidden_prompt_last"])


@torch.no_grad()
def test_hidden_states_of_the_whole_sequence(case):
    network, tokens = case.policy.network, case.trace()["tokens"]
    embeddings, valid = case.policy.prefix(case.policy_inputs())
    embeddings = torch.cat([embeddings, network.embed(tokens)], 1)
    valid = F.pad(valid, (0, tokens.shape[1]), value=True)
    hidden = network.hidden(embeddings, valid, causal=True)
    for row, keep in enumerate(valid):
        length = int(keep.sum())
        close(hidden[row, keep], case.expected["hidden_last"][row, :length])
        assert (case.expected["hidden_last"][row, length:] == 0).all()
        if "logits_full" in case.expected:
            logits = network.logits(hidden[row, keep], actions_only=False)
            close(logits, case.expected["logits_full"][row, :length])


@torch.no_grad()
@pytest.mark.parametrize("folder", CASES)
def test_log_probs_over_the_action_tokens(folder):
    case = Case(folder)
    score = case.policy.evaluate_actions(case.policy_inputs(), case.trace())
    close(score.log_prob, case.expected["sampled_logprob_256"])
    close(score.entropy, case.expected["sampled_entropy_256"])
    score = case.policy.evaluate_actions(case.policy_inputs(), case.trace(temperature=1.6))
    close(score.log_prob, case.expected["sampled_logprob_256_t1p6"])


@torch.no_grad()
def test_log_probs_over_the_full_vocabulary_and_value(case):
    score = case.policy.evaluate_actions(case.policy_inputs(), case.trace())
    close(score.log_prob, case.expected["sampled_logprob_full"])
    close(score.entropy, case.expected["sampled_entropy_full"])
    close(case.policy.value(case.policy_inputs()), case.expected["value"][:, 0])


def test_action_tokens_and_their_units(case):
    vocabulary, expected = case.meta["vocab_size"], case.expected
    assert torch.equal(decode(expected["edge_token_ids"], vocabulary), expected["edge_actions_normalized"])
    assert torch.equal(encode(expected["encode_values"], vocabulary), expected["encode_token_ids"])
    normalised = decode(expected["greedy_tokens"], vocabulary)
    assert torch.equal(normalised, expected["greedy_actions_normalized"])
    close(case.policy.action_normaliser.unnormalise(normalised), expected["greedy_actions"], 1e-14, 1e-14)
    sampled = decode(case.inputs["sampled_action_tokens"], vocabulary)
    close(case.policy.action_normaliser.unnormalise(sampled), expected["sampled_actions"], 1e-14, 1e-14)


def test_image_processor_bit_by_bit(case):
    source = case.folder / "preprocessor_config.json"
    processor = ImageProcessor.from_json(read(source), str(source))
    resized = processor.resize(case.inputs["raw_image"].numpy())
    assert torch.equal(processor.normalise(torch.tensor(resized)[None]), case.expected["raw_image_pixel_values"])


RECORDS = [
    record for folder in folders("openvla_tokenization") for record in read(folder / "tokenization.json")["records"]
]
IDS = {record["prompt"]: record["input_ids"] for record in RECORDS}


def test_prompts_are_the_published_ones():
    for record in RECORDS:
        if record["template"] in TEMPLATES:
            assert TEMPLATES[record["template"]].format(record["task"].lower()) == record["prompt"]


def test_prompt_ids_end_in_the_empty_token_and_are_padded_on_the_left():
    spaced = {r["task"]: r["input_ids"] for r in RECORDS if r["template"] == "openvla_trailing_space"}
    length = max(map(len, spaced.values())) + 5
    prompts = Prompts(IDS.__getitem__, "openvla", length, 32000, 29871)
    for task, wanted in spaced.items():
        row = prompts([task])[0]
        assert row[length - len(wanted) + 1 :].tolist() == wanted[1:]
        assert (row[: length - len(wanted) + 1] == 32000).all()


def test_prompt_ids_of_the_cases_whose_instructions_are_known(case):
    tasks = case.meta["task_descriptions"]
    if None not in tasks:  # the others' ids are random
        case.policy.prompts.tokenize = IDS.__getitem__
        assert np.array_equal(case.policy.prompts(tasks), case.policy_inputs()["prompt"].numpy())


@pytest.mark.parametrize("folder", CASES)
def test_a_saved_checkpoint_is_the_loaded_one(folder, tmp_path):
    Case(folder).policy.save_pretrained(tmp_path / "saved")
    same_weights(folder, tmp_path / "saved")

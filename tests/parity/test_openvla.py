"""OpenVLA, number by number against the original code (fixtures `openvla`)."""

import json

import numpy as np
import pytest
import torch
from openvla_case import PARITY, Case, close, require, same_weights
from torch.nn import functional as F

from embodied_rl.policies.openvla.preprocessing import ImageProcessor
from embodied_rl.policies.openvla.prompts import TEMPLATES, Prompts
from embodied_rl.policies.openvla.tokens import decode, encode

require()
CASES = ["openvla/ar_bf16_vocab32064", "openvla/ar_fp32_vocab704"]


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
    close(sample.actions[:, 0], case.expected["greedy_actions"], 1e-6)
    close(sample.value, case.expected["value"][:, 0])


@torch.no_grad()
@pytest.mark.parametrize("length", [30, 40])
def test_teacher_forced_logits_whatever_the_padding(case, length):
    hidden = case.policy.hidden(case.policy_inputs(length), case.trace()["tokens"])
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
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_log_probs_over_the_action_tokens(temperature):
    for name in CASES:
        case = Case(name)
        score = case.policy.evaluate_actions(case.policy_inputs(), case.trace(temperature))
        suffix = "" if temperature == 1.0 else "_t1p6"
        close(score.log_prob, case.expected["sampled_logprob_256" + suffix])
        if temperature == 1.0:
            close(score.entropy, case.expected["sampled_entropy_256"])


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
    close(case.policy.action_normaliser.unnormalise(normalised), expected["greedy_actions"], 1e-15)
    sampled = decode(case.inputs["sampled_action_tokens"], vocabulary)
    close(case.policy.action_normaliser.unnormalise(sampled), expected["sampled_actions"], 1e-15)


def test_image_processor_bit_by_bit(case):
    source = case.folder / "preprocessor_config.json"
    processor = ImageProcessor.from_json(json.loads(source.read_text()), str(source))
    resized = processor.resize(case.inputs["raw_image"].numpy())
    assert torch.equal(processor.normalise(torch.tensor(resized)[None]), case.expected["raw_image_pixel_values"])


RECORDS = json.loads((PARITY / "openvla" / "tokenization.json").read_text())["records"]


def test_prompts_are_the_published_ones():
    for record in RECORDS:
        if record["template"] in TEMPLATES:
            assert TEMPLATES[record["template"]].format(record["task"].lower()) == record["prompt"]


def test_prompt_ids_end_in_the_empty_token_and_are_padded_on_the_left():
    ids = {record["prompt"]: record["input_ids"] for record in RECORDS}
    prompts = Prompts(ids.__getitem__, "openvla", 40, 32000, 29871)
    spaced = {r["task"]: r["input_ids"] for r in RECORDS if r["template"] == "openvla_trailing_space"}
    for task, wanted in spaced.items():
        row = prompts([task])[0]
        assert row[40 - len(wanted) + 1 :].tolist() == wanted[1:]
        assert (row[: 40 - len(wanted) + 1] == 32000).all()


def test_prompt_ids_of_the_fixture():
    case = Case(CASES[0])
    ids = {record["prompt"]: record["input_ids"] for record in RECORDS}
    case.policy.prompts.tokenize = ids.__getitem__
    prompt = case.policy.prompts(case.meta["task_descriptions"])
    assert np.array_equal(prompt, case.policy_inputs()["prompt"].numpy())


@pytest.mark.parametrize("name", CASES)
def test_a_saved_checkpoint_is_the_loaded_one(name, tmp_path):
    Case(name).policy.save_pretrained(tmp_path / "saved")
    same_weights(Case(name).folder, tmp_path / "saved")

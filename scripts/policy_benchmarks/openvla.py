"""OpenVLA against transformers' `generate`, and both OpenVLAs' updates against the logits of the whole vocabulary at
all positions. The vision part is the same on both sides and small, so that the language model is what is compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from policy_benchmarks.measuring import Bench
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from embodied_rl.policies.check import synthesise
from embodied_rl.policies.openvla.architecture import SIZES, Architecture
from embodied_rl.policies.openvla.autoregressive import AutoregressivePolicy
from embodied_rl.policies.openvla.config import OpenVLAConfig, OpenVLAOFTConfig
from embodied_rl.policies.openvla.lean_llama import LeanLastLayer, LeanMLP, LeanRMSNorm, make_lean
from embodied_rl.policies.openvla.parallel import ParallelPolicy
from embodied_rl.policies.openvla.tokens import ACTION_TOKENS
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec

DIM, HORIZON = 7, 8
SEEN = ObservationSpec(cameras={"primary": CameraSpec(224, 224)})
ACTION = ActionSpec((-1.0,) * DIM, (1.0,) * DIM, (0.0,) * DIM)
SETTINGS: dict[str, Any] = {
    "frozen": ("vision", "projector"),
    "value_head": False,
    "vocabulary": "all",
    "prompt_length": 80,
    "empty_token": 300,
}
TRAINED = {"": 0, "_lora": 16}
"""What the updates train, as part of the key, and the rank of its adapters: all weights of the language model, or
adapters as in published recipes."""

USUAL = {LeanRMSNorm: LlamaRMSNorm, LeanMLP: LlamaMLP, LeanLastLayer: LlamaDecoderLayer}


def architecture(scale: str) -> Architecture:
    """Of the language model: width 1024, 16 layers, 32064 tokens, behind 256 image tokens; a toy; or OpenVLA-7B."""
    if scale == "published":
        return SIZES["openvla-7b"]
    width, depth, vocabulary, image = (1024, 16, 32064, 224) if scale == "laptop" else (64, 2, 1088, 56)
    text = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 8 * width // 3,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": vocabulary,
        "pad_token_id": vocabulary - 64,
    }
    vision = {"depth": 2, "embed_dim": 64, "num_heads": 2}
    return Architecture(vision_options=(vision, vision), image_size=image, text=text)


def openvla(bench: Bench, scale: str) -> None:
    """One row acts; one row is scored."""
    _act(bench, scale)
    for kind, rank in TRAINED.items():
        _update_tokens(bench, scale, kind, rank)


def _update_tokens(bench: Bench, scale: str, kind: str, rank: int) -> None:
    torch.manual_seed(0)
    config = OpenVLAConfig(dtype=bench.precision, lora_rank=rank, **SETTINGS)
    policy = AutoregressivePolicy(config, architecture(scale), None, SEEN, ACTION).to(bench.device)
    inputs = _inputs(policy)
    trace = policy.act(inputs).trace

    def full() -> Tensor:
        embeddings, valid = _compact(policy, inputs)
        tokens = trace["tokens"]
        embeddings = torch.cat([embeddings, policy.network.embed(tokens[:, :-1])], 1)
        valid = F.pad(valid, (0, DIM - 1), value=True)
        with _usual(policy) as language:
            logits = language(inputs_embeds=embeddings, attention_mask=valid).logits
        return _learn(*_score_everywhere(logits, tokens, len(valid[0]) - DIM))

    bench.compare(f"openvla{kind}_update_vs_full", lambda: _update(policy, inputs, trace), full, 1e-3)


def _act(bench: Bench, scale: str) -> None:
    torch.manual_seed(0)
    config = OpenVLAConfig(dtype=bench.precision, **SETTINGS)
    policy = AutoregressivePolicy(config, architecture(scale), None, SEEN, ACTION).to(bench.device)
    _prefer_actions(policy)
    inputs = _inputs(policy)
    pad = policy.network.pad_token
    generation = GenerationConfig(max_new_tokens=DIM, do_sample=False, use_cache=True, pad_token_id=pad)

    def generate() -> Tensor:
        with torch.no_grad(), _usual(policy) as language:
            embeddings, valid = _compact(policy, inputs)
            tokens = language.generate(inputs_embeds=embeddings, attention_mask=valid, generation_config=generation)
        return policy.actions(tokens)

    bench.compare("openvla_act_vs_generate", lambda: policy.act(inputs, True).actions, generate, 0)


def oft(bench: Bench, scale: str) -> None:
    """One row, a chunk of 8 actions."""
    for kind, rank in TRAINED.items():
        _update_chunk(bench, scale, kind, rank)


def _update_chunk(bench: Bench, scale: str, kind: str, rank: int) -> None:
    torch.manual_seed(0)
    config = OpenVLAOFTConfig(dtype=bench.precision, horizon=HORIZON, lora_rank=rank, **SETTINGS)
    sizes = replace(architecture(scale), horizon=HORIZON)
    policy = ParallelPolicy(config, sizes, None, SEEN, ACTION).to(bench.device)
    inputs = _inputs(policy)
    trace = policy.act(inputs).trace
    network, terms = policy.network, DIM * HORIZON

    def full() -> Tensor:
        embeddings, _ = _compact(policy, inputs)
        rows, length, width = embeddings.shape
        stop = network.embed(torch.full((rows, 1), 2, device=bench.device))
        embeddings = torch.cat([embeddings, embeddings.new_zeros(rows, terms, width), stop], 1)
        everything = torch.zeros(1, 1, *(embeddings.shape[1],) * 2, dtype=bench.dtype, device=bench.device)
        with _usual(policy) as language:
            logits = language(inputs_embeds=embeddings, attention_mask=everything).logits
        return _learn(*_score_everywhere(logits, trace["tokens"], length - 1))

    def ours() -> Tensor:
        return _update(policy, inputs, trace)

    bench.compare(f"oft{kind}_update_vs_full", ours, full, 1e-3)
    bench.compare_memory(f"oft{kind}_memory_vs_full", ours, full)


def _update(policy: Any, inputs: dict[str, Tensor], trace: dict[str, Tensor]) -> Tensor:
    score = policy.evaluate_actions(inputs, trace)
    return _learn(score.log_prob, score.entropy)


def _learn(log_prob: Tensor, entropy: Tensor) -> Tensor:
    """Gradients of a policy-gradient loss with an entropy bonus; they add up over calls, as over microbatches."""
    (-log_prob.mean() - 0.01 * entropy.mean()).backward()
    return torch.stack([log_prob, entropy]).detach()


def _score_everywhere(logits: Tensor, tokens: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy) [B,L] of tokens whose logits begin at `first`, computed at all positions and then picked."""
    log_probs = logits.float().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    places = slice(first, first + tokens.shape[1])
    return log_probs[:, places].gather(-1, tokens[..., None])[..., 0], entropy[:, places]


def _inputs(policy: Any) -> dict[str, Tensor]:
    return policy.prepare(synthesise(policy.observation_spec, rows=1))


def _compact(policy: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings of one row before its actions, without padding, and a mask of ones."""
    embeddings, valid = policy.prefix(inputs)
    return embeddings[:, valid[0]], valid[:, valid[0]]


@contextmanager
def _usual(policy: Any) -> Iterator[Any]:
    """The language model as transformers has it: with the attention it chooses by itself, and its own layers."""
    language = policy.network.language_model
    ours, language.config._attn_implementation = language.config._attn_implementation, "sdpa"
    for module in language.modules():
        if type(module) in USUAL:
            module.__class__ = USUAL[type(module)]
    yield language
    language.config._attn_implementation = ours
    make_lean(language.model)


def _prefer_actions(policy: Any) -> None:
    """As in a trained network the likeliest tokens are actions, so that equal actions are equal tokens."""
    weight, end = policy.network.language_model.lm_head.weight, policy.architecture.vocabulary
    with torch.no_grad():
        weight[: end - ACTION_TOKENS] = 0
        weight[end:] = 0

"""Lean layers compute what transformers' do, and keep less for the backward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from openvla_toys import TINY
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaModel, StaticCache

from embodied_rl.policies.openvla.lean_llama import make_lean
from embodied_rl.policies.openvla.network import OpenVLANetwork

EXACT = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def models(request: pytest.FixtureRequest) -> tuple[LlamaModel, LlamaModel]:
    """(transformers', lean) with equal weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    usual = LlamaModel(LlamaConfig(vocab_size=20, num_key_value_heads=2, use_cache=False, **sizes))
    for norm in (module for name, module in usual.named_modules() if name.endswith("norm")):
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    usual.to(request.param)
    lean = copy.deepcopy(usual)
    make_lean(lean)
    return usual, lean


def run(model: Any, embeddings: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any], int]:
    """(output, gradients by name and of the input, bytes kept for the backward pass)."""
    model.zero_grad()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    embeddings = embeddings.clone().requires_grad_()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(inputs_embeds=embeddings).last_hidden_state
    (output.float() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return output.detach(), gradients | {"input": embeddings.grad}, sum(kept.values())


def test_outputs_are_equal_and_gradients_agree(models: tuple[LlamaModel, LlamaModel]) -> None:
    embeddings = torch.randn(2, 7, 32, dtype=models[0].dtype)
    (usual, expected, _), (lean, gradients, _) = (run(model, embeddings) for model in models)
    assert torch.equal(lean, usual)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=scale * EXACT[usual.dtype], msg=name)


def test_frozen_weights_get_no_gradient(models: tuple[LlamaModel, LlamaModel]) -> None:
    lean = models[1].requires_grad_(False)
    _, gradients, _ = run(lean, torch.randn(1, 5, 32, dtype=lean.dtype))
    assert gradients.keys() == {"input"}
    assert gradients["input"].abs().max() > 0


def test_less_is_kept_for_the_backward_pass(models: tuple[LlamaModel, LlamaModel]) -> None:
    embeddings = torch.randn(4, 64, 32, dtype=models[0].dtype)
    (*_, usual), (*_, lean) = (run(model, embeddings) for model in models)
    activation = embeddings.nbytes
    layers, gated = 2, 96 / 32
    # The activated gate of every layer and the normalised state of every norm, the last one's included.
    assert usual - lean >= layers * gated * activation + (2 * layers + 1) * activation


@pytest.mark.parametrize(("causal", "cached"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("read", [slice(-1, None), slice(3, None), slice(2, 5), slice(0, 1), slice(None)], ids=str)
def test_the_last_layer_computes_what_is_read(causal: bool, cached: bool, padded: bool, read: slice) -> None:
    torch.manual_seed(1)
    network = OpenVLANetwork(TINY)
    embeddings, valid = torch.randn(2, 7, TINY.text["hidden_size"]), torch.ones(2, 9 if cached else 7, dtype=torch.bool)
    if padded:
        valid[0, 1:3] = False
    caches: list[Any] = [
        StaticCache(config=network.language_model.config, max_cache_len=9) if cached else None for _ in range(2)
    ]
    with torch.no_grad(), network.caching():
        everything = network.hidden(embeddings, valid, causal, cache=caches[0])
        some = network.hidden(embeddings, valid, causal, read=read, cache=caches[1])
    torch.testing.assert_close(some, everything[:, read], rtol=0, atol=1e-6)
    if cached:
        kept = [cache.layers[-1].keys for cache in caches]
        assert torch.equal(kept[0], kept[1]) and kept[0].abs().sum() > 0


def test_names_and_shapes_of_parameters_stay(models: tuple[LlamaModel, LlamaModel]) -> None:
    usual, lean = ({name: each.shape for name, each in model.state_dict().items()} for model in models)
    assert lean == usual

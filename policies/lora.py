"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft, inside any network."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from embodied_rl.errors import UserError

ADAPTER = "default"


def linear_layers(module: nn.Module) -> list[str]:
    """Names of the linear layers below `module` that are trained: what LoRA usually adapts."""
    layers = module.named_modules()
    return [name for name, layer in layers if isinstance(layer, nn.Linear) and layer.weight.requires_grad]


def add_lora(module: nn.Module, targets: Iterable[str], rank: int, alpha: float) -> None:
    """Give every layer named in `targets` (linear or convolution, full names below `module`) an adapter of `rank` and
    scale alpha / rank, in place. It starts at zero and is float32, because bfloat16 would swallow small updates;
    everything else is frozen.

    Raises `UserError` when a target does not exist or cannot be adapted, or when `rank` is not positive.
    """
    targets = list(targets)
    if rank < 1:
        raise UserError(f"LoRA: the rank must be at least 1, not {rank}")
    layers = dict(module.named_modules())
    wrong = [name for name in targets if not isinstance(layers.get(name), nn.Linear | nn.Conv2d)]
    if wrong or not targets:
        raise UserError(f"LoRA: no linear or convolution layer is called {', '.join(wrong[:3]) or 'anything given'}")
    import peft  # seconds, for those who adapt

    exactly = "|".join(map(re.escape, targets))  # a list would also match the ends of longer names
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=exactly, lora_dropout=0.0)  # type: ignore[arg-type]
    peft.inject_adapter_in_model(config, module, ADAPTER)
    for name, parameter in module.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            parameter.data = parameter.data.float()


def merged_weights(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` as if adapters never existed: adapted weights with B A alpha / rank added, under the names
    that they had before `add_lora`. The module itself stays as it is."""
    layers: dict[str, Any] = dict(module.named_modules())
    weights: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        owner, separator, parameter = key.rpartition(".base_layer.")
        if separator:
            delta = layers[owner].get_delta_weight(ADAPTER) if parameter == "weight" else 0
            weights[f"{owner}.{parameter}"] = (value + delta).detach().to(value.dtype)
        elif ".lora_A." not in key and ".lora_B." not in key:
            weights[key] = value
    return weights

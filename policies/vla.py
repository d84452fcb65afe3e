"""What every vision-language-action model shares: the folder it comes from, and which of its parameters are trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from embodied_rl.errors import UserError, unknown
from embodied_rl.policies.base import Policy


@dataclass(frozen=True)
class VLAConfig(ABC):
    """Settings of every vision-language-action model."""

    checkpoint: str = ""
    """Folder of a published or fine-tuned checkpoint; "" = random weights."""
    prompt_length: int = 64
    """Tokens that every prompt is padded to, so that all batches have one shape."""
    frozen: tuple[str, ...] = ()
    """Groups that are not trained."""
    lora_rank: int = 0
    """Train adapters of this rank in the transformers of the other groups instead of their weights; 0 = the weights."""
    lora_alpha: float = 16.0
    """The adapters' scale is alpha / rank."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    groups: ClassVar[tuple[str, ...]]
    """Of parameters, "value" among them."""

    def __post_init__(self) -> None:
        if self.lora_rank < 0 or self.prompt_length < 1:
            raise UserError(f"{self.name}: needs lora_rank >= 0 and prompt_length >= 1")
        for group in self.frozen:
            if group not in self.groups:
                raise unknown("parameter group", group, self.groups)

    @property
    @abstractmethod
    def name(self) -> str:
        """As registered."""


class VLAPolicy[Config: VLAConfig](Policy):
    """A subclass says which group a parameter belongs to and where adapters go, and calls `_choose_trained` when its
    parts are built."""

    config: Config

    @abstractmethod
    def group(self, name: str) -> str:
        """The group of the parameter `name`."""

    @abstractmethod
    def adaptable(self) -> Iterator[tuple[str, nn.Module]]:
        """(group, module) whose linear layers adapters can stand in for."""

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the groups of the configuration."""
        groups: dict[str, list[nn.Parameter]] = {group: [] for group in self.config.groups}
        for name, parameter in self.named_parameters():
            groups[self.group(name)].append(parameter)
        return groups

    def _choose_trained(self) -> None:
        config = self.config
        if config.lora_rank:
            from embodied_rl.policies.lora import add_lora, linear_layers  # peft is slow to import

            for group, module in self.adaptable():
                if group not in config.frozen:
                    add_lora(module, linear_layers(module), config.lora_rank, config.lora_alpha)
        groups = self.parameter_groups()
        for group in config.frozen:
            for parameter in groups[group]:
                parameter.requires_grad_(False)

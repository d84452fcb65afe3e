"""What the vision-language-action models that are flows share: π₀, π₀.₅ and GR00T."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies.base import Inputs, require_continuous
from embodied_rl.policies.flow import FlowSampler, bounded_std
from embodied_rl.policies.flow_policy import FlowConfig, FlowPolicy
from embodied_rl.policies.mlp import Activation, mlp
from embodied_rl.policies.normalization import Normaliser
from embodied_rl.policies.pretrained import load_heads
from embodied_rl.policies.value_head import ValueHead
from embodied_rl.policies.vla import VLAConfig, VLAPolicy
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec, pick_state
from embodied_rl.types import Array


@dataclass(frozen=True)
class FlowVLAConfig(VLAConfig, FlowConfig):
    """Settings of every flow that sees and reads."""

    tokenizer: str = ""
    """Folder of the network's tokenizer; "" = the checkpoint's. "bytes" takes UTF-8 bytes for tokens."""
    noise_hidden: tuple[int, ...] = (128, 64)
    """Widths of the noise head, which reads the layer before the velocity."""
    value_hidden: tuple[int, ...] = (1024, 512, 256)
    """Widths of the value head, which reads the mean of the vision-language model's output, and the state where that is
    not in it."""
    value_activation: Activation = "relu"
    value_trains_prefix: bool = False
    """The value's gradient reaches the vision-language model (where that is not frozen)."""
    frozen: tuple[str, ...] = ("vision", "language")
    """Groups that are not trained: vision, language, value, and expert (π₀) or heads (GR00T). While vision and language
    are frozen, they keep nothing for a backward pass."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Of the weights: the checkpoint's own, or cast; with bfloat16, π₀'s norms, embedding of patches and small
    projections stay float32, as in openpi. Sampled actions, scores and values are float32 always."""

    def __post_init__(self) -> None:
        VLAConfig.__post_init__(self)
        FlowConfig.__post_init__(self)


class FlowVLAPolicy[Config: FlowVLAConfig](FlowPolicy, VLAPolicy[Config]):
    """Network actions are the simulator's, normalised with the checkpoint's statistics and padded with zeros to D.

    A checkpoint was trained on some states, images and actions; that the simulator's mean the same is up to you. A
    subclass sets `checkpoint` and `network` and calls `_complete`.
    """

    checkpoint: Any
    """The folder it came from, None for random weights."""
    network: Any
    state_normaliser: Normaliser
    action_normaliser: Normaliser

    def __init__(
        self,
        config: Config,
        simulator: ObservationSpec,
        cameras: Iterable[str],
        action_spec: ActionSpec,
        tokenizer: Any,
        *,
        states: int,
        width: int,
        described: int,
        hidden: int,
    ) -> None:
        """For a network of at most so many `states` and actions (`width`), whose value head reads `described` numbers
        and whose noise head reads `hidden`."""
        super().__init__()
        require_continuous(action_spec)
        state, dim = pick_state(simulator, config.state), action_spec.dim
        if state.state > states or dim > width:
            raise SpecError(
                f"{config.name} takes {states} states and {width} actions at most, not {state.state} and {dim}"
            )
        views = {name: simulator.cameras[name] for name in cameras}
        self.config = config
        self.observation_spec = replace(
            state, cameras={name: CameraSpec(view.height, view.width) for name, view in views.items()}
        )
        self.action_spec = action_spec
        self.horizon, self.chunk, self.width = config.horizon, config.chunk, width
        self.sampler = FlowSampler(config.sampler(), config.chunk, dim)
        self._tokenizer = tokenizer
        self._prompts: dict[str, list[int]] = {}
        self.value_head = ValueHead(described, config.value_hidden, config.value_activation)
        learns = config.method == "noise"
        self.noise_head = mlp(hidden, config.noise_hidden, "tanh", width) if learns else None

    def _complete(self) -> None:
        """Everything that needs the network."""
        if self.checkpoint is not None:
            load_heads(self.checkpoint.folder, self.heads)
        if self.config.dtype != "stored":
            self._cast(getattr(torch, self.config.dtype))
        self._fit(self.observation_spec.state, self.action_spec.dim)
        self._choose_trained()
        self.network.set_checkpointing(self.config.gradient_checkpointing)

    @property
    def heads(self) -> dict[str, nn.Module | None]:
        """What is saved beside the network, in a file of its own."""
        return {"value_head": self.value_head, "noise_head": self.noise_head}

    @abstractmethod
    def _fit(self, state: int, actions: int) -> None:
        """Make the normalisers, with the checkpoint's statistics or the action bounds."""

    def _cast(self, dtype: torch.dtype) -> None:
        self.network.to(dtype)

    def set_statistics(self, mean: Array, std: Array) -> None:
        """Normalise states with these statistics [S] from now on; those of a checkpoint stay."""
        if self.checkpoint is None:
            self.state_normaliser.fit_moments(mean, std)

    # -- actions -------------------------------------------------------------------------------------------------

    def to_simulator(self, x: Tensor, inputs: Inputs) -> Tensor:
        """Within the bounds; no gradient beyond them."""
        actions = self.action_normaliser.unnormalise(x[..., : self.action_spec.dim])
        actions = (actions + self.origin(inputs)).float()
        low, high = (torch.tensor(bound, device=x.device) for bound in (self.action_spec.low, self.action_spec.high))
        return torch.clamp(actions, low, high)

    def to_network(self, actions: Tensor, inputs: Inputs) -> Tensor:
        return padded(self.action_normaliser.normalise(actions.double() - self.origin(inputs)), self.width)

    def origin(self, inputs: Inputs) -> Tensor | float:
        """What the network's actions are relative to, [B,1,A] in the simulator's units; 0 when to nothing."""
        return 0.0

    def standard_deviation(self, hidden: Tensor) -> Tensor:
        if self.noise_head is None:
            return super().standard_deviation(hidden)
        return bounded_std(self.noise_head(hidden.float()), *self.config.noise_std)

    @property
    def dtype(self) -> torch.dtype:
        """The chain's and its scores', whatever the weights'."""
        return torch.float32

    # -- prompts -------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """Loaded when it is first needed."""
        if self._tokenizer is None:
            folder = self.config.tokenizer or self.config.checkpoint
            if not folder:
                name = self.config.name
                raise UserError(f"{name} needs a tokenizer: set --policy.tokenizer to a folder, or to bytes")
            self._tokenizer = self._load_tokenizer(folder)
        return self._tokenizer

    @abstractmethod
    def _load_tokenizer(self, folder: str) -> Any: ...

    @abstractmethod
    def _tokens(self, text: str) -> list[int]:
        """The prompt of an instruction."""

    def _prompt(self, text: str) -> list[int]:
        if text not in self._prompts:
            self._prompts[text] = self._tokens(text)
        return self._prompts[text]


def padded(x: Tensor, width: int) -> Tensor:
    """float32 [...,width], zeros behind."""
    return nn.functional.pad(x, (0, width - x.shape[-1])).float()

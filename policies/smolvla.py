"""SmolVLA (arXiv 2506.01844) as a policy with a density: LeRobot's modules and folders, our flow sampler."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from embodied_rl.errors import UserError, unknown
from embodied_rl.policies.base import Inputs
from embodied_rl.policies.flow import FlowSampler, FlowSamplerConfig
from embodied_rl.policies.flow_policy import FlowPolicy
from embodied_rl.policies.lerobot import TEXT, Folder, Wrapper, kind_of
from embodied_rl.policies.mlp import Activation
from embodied_rl.policies.normalization import Normaliser
from embodied_rl.policies.pi0.statistics import find_statistics
from embodied_rl.policies.pretrained import load_heads, save_heads
from embodied_rl.policies.value_head import ValueHead
from embodied_rl.specs import ActionSpec, ObservationSpec

GROUPS = ("vision", "language", "expert", "value")
"""Of parameters: SigLIP with its connector; SmolLM; action expert with all projections; value head."""


@dataclass(frozen=True)
class SmolVLAConfig:
    """SmolVLA from a folder that LeRobot wrote. The sampler's fields are those of `FlowSamplerConfig`."""

    checkpoint: str = ""
    """The folder."""
    backbone: str = ""
    """Folder with the configuration and tokenizer of the vision-language model (config.json and the processor's files
    of HuggingFaceTB/SmolVLM2-500M-Video-Instruct), which the checkpoint only names."""
    cameras: dict[str, str] = field(default_factory=dict)
    """{camera of the checkpoint: simulator's camera} where the names do not tell."""
    chunk: int = 10
    """K, executed actions; H is the checkpoint's chunk_size."""
    denoise_steps: int = 4
    """N, steps from noise to action."""
    method: Literal["sde", "cps", "ode"] = "sde"
    """How a step becomes stochastic: Flow-SDE, Flow-CPS, or never."""
    noise_level: float = 0.5
    """Of "sde" and "cps"."""
    joint: bool = False
    """Every step is stochastic and scored, not one step drawn per row."""
    joint_reduction: Literal["sum", "mean"] = "sum"
    """The chain's density is the "sum"; "mean" averages over its steps and the initial noise."""
    value_hidden: tuple[int, ...] = (512, 256, 128)
    """Widths of the value head, which reads the mean of the vision-language model's output, the state's included."""
    value_activation: Activation = "relu"
    frozen: tuple[str, ...] = ("vision", "language")
    """Groups that are not trained: vision, language, expert, value."""

    def __post_init__(self) -> None:
        for group in self.frozen:
            if group not in GROUPS:
                raise unknown("parameter group", group, GROUPS)
        self.sampler()

    def sampler(self) -> FlowSamplerConfig:
        """The sampler's part."""
        return FlowSamplerConfig(self.denoise_steps, self.method, self.noise_level, self.joint, self.joint_reduction)

    def build(self, observation_spec: ObservationSpec, action_spec: ActionSpec) -> SmolVLAPolicy:
        """Raises `SpecError` for a simulator with other sizes, `UserError` for a folder without such a policy."""
        return SmolVLAPolicy(self, observation_spec, action_spec)


@dataclass(frozen=True)
class Prefix:
    """An encoded observation of B rows."""

    mask: Tensor
    """bool [B,P], False for padding."""
    past: Any
    """Keys and values of every layer; a velocity leaves them as they were."""
    hidden: Tensor
    """The vision-language model's output [B,P,W]."""


class SmolVLAPolicy(Wrapper, FlowPolicy):
    """Network actions are the simulator's, normalised with the checkpoint's statistics and padded with zeros to D."""

    def __init__(self, config: SmolVLAConfig, observation_spec: ObservationSpec, action_spec: ActionSpec) -> None:
        if (kind := kind_of(config.checkpoint)) != "smolvla":
            raise UserError(f"{config.checkpoint} holds LeRobot's '{kind}', not SmolVLA")
        folder = Folder.open(config.checkpoint, config.backbone, use_cache=True, compile_model=False, rtc_config=None)
        theirs = folder.network.config
        if theirs.adapt_to_pi_aloha:
            raise UserError(f"{folder.path / 'config.json'}: adapt_to_pi_aloha is not supported")
        super().__init__(folder, config.cameras, observation_spec, action_spec)
        self.config = config
        self.horizon, self.chunk, self.width = theirs.chunk_size, config.chunk, theirs.max_action_dim
        if not 1 <= self.chunk <= self.horizon:
            raise UserError(f"smolvla: needs 1 <= chunk <= {self.horizon}, the checkpoint's; got {self.chunk}")
        self.sampler = FlowSampler(config.sampler(), config.chunk, action_spec.dim)
        found = find_statistics(folder.path, None, adaptive=False)["actions"]
        self.action_normaliser = Normaliser(found.convention, action_spec.dim)
        self.action_normaliser.fit(found.first(action_spec.dim), found.source)
        hidden = self._flow.vlm_with_expert.config.text_config.hidden_size
        self.value_head = ValueHead(hidden, config.value_hidden, config.value_activation)
        load_heads(folder.path, {"value_head": self.value_head})
        for group, parameters in self.parameter_groups().items():
            for parameter in parameters:
                parameter.requires_grad_(group not in config.frozen)

    @property
    def _flow(self) -> Any:
        return self.network.model

    def encode(self, inputs: Inputs) -> Prefix:
        from lerobot.policies.common.vla_utils import make_att_2d_masks

        batch = self.batch(inputs)
        images, image_masks = self.network.prepare_images(batch)
        text, text_mask = batch[f"{TEXT}tokens"], batch[f"{TEXT}attention_mask"]
        state = self.network.prepare_state(batch)
        tokens, mask, blocks = self._flow.embed_prefix(images, image_masks, text, text_mask, state=state)
        (hidden, _), past = self._flow.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(mask, blocks),
            position_ids=mask.cumsum(1) - 1,
            inputs_embeds=[tokens, None],
            use_cache=True,
        )
        return Prefix(mask, past, hidden)

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> tuple[Tensor, None]:
        return self._flow.denoise_step(prefix.mask, prefix.past, x, t), None

    def to_simulator(self, x: Tensor, inputs: Inputs) -> Tensor:
        """Within the bounds; no gradient beyond them."""
        actions = self.action_normaliser.unnormalise(x[..., : self.action_spec.dim]).float()
        low, high = (torch.tensor(bound, device=x.device) for bound in (self.action_spec.low, self.action_spec.high))
        return torch.clamp(actions, low, high)

    def to_network(self, actions: Tensor, inputs: Inputs) -> Tensor:
        normalised = self.action_normaliser.normalise(actions).float()
        return nn.functional.pad(normalised, (0, self.width - self.action_spec.dim))

    def value(self, inputs: Inputs) -> Tensor:
        return self.value_head(self.features(inputs))

    def prefix_value(self, prefix: Prefix, inputs: Inputs) -> Tensor:
        return self.value_head(_mean(prefix))

    def features(self, inputs: Inputs) -> Tensor:
        """What the value head reads: the mean of the vision-language model's output over its valid tokens."""
        with torch.no_grad():
            return _mean(self.encode(inputs))

    @property
    def imitated(self) -> int:
        return self.action_spec.dim

    def imitation_times(self, uniform: Tensor) -> Tensor:
        """LeRobot's: Beta(1.5, 1), which favours noise."""
        return uniform ** (1 / 1.5) * 0.999 + 0.001

    @property
    def dtype(self) -> torch.dtype:
        """The chain's and its scores', whatever the weights'."""
        return torch.float32

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """ "vision" (with its connector), "language", "expert" (with all projections), "value"."""
        groups: dict[str, list[nn.Parameter]] = {group: [] for group in GROUPS}
        for name, parameter in self.named_parameters():
            groups[_group(name)].append(parameter)
        return groups

    def save_pretrained(self, folder: str | Path) -> None:
        """A folder that LeRobot reads; the value head goes to a file of its own, which only this policy reads."""
        super().save_pretrained(folder)
        save_heads(Path(folder), {"value_head": self.value_head})


def _mean(prefix: Prefix) -> Tensor:
    """[B,W], not differentiated into the network."""
    mask = prefix.mask[..., None]
    return torch.where(mask, prefix.hidden.detach().float(), 0.0).sum(1) / mask.sum(1)


def _group(name: str) -> str:
    if name.startswith("value_head."):
        return "value"
    if ".vlm." not in name:
        return "expert"
    return "vision" if ".vision_model." in name or ".connector." in name else "language"

"""GR00T N1.5 as a policy: observations in, chunks and their scores out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies.base import Inputs, require_continuous
from embodied_rl.policies.flow import FlowSampler, bounded_std
from embodied_rl.policies.flow_policy import FlowPolicy
from embodied_rl.policies.gr00t.checkpoint import Checkpoint, describe, save
from embodied_rl.policies.gr00t.config import EMBODIMENTS, GROUPS, Gr00tConfig
from embodied_rl.policies.gr00t.network import Network, Prefix
from embodied_rl.policies.gr00t.preprocessing import MinMax, Tokenizer, choose_cameras, load_tokenizer, prompt, see
from embodied_rl.policies.images import require_images
from embodied_rl.policies.mlp import mlp
from embodied_rl.policies.pi0.preprocessing import pad
from embodied_rl.policies.pretrained import load_heads
from embodied_rl.policies.value_head import ValueHead
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec, pick_state
from embodied_rl.types import Array, Observation

NOISE_CUT = 0.999
"""The reference's s: times drawn from a Beta distribution are divided by it."""


class Gr00tPolicy(FlowPolicy):
    """Network actions are the simulator's, normalised with the checkpoint's statistics and padded with zeros to D.

    A checkpoint was trained on some states, images and actions; that the simulator's mean the same is up to you.
    """

    def __init__(
        self,
        config: Gr00tConfig,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        require_continuous(action_spec)
        state = pick_state(observation_spec, config.state)
        head, size, dim = config.network.head, state.state, action_spec.dim
        if size > head.state_dim or dim > head.action_dim:
            raise SpecError(
                f"gr00t takes {head.state_dim} states and {head.action_dim} actions at most, not {size} and {dim}"
            )
        self.config = config
        self.cameras = choose_cameras(observation_spec, config.cameras)
        seen = {name: observation_spec.cameras[name] for name in self.cameras}
        views = {name: CameraSpec(camera.height, camera.width) for name, camera in seen.items()}
        self.observation_spec = replace(state, cameras=views)
        self.action_spec = _unit_gripper(action_spec) if config.unit_gripper else action_spec
        self.embodiment = EMBODIMENTS[config.embodiment]
        self.horizon, self.chunk, self.width = config.horizon, config.chunk, head.action_dim
        self.sampler = FlowSampler(config.sampler(), config.chunk, dim)
        self.checkpoint = Checkpoint.open(config.checkpoint) if config.checkpoint else None
        self._tokenizer = tokenizer
        self._prompts: dict[str, list[int]] = {}

        self.value_head = ValueHead(head.features + head.state_dim, config.value_hidden, config.value_activation)
        self.noise_head = None
        if config.method == "noise":
            self.noise_head = mlp(head.hidden, config.noise_hidden, "tanh", head.action_dim)
        if self.checkpoint is None:
            self.network = Network(config.network)
        else:
            self.network = self.checkpoint.network(config.network, config.horizon)
            load_heads(self.checkpoint.folder, {"value_head": self.value_head, "noise_head": self.noise_head})
        if config.dtype != "stored":
            self.network.to(getattr(torch, config.dtype))
        self._fit(size, dim)
        self._choose_trained()
        self.network.set_checkpointing(config.gradient_checkpointing)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        **settings: Any,
    ) -> Gr00tPolicy:
        """The policy in a checkpoint folder, with the horizon it was trained for. `settings` are fields of
        `Gr00tConfig`. Raises `UserError` naming the file and the key that do not fit."""
        horizon = Checkpoint.open(folder).horizon
        known = {} if horizon is None else {"horizon": horizon}
        return cls(Gr00tConfig(**{**known, **settings, "checkpoint": str(folder)}), observation_spec, action_spec)

    # -- observations and actions --------------------------------------------------------------------------------

    def prepare(self, observation: Observation) -> Inputs:
        """image.CAMERA uint8 [B,S,S,3], black where a row has no such camera; tokens int64 and token_mask bool [B,T];
        the normalised and padded state float32 [B,state_dim]. Raises `UserError` for an instruction that is too
        long and for images of another type."""
        require_images(observation, self.cameras)
        size = self.config.network.backbone.vision.image
        inputs: dict[str, Tensor] = {
            f"image.{name}": see(
                np.asarray(observation.images[name]), np.asarray(observation.image_mask[name]), self.config.crop, size
            )
            for name in self.cameras
        }
        texts = observation.texts()
        tokens, mask = pad([self._prompt(text) for text in texts], texts, self.config.prompt_length)
        inputs |= {"tokens": torch.from_numpy(tokens), "token_mask": torch.from_numpy(mask)}
        state = self.state_normaliser.normalise(torch.tensor(observation.state, device=self.device))
        inputs["state"] = _padded(state, self.config.network.head.state_dim)
        return {name: value.to(self.device) for name, value in inputs.items()}

    def to_simulator(self, x: Tensor) -> Tensor:
        """Within the bounds; no gradient beyond them."""
        actions = self.action_normaliser.unnormalise(x[..., : self.action_spec.dim]).float()
        low, high = (torch.tensor(bound, device=x.device) for bound in (self.action_spec.low, self.action_spec.high))
        return torch.clamp(actions, low, high)

    def to_network(self, actions: Tensor) -> Tensor:
        return _padded(self.action_normaliser.normalise(actions), self.width)

    def set_statistics(self, mean: Array, std: Array) -> None:
        """Normalise states with these statistics [S] from now on; those of a checkpoint stay."""
        if self.checkpoint is None:
            self.state_normaliser.fit_moments(mean, std)

    # -- the network ---------------------------------------------------------------------------------------------

    def encode(self, inputs: Inputs) -> Prefix:
        return self.network.encode(self._backbone(inputs), inputs["state"], self.embodiment)

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(v [B,H,D], the DiT's output at the action tokens [B,H,W])."""
        return self.network.velocity(prefix, x, t)

    def standard_deviation(self, hidden: Tensor) -> Tensor:
        if self.noise_head is None:
            return super().standard_deviation(hidden)
        return bounded_std(self.noise_head(hidden.float()), *self.config.noise_std)

    def value(self, inputs: Inputs) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.value_trains_prefix):
            features = self._backbone(inputs)
        return self._value(features, inputs)

    def prefix_value(self, prefix: Prefix, inputs: Inputs) -> Tensor:
        return self._value(prefix.features, inputs)

    def features(self, inputs: Inputs) -> Tensor:
        """What the value head reads: the mean of the backbone's features over the prompt's valid tokens, images
        included, and the state."""
        with torch.no_grad():
            return _describe(self._backbone(inputs), inputs)

    def _value(self, features: Tensor, inputs: Inputs) -> Tensor:
        return self.value_head(_describe(features if self.config.value_trains_prefix else features.detach(), inputs))

    def _backbone(self, inputs: Inputs) -> Tensor:
        images = [inputs[f"image.{name}"] for name in self.cameras]
        return self.network.features(images, inputs["tokens"], inputs["token_mask"])

    def imitation_loss(
        self,
        inputs: Inputs,
        actions: Tensor,
        valid: Tensor,
        *,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Flow matching at times drawn from Beta(1.5, 1), which favours noise, over the A real dimensions: the
        reference's mask leaves out the padding. `time` [B] is flow time, 1 = noise."""
        keep = valid[..., None]
        action = torch.where(keep, self.to_network(torch.where(keep, actions, 0.0)), 0.0)
        if noise is None:
            noise = torch.randn(action.shape, generator=generator, device=action.device)
        if time is None:
            uniform = torch.rand(len(actions), generator=generator, device=actions.device)
            time = uniform ** (1 / 1.5) / NOISE_CUT
        t = time[:, None, None]
        v, _ = self.velocity(self.encode(inputs), t * noise + (1 - t) * action, time)
        error = torch.where(keep, v - (noise - action), 0.0)[..., : self.action_spec.dim]
        return error.square().sum((1, 2)) / (valid.sum(1) * self.action_spec.dim).clamp_min(1)

    @property
    def dtype(self) -> torch.dtype:
        """The chain's and its scores', whatever the weights'."""
        return torch.float32

    # -- what is trained -----------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """ "vision" (with its projector), "language", "heads" (action head and noise head), "value"."""
        groups: dict[str, list[nn.Parameter]] = {group: [] for group in GROUPS}
        for name, parameter in self.named_parameters():
            groups[_group(name)].append(parameter)
        return groups

    def _choose_trained(self) -> None:
        if self.config.lora_rank:
            from embodied_rl.policies.lora import add_lora, linear_layers  # peft is slow to import

            eagle, head = self.network.eagle, self.network.action_head
            parts = {"vision": [eagle.vision_model], "language": [eagle.language_model]}
            parts["heads"] = [head.model, head.vl_self_attention]
            for group, modules in parts.items():
                for module in modules if group not in self.config.frozen else []:
                    layers = [name for name in linear_layers(module) if ".head." not in name]  # SigLIP's unused head
                    add_lora(module, layers, self.config.lora_rank, self.config.lora_alpha)
        groups = self.parameter_groups()
        for group in self.config.frozen:
            for parameter in groups[group]:
                parameter.requires_grad_(False)

    # -- weights, statistics, prompts ----------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint folder in NVIDIA's layout, adapters merged, with all other files of the folder that the
        policy was loaded from. Value and noise head go to a file of their own, which only this policy reads. Raises
        `UserError` when it cannot be written."""
        from embodied_rl.policies.lora import merged_weights  # peft is slow to import

        normalisers = {"state": self.state_normaliser, "action": self.action_normaliser}
        statistics = {kind: {kind: normaliser.as_dict()} for kind, normaliser in normalisers.items()}
        save(
            Path(folder),
            self.checkpoint,
            merged_weights(self.network),
            describe(self.config.network, self.horizon),
            {self.config.embodiment: {"statistics": statistics, "embodiment_tag": self.config.embodiment}},
            {"value_head": self.value_head, "noise_head": self.noise_head},
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """Loaded when it is first needed."""
        if self._tokenizer is None:
            folder = self.config.tokenizer or self.config.checkpoint
            if not folder:
                raise UserError("gr00t needs a tokenizer: set --policy.tokenizer to a folder, or to bytes")
            self._tokenizer = load_tokenizer(folder)
        return self._tokenizer

    def _prompt(self, text: str) -> list[int]:
        if text not in self._prompts:
            backbone = self.config.network.backbone
            count, tokens = len(self.cameras), backbone.vision.tokens
            self._prompts[text] = prompt(self.tokenizer, text, count, backbone.image_token, tokens)
        return self._prompts[text]

    def _fit(self, size: int, dim: int) -> None:
        """With a checkpoint its statistics; without, actions fill [-1, 1] between their bounds where they have any."""
        self.state_normaliser, self.action_normaliser = MinMax(size), MinMax(dim)
        if self.checkpoint is not None:
            tag, config = self.config.embodiment, self.config
            self.state_normaliser.fit(*self.checkpoint.statistics(tag, "state", config.state_keys, size))
            self.action_normaliser.fit(*self.checkpoint.statistics(tag, "action", config.action_keys, dim))
            return
        self.action_normaliser.fit_bounds(self.action_spec.low, self.action_spec.high)


def _describe(features: Tensor, inputs: Inputs) -> Tensor:
    """[B,F+state_dim] of the backbone's features [B,T,F]."""
    mask = inputs["token_mask"][..., None]
    mean = torch.where(mask, features.float(), 0.0).sum(1) / mask.sum(1)
    return torch.cat([mean, inputs["state"]], 1)


def _padded(x: Tensor, width: int) -> Tensor:
    return nn.functional.pad(x, (0, width - x.shape[-1])).float()


def _unit_gripper(spec: ActionSpec) -> ActionSpec:
    """`spec` with a gripper from 0, closed, to 1, open. Raises `SpecError` without a gripper."""
    if spec.gripper is None:
        raise SpecError("unit_gripper: the simulator names no gripper among its actions; leave it at False")
    low, high = list(spec.low), list(spec.high)
    low[spec.gripper], high[spec.gripper] = 0.0, 1.0
    return replace(spec, low=tuple(low), high=tuple(high), gripper_open=1)


def _group(name: str) -> str:
    if name.startswith("value_head."):
        return "value"
    if ".language_model." in name:
        return "language"
    return "vision" if ".eagle_model." in name else "heads"

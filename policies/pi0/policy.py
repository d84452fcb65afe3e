"""π₀ and π₀.₅ as policies: observations in, chunks and their scores out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies.base import Inputs, require_continuous
from embodied_rl.policies.flow import FlowSampler, bounded_std
from embodied_rl.policies.flow_policy import FlowPolicy
from embodied_rl.policies.mlp import mlp
from embodied_rl.policies.normalization import Normaliser
from embodied_rl.policies.pi0.checkpoint import Checkpoint
from embodied_rl.policies.pi0.config import CAMERAS, Pi0Config, Pi05Config
from embodied_rl.policies.pi0.network import Network, Prefix
from embodied_rl.policies.pi0.preprocessing import (
    Tokenizer,
    find_views,
    load_tokenizer,
    pad,
    pi0_prompt,
    pi05_prompt,
    resize_with_pad,
)
from embodied_rl.policies.pretrained import load_heads
from embodied_rl.policies.value_head import ValueHead
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec, pick_state
from embodied_rl.types import Array, Observation


class Pi0Policy(FlowPolicy):
    """Network actions are the simulator's, normalised with the checkpoint's statistics and padded with zeros to D.

    A checkpoint was trained on some states, images and actions; that the simulator's mean the same is up to you.
    """

    def __init__(
        self,
        config: Pi0Config,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        require_continuous(action_spec)
        sizes = config.network
        state = pick_state(observation_spec, config.state)
        size, dim = state.state, action_spec.dim
        if max(size, dim) > sizes.action_dim:
            raise SpecError(f"{config.name} takes {sizes.action_dim} states and actions at most, not {size} and {dim}")
        self.config = config
        self.views = find_views(observation_spec, CAMERAS, config.cameras)
        seen = {name: observation_spec.cameras[name] for name in self.views.values()}
        views = {name: CameraSpec(camera.height, camera.width) for name, camera in seen.items()}
        self.observation_spec = replace(state, cameras=views)
        self.action_spec = action_spec
        self.horizon, self.chunk, self.width = config.horizon, config.chunk, sizes.action_dim
        self.sampler = FlowSampler(config.sampler(), config.chunk, dim)
        self.checkpoint = Checkpoint.open(config.checkpoint) if config.checkpoint else None
        self._tokenizer = tokenizer
        self._prompts: dict[str, list[int]] = {}

        hidden = sizes.language.width + (0 if sizes.adaptive else sizes.action_dim)
        self.value_head = ValueHead(hidden, config.value_hidden, config.value_activation)
        self.noise_head = None
        if config.method == "noise":
            self.noise_head = mlp(sizes.expert.width, config.noise_hidden, "tanh", sizes.action_dim)
        if self.checkpoint is None:
            self.network = Network(sizes, config.horizon)
            self.network.initialise()
        else:
            self.network = self.checkpoint.network(sizes, config.horizon)
            load_heads(self.checkpoint.folder, {"value_head": self.value_head, "noise_head": self.noise_head})
        if config.dtype != "stored":
            cast(self.network, getattr(torch, config.dtype))
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
    ) -> Pi0Policy:
        """The policy in a checkpoint folder: π₀ or π₀.₅, whichever it is, with the horizon it was trained for.
        `settings` are fields of `Pi0Config`. Raises `UserError` naming the file and the key that do not fit."""
        checkpoint = Checkpoint.open(folder)
        known = {} if checkpoint.horizon is None else {"horizon": checkpoint.horizon}
        kind = Pi05Config if checkpoint.adaptive else Pi0Config
        return cls(kind(**{**known, **settings, "checkpoint": str(folder)}), observation_spec, action_spec)

    # -- observations and actions --------------------------------------------------------------------------------

    def prepare(self, observation: Observation) -> Inputs:
        """image.CAMERA uint8 [B,S,S,3] and image_mask.CAMERA bool [B] for every camera that the simulator has; tokens
        int64 and token_mask bool [B,T]; π₀'s normalised and padded state float32 [B,D]. Raises `UserError` for an
        instruction that is too long."""
        inputs: dict[str, Tensor] = {}
        for name, camera in self.views.items():
            images = [resize_with_pad(image, self.config.network.vision.image) for image in observation.images[camera]]
            inputs[f"image.{name}"] = torch.from_numpy(np.stack(images))
            inputs[f"image_mask.{name}"] = torch.tensor(observation.image_mask[camera])
        state = self.state_normaliser.normalise(torch.tensor(observation.state, device=self.device))
        texts = observation.texts()
        if self.config.network.adaptive:
            prompts = [pi05_prompt(self.tokenizer, *row) for row in zip(texts, state.numpy(force=True), strict=True)]
        else:
            inputs["state"] = self._padded(state)
            prompts = [self._prompt(text) for text in texts]
        tokens, mask = pad(prompts, texts, self.config.prompt_length)
        known = self.config.network.vocabulary
        if tokens.max(initial=0) >= known:
            raise UserError(f"the tokenizer gives id {tokens.max()}, the network knows {known}: give its own")
        inputs |= {"tokens": torch.from_numpy(tokens), "token_mask": torch.from_numpy(mask)}
        return {name: value.to(self.device) for name, value in inputs.items()}

    def to_simulator(self, x: Tensor) -> Tensor:
        """Within the bounds; no gradient beyond them."""
        actions = self.action_normaliser.unnormalise(x[..., : self.action_spec.dim]).float()
        low, high = (torch.tensor(bound, device=x.device) for bound in (self.action_spec.low, self.action_spec.high))
        return torch.clamp(actions, low, high)

    def to_network(self, actions: Tensor) -> Tensor:
        return self._padded(self.action_normaliser.normalise(actions))

    def set_statistics(self, mean: Array, std: Array) -> None:
        """Normalise states with these statistics [S] from now on; those of a checkpoint stay."""
        if self.checkpoint is None:
            self.state_normaliser.fit_moments(mean, std)

    # -- the network ---------------------------------------------------------------------------------------------

    def encode(self, inputs: Inputs) -> Prefix:
        images = {name: inputs[f"image.{name}"] for name in self.views}
        masks = {name: inputs[f"image_mask.{name}"] for name in self.views}
        return self.network.encode(images, masks, inputs["tokens"], inputs["token_mask"], inputs.get("state"))

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(v [B,H,D], the action expert's last hidden layer [B,H,W])."""
        return self.network.velocity(prefix, x, t)

    def standard_deviation(self, hidden: Tensor) -> Tensor:
        if self.noise_head is None:
            return super().standard_deviation(hidden)
        return bounded_std(self.noise_head(hidden.float()), *self.config.noise_std)

    def value(self, inputs: Inputs) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.value_trains_prefix):
            prefix = self.encode(inputs)
        return self.prefix_value(prefix, inputs)

    def prefix_value(self, prefix: Prefix, inputs: Inputs) -> Tensor:
        return self.value_head(self._description(prefix, inputs, self.config.value_trains_prefix))

    def features(self, inputs: Inputs) -> Tensor:
        """What the value head reads: the mean of the vision-language model's output over its valid tokens, and π₀'s
        state, which is not in the prefix."""
        with torch.no_grad():
            return self._description(self.encode(inputs), inputs, False)

    def _description(self, prefix: Prefix, inputs: Inputs, grad: bool) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and grad):
            output, mask = self.network.output(prefix).float(), prefix.mask[..., None]
            mean = torch.where(mask, output, 0.0).sum(1) / mask.sum(1)
        return torch.cat([mean, inputs["state"]], 1) if "state" in inputs else mean

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
        """Flow matching at times drawn from Beta(1.5, 1), which favours noise, as openpi trains; over all D dimensions,
        so that the padding is learned to be 0."""
        if time is None:
            uniform = torch.rand(len(actions), generator=generator, device=actions.device)
            time = uniform ** (1 / 1.5) * 0.999 + 0.001
        return super().imitation_loss(inputs, actions, valid, noise=noise, time=time, generator=generator)

    @property
    def dtype(self) -> torch.dtype:
        """The chain's and its scores', whatever the weights'."""
        return torch.float32

    # -- what is trained -----------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """ "vision" (with its projector), "language", "expert" (with its projections and the noise head), "value"."""
        groups: dict[str, list[nn.Parameter]] = {"vision": [], "language": [], "expert": [], "value": []}
        for name, parameter in self.named_parameters():
            groups[_group(name)].append(parameter)
        return groups

    def _choose_trained(self) -> None:
        if not self.config.value_trains_prefix:
            self.network.language.freeze_output()
        if self.config.lora_rank:
            from embodied_rl.policies.lora import add_lora, linear_layers  # peft is slow to import

            for part in ("vision", "language", "expert"):
                if part not in self.config.frozen:
                    module = getattr(self.network, part)
                    add_lora(module, linear_layers(module), self.config.lora_rank, self.config.lora_alpha)
        groups = self.parameter_groups()
        for group in self.config.frozen:
            for parameter in groups[group]:
                parameter.requires_grad_(False)

    # -- weights, statistics, prompts ----------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, layout: Literal["openpi", "lerobot"] | None = None) -> None:
        """Write a checkpoint folder that openpi's or LeRobot's own loader reads, adapters merged; None keeps the layout
        of the checkpoint and all its other files. Value and noise head go to a file of their own, which only this
        policy reads. Raises `UserError` when it cannot be written or would not mean the same to that loader."""
        from embodied_rl.policies.pi0.export import save

        save(self, Path(folder), layout)

    @property
    def tokenizer(self) -> Tokenizer:
        """Loaded when it is first needed."""
        if self._tokenizer is None:
            folder = self.config.tokenizer or self.config.checkpoint
            if not folder:
                raise UserError(
                    f"{self.config.name} needs a tokenizer: set --policy.tokenizer to a folder, or to bytes"
                )
            self._tokenizer = load_tokenizer(folder)
        return self._tokenizer

    def _prompt(self, text: str) -> list[int]:
        if text not in self._prompts:
            self._prompts[text] = pi0_prompt(self.tokenizer, text)
        return self._prompts[text]

    def _padded(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, self.width - x.shape[-1])).float()

    def _fit(self, size: int, dim: int) -> None:
        """With a checkpoint its statistics; without, actions fill [-1, 1] between their bounds where they have any."""
        adaptive = self.config.network.adaptive
        if self.checkpoint is not None:
            found = self.checkpoint.statistics(self.config.asset)
            self.state_normaliser = Normaliser(found["state"].convention, size)
            self.state_normaliser.fit(found["state"].first(size), found["state"].source)
            self.action_normaliser = Normaliser(found["actions"].convention, dim)
            self.action_normaliser.fit(found["actions"].first(dim), found["actions"].source)
            return
        convention = "openpi_quantile" if adaptive else "openpi_mean_std"
        self.state_normaliser = Normaliser(convention, size)
        self.action_normaliser = Normaliser(convention, dim)
        self.action_normaliser.fit_bounds(self.action_spec.low, self.action_spec.high)


FLOAT32 = ("norm", "embeddings.", "projector.", "action_", "state_proj.", "time_mlp_")
"""What stays float32 in a network cast to bfloat16: names that begin with or hold one of these."""


def cast(network: Network, dtype: torch.dtype) -> None:
    """Give the weights `dtype`; small ones whose rounding matters stay float32."""
    for name, parameter in network.named_parameters():
        keep = any(part in name for part in FLOAT32)
        parameter.data = parameter.data.to(torch.float32 if keep else dtype)


def _group(name: str) -> str:
    owner, part = name.split(".")[:2]
    if owner == "value_head":
        return "value"
    return {"vision": "vision", "projector": "vision", "language": "language"}.get(part, "expert")

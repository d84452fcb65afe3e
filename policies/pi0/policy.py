"""π₀ and π₀.₅ as policies: observations in, chunks and their scores out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies.base import Inputs
from embodied_rl.policies.flow_vla import FlowVLAPolicy, padded
from embodied_rl.policies.images import require_images
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
from embodied_rl.specs import ActionSpec, ObservationSpec
from embodied_rl.types import Observation

FLOAT32 = ("norm", "embeddings.", "projector.", "action_", "state_proj.", "time_mlp_")
"""What stays float32 in a network cast to bfloat16: names that begin with or hold one of these."""


class Pi0Policy(FlowVLAPolicy[Pi0Config]):
    """π₀ or π₀.₅, as the network is."""

    network: Network
    checkpoint: Checkpoint | None

    def __init__(
        self,
        config: Pi0Config,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        sizes, views = config.network, find_views(observation_spec, CAMERAS, config.cameras)
        super().__init__(
            config,
            observation_spec,
            views.values(),
            action_spec,
            tokenizer,
            states=sizes.action_dim,
            width=sizes.action_dim,
            described=sizes.language.width + (0 if sizes.adaptive else sizes.action_dim),
            hidden=sizes.expert.width,
        )
        shared, relative = min(self.observation_spec.state, action_spec.dim), config.relative_to_state
        if relative > shared:
            raise SpecError(f"{config.name}: relative_to_state is {relative}, state and actions share {shared} numbers")
        self.views = views
        self.checkpoint = Checkpoint.open(config.checkpoint) if config.checkpoint else None
        if self.checkpoint is None:
            self.network = Network(sizes, config.horizon)
            self.network.initialise()
        else:
            self.network = self.checkpoint.network(sizes, config.horizon)
        self._complete()

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
        int64 and token_mask bool [B,T]; π₀'s normalised and padded state float32 [B,D]; with `relative_to_state`,
        origin float32 [B,A], which holds the state as it is. Raises `UserError` for an instruction that is too long
        and for images of another type."""
        require_images(observation, self.views.values())
        inputs: dict[str, Tensor] = {}
        for name, camera in self.views.items():
            images = [resize_with_pad(image, self.config.network.vision.image) for image in observation.images[camera]]
            inputs[f"image.{name}"] = torch.from_numpy(np.stack(images))
            inputs[f"image_mask.{name}"] = torch.tensor(observation.image_mask[camera])
        raw = torch.tensor(observation.state, device=self.device)
        if relative := self.config.relative_to_state:
            inputs["origin"] = padded(raw[:, :relative], self.action_spec.dim)
        state = self.state_normaliser.normalise(raw)
        texts = observation.texts()
        prompts = [self._prompt(text) for text in texts]
        if not self.config.network.adaptive:
            inputs["state"] = padded(state, self.width)
        elif not isinstance(self.config, Pi05Config) or self.config.state_in_prompt:
            prompts = [pi05_prompt(self.tokenizer, *row) for row in zip(texts, state.numpy(force=True), strict=True)]
        tokens, mask = pad(prompts, texts, self.config.prompt_length)
        known = self.config.network.vocabulary
        if tokens.max(initial=0) >= known:
            raise UserError(f"the tokenizer gives id {tokens.max()}, the network knows {known}: give its own")
        inputs |= {"tokens": torch.from_numpy(tokens), "token_mask": torch.from_numpy(mask)}
        return {name: value.to(self.device) for name, value in inputs.items()}

    def origin(self, inputs: Inputs) -> Tensor | float:
        return inputs["origin"][:, None] if self.config.relative_to_state else 0.0

    # -- the network ---------------------------------------------------------------------------------------------

    def encode(self, inputs: Inputs) -> Prefix:
        images = {name: inputs[f"image.{name}"] for name in self.views}
        masks = {name: inputs[f"image_mask.{name}"] for name in self.views}
        tokens, mask = inputs["tokens"], inputs["token_mask"]
        longest = mask.shape[1] if mask.is_meta else int(mask.sum(1).max())  # nothing sees the padding behind
        return self.network.encode(images, masks, tokens[:, :longest], mask[:, :longest], inputs.get("state"))

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(v [B,H,D], the action expert's last hidden layer [B,H,W])."""
        return self.network.velocity(prefix, x, t)

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

    def imitation_times(self, uniform: Tensor) -> Tensor:
        """From Beta(1.5, 1), which favours noise, as openpi trains."""
        return uniform ** (1 / 1.5) * 0.999 + 0.001

    # -- what is trained -----------------------------------------------------------------------------------------

    def group(self, name: str) -> str:
        """ "vision" (with its projector), "language", "expert" (with its projections and the noise head), "value"."""
        owner, part = name.split(".")[:2]
        if owner == "value_head":
            return "value"
        return {"vision": "vision", "projector": "vision", "language": "language"}.get(part, "expert")

    def adaptable(self) -> Iterator[tuple[str, nn.Module]]:
        return ((part, getattr(self.network, part)) for part in ("vision", "language", "expert"))

    def _choose_trained(self) -> None:
        if not self.config.value_trains_prefix:
            self.network.language.freeze_output()
        super()._choose_trained()

    # -- weights, statistics, prompts ----------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, layout: Literal["openpi", "lerobot"] | None = None) -> None:
        """Write a checkpoint folder that openpi's or LeRobot's own loader reads, adapters merged; None keeps the layout
        of the checkpoint and all its other files. Value and noise head go to a file of their own, which only this
        policy reads. Raises `UserError` when it cannot be written or would not mean the same to that loader."""
        from embodied_rl.policies.pi0.export import save

        save(self, Path(folder), layout)

    def _load_tokenizer(self, folder: str) -> Tokenizer:
        return load_tokenizer(folder)

    def _tokens(self, text: str) -> list[int]:
        return pi0_prompt(self.tokenizer, text)

    def _cast(self, dtype: torch.dtype) -> None:
        for name, parameter in self.network.named_parameters():
            keep = any(part in name for part in FLOAT32)
            parameter.data = parameter.data.to(torch.float32 if keep else dtype)

    def _fit(self, state: int, actions: int) -> None:
        adaptive = self.config.network.adaptive
        if self.checkpoint is not None:
            found = self.checkpoint.statistics(self.config.asset)
            self.state_normaliser = Normaliser(found["state"].convention, state)
            self.state_normaliser.fit(found["state"].first(state), found["state"].source)
            self.action_normaliser = Normaliser(found["actions"].convention, actions)
            self.action_normaliser.fit(found["actions"].first(actions), found["actions"].source)
            return
        convention = "openpi_quantile" if adaptive else "openpi_mean_std"
        self.state_normaliser = Normaliser(convention, state)
        self.action_normaliser = Normaliser(convention, actions)
        self.action_normaliser.fit_bounds(self.action_spec.low, self.action_spec.high)

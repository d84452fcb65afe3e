"""GR00T N1.5 as a policy: observations in, chunks and their scores out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rl.errors import SpecError
from embodied_rl.policies.base import Inputs
from embodied_rl.policies.flow_vla import FlowVLAPolicy, padded
from embodied_rl.policies.gr00t.checkpoint import Checkpoint, describe, keep_embodiment, save, whole_tables
from embodied_rl.policies.gr00t.config import EMBODIMENTS, Gr00tConfig
from embodied_rl.policies.gr00t.network import Network, Prefix
from embodied_rl.policies.gr00t.preprocessing import MinMax, Tokenizer, choose_cameras, load_tokenizer, prompt, see
from embodied_rl.policies.images import require_images
from embodied_rl.policies.pi0.preprocessing import pad
from embodied_rl.specs import ActionSpec, ObservationSpec
from embodied_rl.types import Observation

NOISE_CUT = 0.999
"""The reference's s: times drawn from a Beta distribution are divided by it."""


class Gr00tPolicy(FlowVLAPolicy[Gr00tConfig]):
    """GR00T N1.5 with the weights of one embodiment; those of the others stay in the folder that it came from."""

    network: Network
    checkpoint: Checkpoint | None

    def __init__(
        self,
        config: Gr00tConfig,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        head, cameras = config.network.head, choose_cameras(observation_spec, config.cameras)
        super().__init__(
            config,
            observation_spec,
            cameras,
            _unit_gripper(action_spec) if config.unit_gripper else action_spec,
            tokenizer,
            states=head.state_dim,
            width=head.action_dim,
            described=head.features + head.state_dim,
            hidden=head.hidden,
        )
        self.cameras = cameras
        self.embodiment = EMBODIMENTS[config.embodiment]
        self.checkpoint = Checkpoint.open(config.checkpoint) if config.checkpoint else None
        if self.checkpoint is None:
            self.network = Network(config.network)
        else:
            self.network = self.checkpoint.network(config.network, config.horizon)
        keep_embodiment(self.network, self.embodiment)
        self._complete()

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
        inputs["state"] = padded(state, self.config.network.head.state_dim)
        return {name: value.to(self.device) for name, value in inputs.items()}

    # -- the network ---------------------------------------------------------------------------------------------

    def encode(self, inputs: Inputs) -> Prefix:
        return self.network.encode(self._backbone(inputs), inputs["state"], embodiment=0)

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(v [B,H,D], the DiT's output at the action tokens [B,H,W])."""
        return self.network.velocity(prefix, x, t)

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

    @property
    def imitated(self) -> int:
        """The real dimensions: the reference's mask leaves out the padding."""
        return self.action_spec.dim

    def imitation_times(self, uniform: Tensor) -> Tensor:
        """From Beta(1.5, 1), which favours noise."""
        return uniform ** (1 / 1.5) / NOISE_CUT

    # -- what is trained -----------------------------------------------------------------------------------------

    def group(self, name: str) -> str:
        """ "vision" (with its projector), "language", "heads" (action head and noise head), "value"."""
        if name.startswith("value_head."):
            return "value"
        if ".language_model." in name:
            return "language"
        return "vision" if ".eagle_model." in name else "heads"

    def adaptable(self) -> Iterator[tuple[str, nn.Module]]:
        eagle, head = self.network.eagle, self.network.action_head
        yield "vision", eagle.vision_model
        yield "language", eagle.language_model
        yield "heads", head.model
        yield "heads", head.vl_self_attention

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
            merged_weights(self.network) | whole_tables(self.network, self.embodiment, self.checkpoint),
            describe(self.config.network, self.horizon),
            {self.config.embodiment: {"statistics": statistics, "embodiment_tag": self.config.embodiment}},
            self.heads,
        )

    def _load_tokenizer(self, folder: str) -> Tokenizer:
        return load_tokenizer(folder)

    def _tokens(self, text: str) -> list[int]:
        backbone = self.config.network.backbone
        return prompt(self.tokenizer, text, len(self.cameras), backbone.image_token, backbone.vision.tokens)

    def _fit(self, state: int, actions: int) -> None:
        self.state_normaliser, self.action_normaliser = MinMax(state), MinMax(actions)
        if self.checkpoint is not None:
            tag, config = self.config.embodiment, self.config
            self.state_normaliser.fit(*self.checkpoint.statistics(tag, "state", config.state_keys, state))
            self.action_normaliser.fit(*self.checkpoint.statistics(tag, "action", config.action_keys, actions))
            return
        self.action_normaliser.fit_bounds(self.action_spec.low, self.action_spec.high)


def _describe(features: Tensor, inputs: Inputs) -> Tensor:
    """[B,F+state_dim] of the backbone's features [B,T,F]."""
    mask = inputs["token_mask"][..., None]
    mean = torch.where(mask, features.float(), 0.0).sum(1) / mask.sum(1)
    return torch.cat([mean, inputs["state"]], 1)


def _unit_gripper(spec: ActionSpec) -> ActionSpec:
    """`spec` with a gripper from 0, closed, to 1, open. Raises `SpecError` without a gripper."""
    if spec.gripper is None:
        raise SpecError("unit_gripper: the simulator names no gripper among its actions; leave it at False")
    low, high = list(spec.low), list(spec.high)
    low[spec.gripper], high[spec.gripper] = 0.0, 1.0
    return replace(spec, low=tuple(low), high=tuple(high), gripper_open=1)

"""What the OpenVLA policies share: observations to inputs, normalised actions to the simulator's, values, imitation,
freezing and adapters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies.base import Inputs, require_continuous
from embodied_rl.policies.images import require_images
from embodied_rl.policies.normalization import Normaliser, read_statistics
from embodied_rl.policies.openvla.architecture import Architecture
from embodied_rl.policies.openvla.checkpoint import Checkpoint, load_network, save_network
from embodied_rl.policies.openvla.config import OpenVLAConfig, OpenVLAOFTConfig
from embodied_rl.policies.openvla.heads import token_value_head
from embodied_rl.policies.openvla.network import OpenVLANetwork
from embodied_rl.policies.openvla.preprocessing import ImageProcessor, Preprocessing
from embodied_rl.policies.openvla.prompts import Prompts, Tokenize, llama_bytes, local_tokenizer
from embodied_rl.policies.pretrained import load_heads, save_heads
from embodied_rl.policies.vla import VLAPolicy
from embodied_rl.specs import CAMERA_ALIASES, ActionSpec, CameraSpec, ObservationSpec, pick_state
from embodied_rl.types import Array, Observation

GROUP_OF = {
    "vision_backbone": "vision",
    "projector": "projector",
    "proprio_projector": "projector",
    "language_model": "language",
    "action_head": "heads",
}


class OpenVLAPolicy(VLAPolicy[OpenVLAConfig]):
    """Inputs: "images" uint8 [B,cameras,S,S,3], resized and cropped; "prompt" int64 [B,prompt_length]; "state" float32
    [B,proprio_dim] where the network takes one.

    When the statistics leave the simulator's gripper dimension unscaled, it is the data sets' gripper: 0 closed, 1
    open, executed as one of both.
    """

    config_class: ClassVar[type[OpenVLAConfig]] = OpenVLAOFTConfig

    def __init__(
        self,
        config: OpenVLAConfig,
        architecture: Architecture,
        checkpoint: Checkpoint | None,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        tokenize: Tokenize | None = None,
    ) -> None:
        """`tokenize` replaces the checkpoint's tokenizer."""
        super().__init__()
        require_continuous(action_spec)
        self.config = config
        self.architecture = architecture
        self.checkpoint = checkpoint
        self.horizon, self.chunk = architecture.horizon, config.executed
        self.observation_spec = _observation_spec(config, architecture.proprio_dim, observation_spec)
        self.action_normaliser = Normaliser(config.convention, architecture.action_dim)
        self.state_normaliser = Normaliser(config.convention, architecture.proprio_dim)
        if checkpoint is None:
            self.action_normaliser.fit_bounds(action_spec.low, action_spec.high)
        else:
            self._fit(checkpoint)
        self.action_spec = self._action_spec(action_spec)
        if tokenize is None:
            tokenize = llama_bytes if checkpoint is None else local_tokenizer(checkpoint.folder)
        dtype = getattr(torch, config.dtype)
        if checkpoint is None:
            self.network = OpenVLANetwork(architecture).to(dtype)
            self.processor = ImageProcessor(architecture.image_size)
        else:
            self.network = load_network(checkpoint, architecture, dtype)
            self.processor = checkpoint.processor
        self.value_head = token_value_head(self.network.hidden_size) if config.value_head else None
        pad = self.network.pad_token
        self.prompts = Prompts(tokenize, config.prompt, config.prompt_length, pad, config.empty_token)
        self.preprocessing = Preprocessing(config.resize, config.center_crop)
        if checkpoint is not None:
            load_heads(checkpoint.folder, {"value_head": self.value_head})
        self._choose_trained()
        self.network.set_checkpointing(config.gradient_checkpointing)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, observation_spec: ObservationSpec, action_spec: ActionSpec, **settings: Any
    ) -> Self:
        """The policy in a checkpoint folder; `settings` are fields of `config_class`. Raises `UserError` naming the
        file and the key that do not fit."""
        policy = cls.config_class(checkpoint=str(folder), **settings).build(observation_spec, action_spec)
        if not isinstance(policy, cls):
            raise UserError(f"{folder} makes a {type(policy).__name__}, not a {cls.__name__}")
        return policy

    # -- observations and actions --------------------------------------------------------------------------------

    def prepare(self, observation: Observation) -> Inputs:
        """A row without one of the cameras sees black there. Raises `UserError` for an instruction that is too long and
        for images of another type."""
        require_images(observation, self.observation_spec.cameras)
        size = self.processor.size
        images = np.zeros((len(observation), len(self.observation_spec.cameras), size, size, 3), np.uint8)
        for place, camera in enumerate(self.observation_spec.cameras):
            for row in np.flatnonzero(observation.image_mask[camera]):
                images[row, place] = self.preprocessing(observation.images[camera][row], self.processor)
        inputs = {"images": torch.from_numpy(images), "prompt": torch.from_numpy(self.prompts(observation.texts()))}
        if self.architecture.proprio_dim:
            inputs["state"] = torch.tensor(observation.state, dtype=torch.float32)
        return {name: value.to(self.device) for name, value in inputs.items()}

    def set_statistics(self, mean: Array, std: Array) -> None:
        """Normalise states with these statistics [S] from now on, where the network takes a state; those of a
        checkpoint stay."""
        if self.checkpoint is None and self.architecture.proprio_dim:
            self.state_normaliser.fit_moments(mean, std)

    def prefix(self, inputs: Inputs, stop_token: bool = False) -> tuple[Tensor, Tensor]:
        """Embeddings [B,S,hidden] of everything before the actions, and which are valid [B,S]."""
        state = self.state_normaliser.normalise(inputs["state"]) if "state" in inputs else None
        return self.network.prefix(self.processor.normalise(inputs["images"]), inputs["prompt"], state, stop_token)

    @abstractmethod
    def hidden(self, inputs: Inputs, tokens: Tensor | None = None) -> Tensor:
        """[B,L,hidden], the states that actions are read from; the first is that of the prompt's last token, a function
        of the observation alone. `tokens` [B,L] are the actions to score, where the states depend on them."""

    def value(self, inputs: Inputs) -> Tensor:
        value = self._value(self.hidden(inputs))
        if value is None:
            raise TypeError("this policy was configured without a value head; set value_head")
        return value

    def features(self, inputs: Inputs) -> Tensor:
        """[B,hidden], the state at the prompt's last token, float32."""
        with torch.no_grad():
            return self.hidden(inputs)[:, 0].float()

    def _value(self, hidden: Tensor) -> Tensor | None:
        """V [B] from the first of `hidden` [B,L,hidden], that of the prompt's last token; None without a value head."""
        return None if self.value_head is None else self.value_head(hidden[:, 0].float())

    def to_simulator(self, normalised: Tensor) -> Tensor:
        """Normalised actions [B,*,A] -> executable ones, float32."""
        actions = self.action_normaliser.unnormalise(normalised)
        gripper = self.action_spec.gripper
        if gripper is not None:
            actions[..., gripper] = (actions[..., gripper] > 0.5).to(actions.dtype)
        return self._bounded(actions)

    def _bounded(self, actions: Tensor) -> Tensor:
        low, high = (
            torch.tensor(bound, device=actions.device) for bound in (self.action_spec.low, self.action_spec.high)
        )
        return torch.clamp(actions.float(), low, high)

    # -- what is trained -----------------------------------------------------------------------------------------

    def group(self, name: str) -> str:
        """ "vision", "projector" (the state's included), "language", "heads" (regression), "value"."""
        owner, part = name.split(".")[:2]
        return "value" if owner == "value_head" else GROUP_OF[part]

    def adaptable(self) -> Iterator[tuple[str, nn.Module]]:
        yield "language", self.network.language_model
        yield "projector", self.network.projector
        if not self.architecture.vision_lora_rank:  # else it comes with adapters
            yield "vision", self.network.vision_backbone

    def _choose_trained(self) -> None:
        if self.config.lora_rank or self.architecture.regression:
            self.network.language_model.lm_head.requires_grad_(False)  # gets no adapter; an L1 head does not read it
        super()._choose_trained()

    # -- weights -------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint folder in the layout, names and precision of the one it was loaded from, adapters merged.
        The value head goes to a file of its own, which only this policy reads. Raises `UserError` for a policy that was
        not loaded from a folder."""
        if self.checkpoint is None:
            raise UserError("a policy of random weights has no checkpoint layout to be saved in; load one first")
        save_network(self.network, self.checkpoint, Path(folder))
        save_heads(Path(folder), {"value_head": self.value_head})

    def _fit(self, checkpoint: Checkpoint) -> None:
        fitted = {"action": self.action_normaliser}
        if self.architecture.proprio_dim:
            fitted["proprio"] = self.state_normaliser
        for kind, normaliser in fitted.items():
            where = (*checkpoint.dataset, kind)
            statistics = read_statistics(checkpoint.statistics, *where)
            normaliser.fit(statistics, f"{checkpoint.statistics}, {' / '.join(where)}")

    def _action_spec(self, spec: ActionSpec) -> ActionSpec:
        if spec.dim != self.architecture.action_dim:
            raise SpecError(
                f"the network's actions have {self.architecture.action_dim} dimensions, not {spec.dim}: {spec}"
            )
        if spec.gripper is None or self.action_normaliser.mask[spec.gripper]:
            return replace(spec, gripper=None, gripper_open=1, control="")
        low, high, hold = list(spec.low), list(spec.high), list(spec.hold)
        low[spec.gripper], high[spec.gripper] = 0.0, 1.0
        return replace(spec, low=tuple(low), high=tuple(high), hold=tuple(hold), gripper_open=1, control="")


def _observation_spec(config: OpenVLAConfig, state: int, simulator: ObservationSpec) -> ObservationSpec:
    """Images at the simulator's own size, upright: the published preprocessing does the rest."""
    views = {name: _view(name, simulator) for name in config.cameras}
    cameras = {name: CameraSpec(view.height, view.width) for name, view in views.items()}
    chosen = config.state if isinstance(config, OpenVLAOFTConfig) else ()
    names = pick_state(simulator, chosen).state_names
    if chosen and len(names) != state:
        raise SpecError(f"the network's state has {state} numbers, the policy's setting state names {len(names)}")
    return ObservationSpec(state, names, cameras)


def _view(name: str, simulator: ObservationSpec) -> CameraSpec:
    group = next((group for group in CAMERA_ALIASES if name in group), frozenset())
    same = [name] if name in simulator.cameras else [camera for camera in simulator.cameras if camera in group]
    if len(same) != 1:
        has = ", ".join(simulator.cameras) or "none; choose observations with images"
        raise SpecError(f"the policy sees through camera '{name}', the simulator has {has}: set the policy's cameras")
    return simulator.cameras[same[0]]

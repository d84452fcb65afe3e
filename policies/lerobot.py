"""Any policy of LeRobot (`PreTrainedPolicy`) for evaluation and imitation: its module, its processors, its folders.

Reinforcement learning needs the density of an action, of which LeRobot's policies give none. Its flows are policies of
their own here: `pi0`, `pi05` and `smolvla`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl.errors import SpecError, UserError, unknown
from embodied_rl.policies.base import Inputs, Policy
from embodied_rl.policies.images import require_images
from embodied_rl.policies.pretrained import read_json, read_weights
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec
from embodied_rl.types import ActionSample, Observation, Score

IMAGES, STATE, TEXT = "observation.images.", "observation.state", "observation.language."
OWN = ("pi0", "pi05", "smolvla")
"""Types that have a density here, under their own names."""
DETERMINISTIC = ("act",)


@dataclass(frozen=True)
class LeRobotConfig:
    """A folder that LeRobot wrote: config.json, model.safetensors, and both processors."""

    checkpoint: str = ""
    """The folder."""
    cameras: dict[str, str] = field(default_factory=dict)
    """{camera of the checkpoint: simulator's camera} where the names do not tell."""
    chunk: int = 0
    """K, executed actions; 0 = the checkpoint's n_action_steps, which is also the most."""
    backbone: str = ""
    """Folder with the configuration and tokenizer of the vision-language model, for a checkpoint that names a
    repository of the Hugging Face hub instead."""

    def build(self, observation_spec: ObservationSpec, action_spec: ActionSpec) -> LeRobotPolicy:
        """Raises `SpecError` for a simulator with other sizes, `UserError` for a folder without such a policy."""
        return LeRobotPolicy(self, observation_spec, action_spec)


class Wrapper(Policy):
    """What all of LeRobot's policies share: a folder, and observations as its processors want them."""

    def __init__(self, folder: Folder, cameras: dict[str, str], seen: ObservationSpec, action_spec: ActionSpec) -> None:
        super().__init__()
        self.network, self._before, self._after = folder.network, folder.before, folder.after
        theirs = self.network.config
        state = theirs.robot_state_feature.shape[0] if theirs.robot_state_feature else 0
        dim = theirs.action_feature.shape[0]
        if action_spec.choices or dim != action_spec.dim or state not in (0, seen.state):
            raise SpecError(
                f"{folder.path} takes {state} states and gives {dim} continuous actions, "
                f"the simulator has {seen.state} and {action_spec.dim}"
            )
        known: list[str] = [key.removeprefix(IMAGES) for key in theirs.image_features]
        for name in cameras:
            if name not in known:
                raise unknown("camera of the checkpoint", name, known)
        self._views = {IMAGES + name: cameras.get(name, name) for name in known}
        sizes = {name: CameraSpec(*theirs.image_features[key].shape[1:]) for key, name in self._views.items()}
        self.observation_spec = ObservationSpec(state, cameras=sizes)
        self.action_spec = action_spec
        self._tokenize = next((step for step in self._before.steps if hasattr(step, "input_tokenizer")), None)
        if self._tokenize is not None:
            self._tokenize.padding = "max_length"  # one shape for all batches

    def prepare(self, observation: Observation) -> Inputs:
        """Images uint8 [B,H,W,3] and the state under LeRobot's names, and what its processors make of the text. Raises
        `UserError` for an instruction that is too long and for images of another type."""
        require_images(observation, self._views.values())
        inputs = {key: torch.tensor(observation.images[name]) for key, name in self._views.items()}
        if self.observation_spec.state:
            inputs[STATE] = torch.tensor(observation.state)
        if self._tokenize is not None:
            texts = observation.texts()
            self._require_fit(texts)
            seen = self._before({**self._observed(inputs), "task": texts})
            inputs |= {key: value for key, value in seen.items() if key.startswith(TEXT)}
        return {name: value.to(self.device) for name, value in inputs.items()}

    def batch(self, inputs: Inputs) -> dict[str, Any]:
        """What LeRobot's module takes: images [B,3,H,W] in [0, 1], everything normalised with its statistics."""
        text = {key: value for key, value in inputs.items() if key.startswith(TEXT)}
        unread = {"task": [""] * len(next(iter(inputs.values())))} if text else {}
        batch = self._before(self._observed(inputs) | unread) | text
        return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that LeRobot reads. Raises `UserError` when the disk refuses."""
        try:
            self.network.save_pretrained(folder)
            for processor in (self._before, self._after):
                processor.save_pretrained(folder)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error}; free disk space or choose another place") from error

    def _observed(self, inputs: Inputs) -> dict[str, Tensor]:
        kept = {key: value for key, value in inputs.items() if not key.startswith(TEXT)}
        return kept | {key: inputs[key].permute(0, 3, 1, 2).float() / 255 for key in self._views}

    def _require_fit(self, texts: list[str]) -> None:
        """LeRobot would cut what is too long; the line's end, which it may add, takes a token."""
        assert self._tokenize is not None
        for text in set(texts):
            length = len(self._tokenize.input_tokenizer(text)["input_ids"]) + 1
            if length > self._tokenize.max_length:
                raise UserError(
                    f"the prompt of '{shorten(text, 60)}' has {length} tokens, the checkpoint takes "
                    f"{self._tokenize.max_length}: shorten the instruction"
                )


class LeRobotPolicy(Wrapper):
    """Acts by LeRobot's `select_action` and learns by its `forward`; its samples have no log-prob."""

    def __init__(self, config: LeRobotConfig, observation_spec: ObservationSpec, action_spec: ActionSpec) -> None:
        kind = kind_of(config.checkpoint)
        if kind in OWN:
            raise UserError(f"{config.checkpoint} holds LeRobot's '{kind}': use --policy {kind}")
        folder = Folder.open(config.checkpoint, config.backbone)
        super().__init__(folder, config.cameras, observation_spec, action_spec)
        theirs = self.network.config
        most = getattr(theirs, "n_action_steps", 1)
        self.horizon, self.chunk = len(theirs.action_delta_indices or [0]), config.chunk or most
        if not 1 <= self.chunk <= most:
            raise UserError(f"lerobot: needs 1 <= chunk <= {most}, the checkpoint's n_action_steps; got {self.chunk}")
        self._drawn = kind not in DETERMINISTIC

    @torch.no_grad()
    def act(self, inputs: Inputs, deterministic: bool = False, noise: RowNoise | None = None) -> ActionSample:
        """The same whatever `deterministic`. What LeRobot draws comes from torch's generator: with `noise`, from one
        seeded for every row, one row after the other."""
        if noise is None or not self._drawn:
            chunk = self._chunk(inputs)
        else:
            rows = []
            with torch.random.fork_rng():
                for row, seed in enumerate(noise.integers(2**31)):
                    torch.manual_seed(int(seed))
                    rows.append(self._chunk({name: value[row : row + 1] for name, value in inputs.items()}))
            chunk = torch.cat(rows)
        low, high = (torch.tensor(bound) for bound in (self.action_spec.low, self.action_spec.high))
        return ActionSample(torch.clamp(chunk.cpu(), low, high).to(self.device), {})

    def _chunk(self, inputs: Inputs) -> Tensor:
        """[B,K,A]: LeRobot gives one action per call, from a queue that its network filled on the first."""
        self.network.reset()
        batch = self.batch(inputs)
        return torch.stack([self._after(self.network.select_action(dict(batch))) for _ in range(self.chunk)], 1)

    def evaluate_actions(self, inputs: Inputs, trace: dict[str, Tensor]) -> Score:
        raise TypeError("LeRobot's policies give no density of their actions: evaluate, or improve by imitation")

    def imitation_loss(self, inputs: Inputs, actions: Tensor, valid: Tensor) -> Tensor:
        """LeRobot's loss of every row. A policy that reports only the mean of a batch gets one row at a time."""
        self.network.train(self.training)
        batch = self.batch({**inputs, "action": torch.where(valid[..., None], actions, 0.0)})
        batch["action_is_pad"] = ~valid
        loss = torch.zeros(len(actions), device=actions.device)
        kept = valid.any(1).nonzero()[:, 0]
        if not len(kept):
            return loss
        rows = {key: value[kept] for key, value in batch.items() if isinstance(value, Tensor)}
        if "reduction" in signature(self.network.forward).parameters:
            found = self.network.forward(rows, reduction="none")[0]
        else:
            each = [{key: value[i : i + 1] for key, value in rows.items()} for i in range(len(kept))]
            found = torch.stack([self.network.forward(one)[0] for one in each])
        return loss.index_put((kept,), found)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """ "vision", ACT's ResNet, and "policy"."""
        groups: dict[str, list[nn.Parameter]] = {"vision": [], "policy": []}
        for name, parameter in self.named_parameters():
            groups["vision" if name.startswith("network.model.backbone.") else "policy"].append(parameter)
        return groups


def kind_of(checkpoint: str) -> str:
    """LeRobot's name of the policy in a folder. Raises `UserError` when there is none."""
    path = Path(checkpoint, "config.json")
    if not checkpoint or not path.is_file():
        raise UserError(f"no LeRobot policy in '{checkpoint}': set --policy.checkpoint to a folder with a config.json")
    kind = read_json(path).get("type")
    if not isinstance(kind, str):
        raise UserError(f"{path} names no type of a LeRobot policy")
    return kind


@dataclass(frozen=True)
class Folder:
    """What LeRobot reads from a local folder; nothing is downloaded."""

    path: Path
    network: Any
    before: Callable[[dict[str, Any]], dict[str, Any]] | Any
    after: Callable[[Tensor], Tensor] | Any

    @staticmethod
    def open(checkpoint: str, backbone: str = "", **settings: Any) -> Folder:
        """`settings` replace fields of its config.json. Raises `UserError` naming the file that is missing, damaged or
        does not fit."""
        path, kind = Path(checkpoint), kind_of(checkpoint)
        read_weights(path)  # says which file is damaged
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors

        try:
            config: Any = PreTrainedConfig.from_pretrained(path, local_files_only=True)
            if config.n_obs_steps != 1:
                raise UserError(f"{path} looks at {config.n_obs_steps} observations; only policies of one can be used")
            config.device = "cpu"
            if hasattr(config, "pretrained_backbone_weights"):
                config.pretrained_backbone_weights = None  # the folder has the backbone's weights
            if backbone and hasattr(config, "vlm_model_name"):
                config.vlm_model_name, config.load_vlm_weights = backbone, False
            for name, value in settings.items():
                setattr(config, name, value)
            network = get_policy_class(kind).from_pretrained(path, config=config, local_files_only=True, strict=True)
            override = {"tokenizer_processor": {"tokenizer_name": backbone}} if backbone else {}
            before, after = make_pre_post_processors(config, str(path), preprocessor_overrides=override)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
            raise UserError(f"{path} cannot be loaded as LeRobot's '{kind}': {shorten(str(error), 400)}") from error
        _require_statistics(path, before, after)
        return Folder(path, network, before, after)


NEEDED = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
"""Statistics by LeRobot's name of a normalisation."""


def _require_statistics(path: Path, *processors: Any) -> None:
    """LeRobot passes on unchanged what it has no statistics for; say so instead."""
    for processor in processors:
        for step in processor.steps:
            modes = getattr(step, "norm_map", {})
            for key, feature in step.features.items() if modes else ():
                for name in NEEDED.get(modes[feature.type].value if feature.type in modes else "", ()):
                    if f"{key}.{name}" not in step.state_dict():
                        raise UserError(f"{path / processor.name}.json has no statistics '{key}.{name}'; save them")

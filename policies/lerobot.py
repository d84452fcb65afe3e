"""ACT (arXiv 2304.13705) from LeRobot, for evaluation and imitation: its module, its statistics, its folders.

Reinforcement learning needs the density of an action, which ACT, a regression, does not have. LeRobot's flows with
published weights are policies of their own here (pi0, pi05); its SmolVLA cannot be built without files of the Hugging
Face hub.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl.errors import SpecError, UserError, unknown
from embodied_rl.policies.base import Inputs, Policy
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec
from embodied_rl.types import ActionSample, Observation, Score

IMAGES, STATE = "observation.images.", "observation.state"


@dataclass(frozen=True)
class LeRobotACTConfig:
    """A folder that LeRobot wrote: config.json, model.safetensors, and both processors."""

    checkpoint: str = ""
    """The folder."""
    cameras: dict[str, str] = field(default_factory=dict)
    """{camera of the checkpoint: simulator's camera} where the names do not tell."""
    chunk: int = 0
    """K, executed actions; 0 = the checkpoint's n_action_steps."""

    def build(self, observation_spec: ObservationSpec, action_spec: ActionSpec) -> LeRobotACT:
        """Raises `SpecError` for a simulator with other sizes, `UserError` for a folder without such a policy."""
        return LeRobotACT(self, observation_spec, action_spec)


class LeRobotACT(Policy):
    """Deterministic: it acts by LeRobot's `predict_action_chunk`, and its samples have no log-prob."""

    def __init__(self, config: LeRobotACTConfig, observation_spec: ObservationSpec, action_spec: ActionSpec) -> None:
        super().__init__()
        self.network, self._before, self._after = _load(Path(config.checkpoint))
        theirs = self.network.config
        self.horizon, self.chunk = theirs.chunk_size, config.chunk or theirs.n_action_steps
        if not 1 <= self.chunk <= self.horizon:
            raise UserError(f"lerobot_act: needs 1 <= chunk <= {self.horizon}, the checkpoint's; got {self.chunk}")
        state = theirs.robot_state_feature.shape[0] if theirs.robot_state_feature else 0
        dim = theirs.action_feature.shape[0]
        if action_spec.choices or dim != action_spec.dim or state not in (0, observation_spec.state):
            raise SpecError(
                f"{config.checkpoint} takes {state} states and gives {dim} continuous actions, "
                f"the simulator has {observation_spec.state} and {action_spec.dim}"
            )
        known: list[str] = [key.removeprefix(IMAGES) for key in theirs.image_features]
        for name in config.cameras:
            if name not in known:
                raise unknown("camera of the checkpoint", name, known)
        self._views = {IMAGES + name: config.cameras.get(name, name) for name in known}
        sizes = {name: CameraSpec(*theirs.image_features[key].shape[1:]) for key, name in self._views.items()}
        self.observation_spec = ObservationSpec(state, cameras=sizes)
        self.action_spec = action_spec

    def prepare(self, observation: Observation) -> Inputs:
        inputs = {key: torch.tensor(observation.images[name]) for key, name in self._views.items()}
        if self.observation_spec.state:
            inputs[STATE] = torch.tensor(observation.state)
        return {name: value.to(self.device) for name, value in inputs.items()}

    @torch.no_grad()
    def act(self, inputs: Inputs, deterministic: bool = False, noise: RowNoise | None = None) -> ActionSample:
        """The same whatever `deterministic` and `noise`."""
        chunk = self._after(self.network.predict_action_chunk(self._batch(inputs)))[:, : self.chunk]
        low, high = (torch.tensor(bound) for bound in (self.action_spec.low, self.action_spec.high))
        return ActionSample(torch.clamp(chunk.cpu(), low, high).to(self.device), {})

    def evaluate_actions(self, inputs: Inputs, trace: dict[str, Tensor]) -> Score:
        raise TypeError("ACT has no density of its actions: evaluate it, or improve it by imitation")

    def imitation_loss(self, inputs: Inputs, actions: Tensor, valid: Tensor) -> Tensor:
        """LeRobot's loss row by row: L1 over the valid steps, and the divergence of the latent in train mode."""
        self.network.train(self.training)
        batch = self._batch({**inputs, "action": torch.where(valid[..., None], actions, 0.0)})
        batch |= {"action_is_pad": ~valid}
        if self._views:
            batch["observation.images"] = [batch[key] for key in self._views]
        predicted, (mu, log_variance) = self.network.model(batch)
        error = torch.where(valid[..., None], (predicted - batch["action"]).abs(), 0.0)
        loss = error.sum((1, 2)) / (valid.sum(1) * actions.shape[-1]).clamp_min(1)
        if mu is not None:
            divergence = -0.5 * (1 + log_variance - mu.square() - log_variance.exp()).sum(-1)
            loss = loss + self.network.config.kl_weight * divergence
        return torch.where(valid.any(1), loss, 0.0)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """ "vision", the ResNet, and "policy"."""
        groups: dict[str, list[nn.Parameter]] = {"vision": [], "policy": []}
        for name, parameter in self.named_parameters():
            groups["vision" if name.startswith("network.model.backbone.") else "policy"].append(parameter)
        return groups

    def _batch(self, inputs: Inputs) -> dict[str, Any]:
        """What LeRobot's module takes: images [B,3,H,W] in [0, 1], everything normalised with its statistics."""
        images = {key: inputs[key].permute(0, 3, 1, 2).float() / 255 for key in self._views}
        return self._before({**inputs, **images})


def _load(folder: Path) -> tuple[Any, Any, Any]:
    """(policy, preprocessor, postprocessor) of a local folder; nothing is downloaded."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    if not (folder / "config.json").is_file():
        raise UserError(f"no LeRobot policy in '{folder}': set --policy.checkpoint to a folder with a config.json")
    try:
        config: Any = PreTrainedConfig.from_pretrained(folder, local_files_only=True)
        if config.type != "act":
            raise UserError(f"{folder} holds LeRobot's '{config.type}'; only 'act' is supported")
        config.device, config.pretrained_backbone_weights = "cpu", None  # the folder has the backbone's weights
        policy = get_policy_class("act").from_pretrained(folder, config=config, local_files_only=True, strict=True)
        before, after = make_pre_post_processors(config, str(folder))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded as LeRobot's ACT: {error}") from error
    return policy, before, after

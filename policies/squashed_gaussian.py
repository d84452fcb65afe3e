"""Squashed Gaussian policies over action chunks, from states or from images and states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies.base import Inputs
from embodied_rl.policies.mlp import ActionScale, StateNormaliser, state_spec
from embodied_rl.policies.squashed import INSIDE, SquashedGaussian, SquashedPolicy
from embodied_rl.policies.state_policy import StatePolicy
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec, pick_state
from embodied_rl.types import Observation


@dataclass(frozen=True)
class SquashedGaussianMLPConfig:
    """The actor of soft actor-critic, from states."""

    state: tuple[str, ...] = ()
    """Names of the simulator's state that the policy sees, in its order; "hand" means all of "hand.0", "hand.1", ...;
    () = the whole state."""
    chunk: int = 1
    """K, predicted and executed actions."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the actor's MLP."""

    def __post_init__(self) -> None:
        _require("squashed_gaussian_mlp", self.chunk, self.hidden)

    def build(self, observation_spec: ObservationSpec, action_spec: ActionSpec) -> SquashedGaussianMLP:
        """The policy for a simulator with these specs; raises `SpecError` when it cannot serve them."""
        spec = state_spec("squashed_gaussian_mlp", observation_spec, self.state)
        return SquashedGaussianMLP(spec, action_spec, self.chunk, self.hidden)


@dataclass(frozen=True)
class SquashedGaussianCNNConfig:
    """The actor of soft actor-critic, from images and states."""

    state: tuple[str, ...] = ()
    """As in `squashed_gaussian_mlp`."""
    cameras: tuple[str, ...] = ()
    """Names of the simulator's cameras that the policy sees; () = all."""
    chunk: int = 1
    """K, predicted and executed actions."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the actor's MLP."""
    channels: tuple[int, ...] = (32, 32, 32, 32)
    """Of the convolutions, 3 x 3; each halves the image."""
    image_features: int = 128
    """Numbers that describe one camera's image."""

    def __post_init__(self) -> None:
        _require("squashed_gaussian_cnn", self.chunk, self.hidden)
        if not self.channels or self.image_features < 1:
            raise UserError("squashed_gaussian_cnn: needs at least one convolution and one image feature")

    def build(self, observation_spec: ObservationSpec, action_spec: ActionSpec) -> SquashedGaussianCNN:
        """The policy for a simulator with these specs; raises `SpecError` when it cannot serve them."""
        cameras = {name: observation_spec.cameras.get(name) for name in self.cameras or observation_spec.cameras}
        if not cameras or None in cameras.values():
            raise SpecError(
                f"policy 'squashed_gaussian_cnn' sees cameras {', '.join(cameras) or '(any)'}, the simulator has "
                f"{', '.join(observation_spec.cameras) or 'none'}; pick another observation mode"
            )
        spec = replace(pick_state(observation_spec, self.state), cameras=cameras)
        return SquashedGaussianCNN(spec, action_spec, self)


class SquashedGaussianMLP(StatePolicy, SquashedPolicy):
    """u is the chunk itself, scaled from [-1, 1] to the action bounds."""

    def __init__(
        self, spec: ObservationSpec, action_spec: ActionSpec, chunk: int, hidden: tuple[int, ...], images: int = 0
    ) -> None:
        """`images`: how many numbers describe the images, for a subclass that has some."""
        super().__init__()
        self.observation_spec, self.action_spec = spec, action_spec
        self.horizon = self.chunk = chunk
        self.normaliser = StateNormaliser(spec.state)
        self.action_scale = ActionScale(action_spec)
        self.actor = SquashedGaussian(spec.state + images, hidden, chunk, action_spec.dim)

    def decode(self, inputs: Inputs, latent: Tensor) -> Tensor:
        return self.action_scale.to_simulator(latent)

    def to_latent(self, recorded: Tensor) -> Tensor:
        return self.action_scale.to_network(recorded).clamp(-1, 1)

    def trace(self, actions: Tensor) -> dict[str, Tensor]:
        """What `evaluate_actions` scores `actions` [B,K,A] of any origin by; those at a bound, which no x gives, count
        as just inside."""
        return {"x": self.to_latent(actions).clamp(-INSIDE, INSIDE).atanh()}

    def imitation_loss(self, inputs: Inputs, actions: Tensor, valid: Tensor) -> Tensor:
        """[B], the mean squared error of the squashed mean in [-1, 1] units; the deviation is not trained."""
        keep = valid[..., None]
        target = self.to_latent(torch.where(keep, actions, 0.0))
        mean, _ = self.actor(self.features(inputs))
        error = torch.where(keep, mean.tanh() - target, 0.0)
        return error.square().sum((1, 2)) / (valid.sum(1) * actions.shape[-1]).clamp_min(1)

    def sample(self, inputs: Inputs) -> Tensor:
        return self.decode(inputs, self.propose(self.features(inputs))[0])


class SquashedGaussianCNN(SquashedGaussianMLP):
    """With a convolutional encoder per camera, which the critics train (DrQ, arXiv 2004.13649)."""

    def __init__(self, spec: ObservationSpec, action_spec: ActionSpec, config: SquashedGaussianCNNConfig) -> None:
        images = config.image_features * len(spec.cameras)
        super().__init__(spec, action_spec, config.chunk, config.hidden, images)
        encoders = [_encoder(camera, config.channels, config.image_features) for camera in spec.cameras.values()]
        self.encoders = nn.ModuleList(encoders)  # in the order of the cameras, whose names may hold a dot

    def prepare(self, observation: Observation) -> Inputs:
        """Also image.CAMERA uint8 [B,H,W,3], black where there is none."""
        inputs = super().prepare(observation)
        for name in self.observation_spec.cameras:
            mask = torch.asarray(observation.image_mask[name], device=self.device)
            image = torch.asarray(observation.images[name], device=self.device)
            inputs[f"image.{name}"] = image * mask[:, None, None, None]
        return inputs

    def features(self, inputs: Inputs) -> Tensor:
        """[B,F]: the encoders' descriptions of the images and the normalised state; differentiable in the encoders."""
        seen = [super().features(inputs)]
        for name, encoder in zip(self.observation_spec.cameras, self.encoders, strict=True):
            seen.append(encoder(inputs[f"image.{name}"].movedim(-1, 1) / 255 - 0.5))
        return torch.cat(seen, 1)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"policy": list(self.actor.parameters()), "encoder": list(self.encoders.parameters())}


def _encoder(camera: CameraSpec, channels: tuple[int, ...], features: int) -> nn.Sequential:
    """[B,3,H,W] in [-0.5, 0.5] -> [B,features] in (-1, 1)."""
    layers: list[nn.Module] = []
    height, width = camera.height, camera.width
    for before, after in pairwise((3, *channels)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        height, width = (height + 1) // 2, (width + 1) // 2
    last = nn.Linear(channels[-1] * height * width, features)
    return nn.Sequential(*layers, nn.Flatten(), last, nn.LayerNorm(features), nn.Tanh())


def _require(name: str, chunk: int, hidden: tuple[int, ...]) -> None:
    if chunk < 1 or not hidden:
        raise UserError(f"{name}: needs chunk >= 1 and at least one hidden layer, got {chunk} and {hidden}")

"""The policies of soft actor-critic."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies import check
from embodied_rl.policies.check import synthesise
from embodied_rl.policies.flow_mlp import FlowMLPConfig
from embodied_rl.policies.squashed_gaussian import SquashedGaussianCNNConfig, SquashedGaussianMLPConfig
from embodied_rl.registry import policies
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec

CAMERAS = {"front.left": CameraSpec(16, 20), "hand_camera": CameraSpec(9, 9)}
OBSERVATION = ObservationSpec(state=5, cameras=CAMERAS)
ACTION = ActionSpec(low=(-1.0, 0.0, -3.0), high=(1.0, 0.1, 2.0), hold=(0.0, 0.0, 0.0))
PIXELS: dict[str, Any] = {"hidden": (16,), "channels": (4, 4), "image_features": 8}
CONFIGS = [
    SquashedGaussianMLPConfig(hidden=(16, 16)),
    SquashedGaussianMLPConfig(hidden=(16,), chunk=3),
    SquashedGaussianCNNConfig(chunk=2, **PIXELS),
]


def build(config: Any, observation: ObservationSpec = OBSERVATION) -> Any:
    torch.manual_seed(0)
    return config.build(observation, ACTION)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_keeps_the_contract(config):
    policy = build(config)
    policy.set_statistics(np.linspace(-1, 1, 5), np.linspace(0.5, 2, 5))
    check(policy, fresh=lambda: build(config))
    assert policies.name_of(type(config)).startswith("squashed_gaussian")


@pytest.mark.parametrize("shared", [False, True])
def test_a_steered_flow_keeps_the_contract(shared):
    flow = build(FlowMLPConfig(horizon=4, chunk=2, hidden=(16,), value_hidden=(8,)))
    check(flow.steered(5, (16,), shared, 1.5, seed=0))


def test_the_density_is_that_of_the_squashed_gaussian():
    policy = build(SquashedGaussianMLPConfig(hidden=(16,), chunk=2)).double()
    features = torch.randn(50, 5, dtype=torch.float64)
    mean, std = policy.actor(features)
    assert ((std > np.exp(-5)) & (std < np.exp(2))).all()
    latent, log_prob = policy.propose(features)
    exact = TransformedDistribution(Independent(Normal(mean, std), 2), TanhTransform())
    torch.testing.assert_close(log_prob, exact.log_prob(latent), rtol=1e-5, atol=1e-5)
    saturated, log_prob = policy.propose(features, noise=(30 - mean) / std)
    assert (saturated > 1 - 1e-9).all() and log_prob.isfinite().all()


def test_latent_choices_and_actions_are_the_same_thing():
    policy = build(SquashedGaussianMLPConfig(hidden=(16,), chunk=2))
    latent = 2 * torch.rand(9, 2, 3) - 1
    torch.testing.assert_close(policy.to_latent(policy.decode({}, latent)), latent)


def test_images_and_states_matter_and_the_encoder_is_a_group_of_its_own():
    policy = build(CONFIGS[2])
    inputs = policy.prepare(synthesise(policy.observation_spec))
    plain = policy.features(inputs)
    assert plain.shape == (6, 5 + 2 * 8)
    for name in ("state", "image.front.left", "image.hand_camera"):
        other = inputs | {name: torch.zeros_like(inputs[name])}
        assert not torch.equal(policy.features(other)[0], plain[0])
    assert (inputs["image.hand_camera"][1] == 0).all(), "the second row has no camera"
    groups = policy.parameter_groups()
    grown = torch.autograd.grad(plain.sum(), groups["encoder"], allow_unused=True)
    assert all(gradient is not None for gradient in grown)
    assert not {id(p) for p in groups["encoder"]} & {id(p) for p in groups["policy"]}


def test_simulators_that_do_not_fit_are_refused():
    with pytest.raises(SpecError, match="reads the state"):
        build(CONFIGS[0], ObservationSpec(cameras=CAMERAS))
    with pytest.raises(SpecError, match="the simulator has none"):
        build(CONFIGS[2], ObservationSpec(state=5))
    with pytest.raises(SpecError, match=r"sees cameras wrist.*front\.left"):
        build(SquashedGaussianCNNConfig(cameras=("wrist",)))
    for wrong in ({"chunk": 0}, {"hidden": ()}):
        with pytest.raises(UserError, match="needs chunk"):
            SquashedGaussianMLPConfig(**wrong)
    with pytest.raises(UserError, match="at least one convolution"):
        SquashedGaussianCNNConfig(channels=())

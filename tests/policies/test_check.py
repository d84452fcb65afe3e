"""`policies.check` finds what is broken, and nothing in the policies that are registered."""

import copy
from dataclasses import replace

import gr00t_toys
import numpy as np
import openvla_toys
import pi0_toys
import pytest
import torch
import torch.nn.functional as F

from embodied_rl.errors import ContractError
from embodied_rl.policies import check
from embodied_rl.policies.categorical_mlp import CategoricalMLPConfig
from embodied_rl.policies.check import synthesise
from embodied_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from embodied_rl.policies.gaussian_mlp import GaussianMLP, GaussianMLPConfig
from embodied_rl.policies.squashed_gaussian import SquashedGaussianCNNConfig, SquashedGaussianMLPConfig
from embodied_rl.policies.tiny_vla import TinyVLAConfig
from embodied_rl.policies.token_mlp import TokenMLPConfig
from embodied_rl.registry import policies
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec

OBSERVATION = ObservationSpec(state=5)
ACTION = ActionSpec((-1.0, -2.0), (1.0, 2.0), (0.0, 0.0))
CHOICES = ActionSpec((0.0,), (3.0,), (0.0,), control="discrete", choices=4)


class SharesMemory(FlowMLP):
    def prepare(self, observation):
        return {"state": torch.from_numpy(observation.state)}


class NotPerRow(FlowMLP):
    def prepare(self, observation):
        return {**super().prepare(observation), "count": torch.tensor([1.0])}


class PrepareDraws(FlowMLP):
    def prepare(self, observation):
        return {"state": super().prepare(observation)["state"] + 0.01 * torch.randn(1)}


class Dropout(FlowMLP):
    def velocity(self, prefix, x, t):
        return super().velocity(torch.dropout(prefix, 0.5, self.training), x, t)


class BatchStatistics(FlowMLP):
    def encode(self, inputs):
        state = super().encode(inputs)
        return state - state.mean(0)


class IgnoresRowNoise(FlowMLP):
    def act(self, inputs, deterministic=False, noise=None):
        return super().act(inputs, deterministic, None)


class SameNoiseForAll(FlowMLP):
    def act(self, inputs, deterministic=False, noise=None):
        torch.manual_seed(0)
        inputs = {"state": inputs["state"]}
        return super().act(inputs, deterministic, None)


class Unclipped(FlowMLP):
    def to_simulator(self, x, inputs):
        return x * 10


class DoubleActions(FlowMLP):
    def to_simulator(self, x, inputs):
        return super().to_simulator(x, inputs).double()


class ValueSeesNoise(FlowMLP):
    def act(self, inputs, deterministic=False, noise=None):
        sample = super().act(inputs, deterministic, noise)
        sample.value = sample.value + sample.actions.mean((1, 2))
        return sample


class OtherValueInTraining(FlowMLP):
    def value(self, inputs):
        return super().value(inputs) * (2 if torch.is_grad_enabled() else 1)


class OtherValueInScore(FlowMLP):
    def evaluate_actions(self, inputs, trace):
        score = super().evaluate_actions(inputs, trace)
        assert score.value is not None
        score.value = score.value + 1
        return score


class Graph(GaussianMLP):
    act = GaussianMLP.act.__wrapped__


class Inference(GaussianMLP):
    def act(self, inputs, deterministic=False, noise=None):
        with torch.inference_mode():
            return GaussianMLP.act.__wrapped__(self, inputs, deterministic, noise)


class ScoresClippedActions(GaussianMLP):
    def evaluate_actions(self, inputs, trace):
        return super().evaluate_actions(inputs, {"x": trace["x"].clamp(-0.5, 0.5)})


class ScoreWithoutGraph(GaussianMLP):
    @torch.no_grad()
    def evaluate_actions(self, inputs, trace):
        return super().evaluate_actions(inputs, trace)


class TermsBeyondChunk(GaussianMLP):
    def evaluate_actions(self, inputs, trace):
        score = super().evaluate_actions(inputs, trace)
        score.term_step = score.term_step + 1
        return score


class LossIgnoresValid(FlowMLP):
    def imitation_loss(self, inputs, actions, valid, **options):
        return super().imitation_loss(inputs, actions, torch.ones_like(valid), **options)


class LossMultipliesMask(GaussianMLP):
    """0 * NaN is NaN."""

    def imitation_loss(self, inputs, actions, valid):
        error = (self._mean(self.features(inputs)) - actions) * valid[..., None]
        return error.square().sum((1, 2)) / valid.sum(1).clamp_min(1)


class LossDividesByZero(GaussianMLP):
    def imitation_loss(self, inputs, actions, valid):
        return super().imitation_loss(inputs, actions, valid) * valid.sum(1) / valid.sum(1)


class ScalarLoss(GaussianMLP):
    def imitation_loss(self, inputs, actions, valid):
        return super().imitation_loss(inputs, actions, valid).mean()


class DeterministicDraws(GaussianMLP):
    def act(self, inputs, deterministic=False, noise=None):
        return super().act(inputs, deterministic and noise is not None, noise)


class LostParameter(FlowMLP):
    def parameter_groups(self):
        return {name: group[1:] for name, group in super().parameter_groups().items()}


class StateOutsideStateDict(GaussianMLP):
    gain = 1.0

    def to_state(self, inputs):
        return super().features(inputs) * self.gain

    features = to_state


BROKEN = {
    SharesMemory: "share memory",
    NotPerRow: "first axis",
    PrepareDraws: "two calls",
    Dropout: "train mode",
    BatchStatistics: "depend on its batch",
    IgnoresRowNoise: "depend on its batch",
    SameNoiseForAll: "batch|ignores the row noise",
    Unclipped: "bounds",
    DoubleActions: "not float32",
    ValueSeesNoise: "value depends on the noise",
    OtherValueInTraining: "value: differs from act's",
    OtherValueInScore: "evaluate_actions: value differs",
    Graph: "no_grad",
    Inference: "inference tensor",
    ScoresClippedActions: "log_prob differs",
    ScoreWithoutGraph: "not differentiable",
    TermsBeyondChunk: "term_step",
    LossIgnoresValid: "valid step must have loss 0|invalid actions",
    LossMultipliesMask: "NaN",
    LossDividesByZero: "loss 0",
    ScalarLoss: "shape",
    DeterministicDraws: "without noise",
    LostParameter: "in no group",
}


def build(kind):
    torch.manual_seed(0)
    if issubclass(kind, FlowMLP):
        return kind(FlowMLPConfig(horizon=4, chunk=2, hidden=(16,), value_hidden=(16,)), OBSERVATION, ACTION)
    return kind(GaussianMLPConfig(chunk=2, horizon=4, hidden=(16,), value_hidden=(16,)), OBSERVATION, ACTION)


@pytest.mark.parametrize(("kind", "message"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_finds(kind, message):
    with pytest.raises(ContractError, match=message) as caught:
        check(build(kind))
    assert str(caught.value).startswith(kind.__name__)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [FlowMLP, GaussianMLP])
def test_passes_what_is_right(kind):
    check(build(kind))


def test_finds_a_chunk_beyond_the_horizon():
    policy = build(FlowMLP)
    policy.horizon = 1
    with pytest.raises(ContractError, match="chunk <= horizon"):
        check(policy)


def test_finds_state_that_is_not_in_the_state_dict():
    policy = build(StateOutsideStateDict)
    policy.gain = 0.5
    with pytest.raises(ContractError, match="missing from it"):
        check(policy, fresh=lambda: build(StateOutsideStateDict))


def test_leaves_the_policy_and_the_random_state_alone():
    policy = build(FlowMLP).train()
    policy.head.weight.grad = torch.ones_like(policy.head.weight)
    before, random_state = copy.deepcopy(policy.state_dict()), torch.get_rng_state()
    check(policy)
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert policy.training
    assert (policy.head.weight.grad == 1).all()
    assert policy.body[0].weight.grad is None


def test_synthesised_observation_fits_its_spec():
    spec = ObservationSpec(state=3, cameras={"wrist": CameraSpec(4, 6), "front": CameraSpec(8, 5)}, privileged=2)
    observation = synthesise(spec, rows=4)
    assert observation.images["wrist"].shape == (4, 4, 6, 3)
    assert observation.images["front"].dtype == np.uint8
    assert observation.image_mask["front"].tolist() == [True, False, True, True]
    assert observation.state.shape == (4, 3)
    assert observation.privileged is not None
    assert observation.privileged.shape == (4, 2)
    assert len(observation.texts()) == len(observation) == 4
    with pytest.raises(ContractError, match="history"):
        synthesise(ObservationSpec(state=3, history=(2, 1)))


def test_needs_enough_rows():
    with pytest.raises(ContractError, match="at least 4"):
        check(build(FlowMLP), synthesise(OBSERVATION, rows=2))


# -- every registered policy ---------------------------------------------------------------------------------------

SEEN = ObservationSpec(state=5, cameras={"front": CameraSpec(16, 16)})
TINY_VLA = replace(pi0_toys.tiny(False), vocabulary=1024)
CNN = SquashedGaussianCNNConfig(chunk=2, hidden=(16,), channels=(4, 4), image_features=8)


EVERY = {
    "categorical_mlp": lambda: CategoricalMLPConfig(hidden=(16,)).build(OBSERVATION, CHOICES),
    "flow_mlp": lambda: build(FlowMLP),
    "gaussian_mlp": lambda: build(GaussianMLP),
    "gr00t": lambda: gr00t_toys.build(),
    "openvla": lambda: openvla_toys.autoregressive(),
    "openvla_oft": lambda: openvla_toys.parallel(sizes={"proprio_dim": 4}, cameras=("primary", "wrist")),
    "pi0": lambda: pi0_toys.build(),
    "pi05": lambda: pi0_toys.build(adaptive=True),
    "squashed_gaussian_cnn": lambda: CNN.build(SEEN, ACTION),
    "squashed_gaussian_mlp": lambda: SquashedGaussianMLPConfig(chunk=2, hidden=(16,)).build(OBSERVATION, ACTION),
    "tiny_vla": lambda: TinyVLAConfig(network=TINY_VLA).build(SEEN, ACTION),
    "token_mlp": lambda: TokenMLPConfig(chunk=2, hidden=(16,)).build(OBSERVATION, ACTION),
}
LEROBOT = {"lerobot", "lerobot_act", "smolvla"}
"""Policies of folders that LeRobot writes, which is slow to import: checked in test_lerobot.py and test_smolvla.py."""
every = pytest.mark.parametrize("name", EVERY)


@pytest.fixture
def policy(name):
    """With every parameter away from its first value: gates of zero would let no gradient through."""
    torch.manual_seed(0)
    policy = EVERY[name]()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return policy


def test_none_is_forgotten():
    ours = {name for name in policies.names() if policies.target(name).startswith("embodied_rl.")}
    assert EVERY.keys() == ours - LEROBOT


@every
def test_every_policy_keeps_the_contract(policy):
    check(policy)


@every
def test_gradients_reach_what_is_not_frozen_and_nothing_else(policy):
    inputs = policy.prepare(synthesise(policy.observation_spec))
    sample = policy.act(inputs)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    for frozen in [None, *policy.parameter_groups()]:
        for parameter in trained:
            parameter.requires_grad_(True)
        for parameter in policy.parameter_groups()[frozen] if frozen else ():
            parameter.requires_grad_(False)
        if sample.log_prob is None:
            loss = policy.imitation_loss(inputs, sample.actions, torch.ones(sample.actions.shape[:2], dtype=torch.bool))
        else:
            loss = policy.evaluate_actions(inputs, sample.trace).log_prob.sum()
            loss = loss + (policy.value(inputs).sum() if policy.parameter_groups().get("value") else 0)
        policy.zero_grad()
        if loss.requires_grad:
            loss.sum().backward()
        unfrozen = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        reached = {name for name, p in policy.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
        assert (unfrozen - reached, reached - unfrozen) == (set(), set()), frozen


@pytest.mark.parametrize("name", ["openvla", "openvla_oft", "pi0", "pi05", "tiny_vla"])
def test_scores_and_values_do_not_depend_on_the_padding_of_prompts(name, policy):
    """GR00T's do: its action head attends to padding, as the original's."""
    inputs = policy.prepare(synthesise(policy.observation_spec))
    sample = policy.act(inputs)
    padded = dict(inputs)
    if "prompt" in inputs:
        padded["prompt"] = F.pad(inputs["prompt"], (7, 0), value=policy.network.pad_token)
    else:
        padded |= {key: F.pad(inputs[key], (0, 7)) for key in ("tokens", "token_mask")}
    score = policy.evaluate_actions(padded, sample.trace)
    torch.testing.assert_close(score.log_prob, sample.log_prob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(policy.value(padded), sample.value, rtol=1e-5, atol=1e-5)

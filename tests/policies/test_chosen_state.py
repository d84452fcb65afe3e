"""Which numbers of a simulator's state a policy sees."""

from dataclasses import replace

import gr00t_toys
import numpy as np
import pi0_toys
import pytest
import torch
from openvla_toys import ACTION, parallel

from embodied_rl.algorithms.imitation import ImitationConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import (
    DemonstrationsConfig,
    EvaluationConfig,
    LoggingConfig,
    RunConfig,
    TrainingConfig,
    override,
)
from embodied_rl.data.demonstrations import read
from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies.check import synthesise
from embodied_rl.policies.flow_mlp import FlowMLPConfig
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.policies.tiny_vla import TinyVLAConfig
from embodied_rl.simulators.metaworld.config import MetaWorldConfig
from embodied_rl.specs import CameraSpec, ObservationSpec, connect
from embodied_rl.training import checkpoint
from embodied_rl.training.run import train

NAMES = (*(f"object.pose.{i}" for i in range(7)), *(f"hand.{i}" for i in range(3)), "gripper")
SEEN = ObservationSpec(
    state=11,
    state_names=NAMES,
    cameras={"agentview": CameraSpec(20, 30), "wrist": CameraSpec(28, 28)},
    quaternion="wxyz",
    quaternion_at=(3,),
)
CONFIGS = {
    "gaussian_mlp": GaussianMLPConfig(),
    "flow_mlp": FlowMLPConfig(),
    "tiny_vla": TinyVLAConfig(),
    "pi0": pi0_toys.configure(),
    "pi05": pi0_toys.configure(adaptive=True),
    "gr00t": gr00t_toys.configure(),
}


def oft(spec, *state):
    return parallel(sizes={"proprio_dim": 4}, seen=spec, state=state)


BUILD = {
    **{
        name: lambda spec, *state, config=config: replace(config, state=state).build(spec, ACTION)
        for name, config in CONFIGS.items()
    },
    "openvla_oft": oft,
}
each = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)


@each
def test_a_policy_sees_the_numbers_it_is_told_to_see(build):
    policy = build(SEEN, "gripper", "hand")
    spec = policy.observation_spec
    assert spec.state_names == ("gripper", "hand.0", "hand.1", "hand.2")
    assert (spec.state, spec.quaternion_at) == (4, ())
    whole = synthesise(SEEN, rows=3)
    seen = connect(SEEN, ACTION, spec, policy.action_spec).observation(whole)
    np.testing.assert_array_equal(seen.state, whole.state[:, [10, 7, 8, 9]])
    hidden = whole.state.copy()
    hidden[:, :7] += 1
    other = connect(SEEN, ACTION, spec, policy.action_spec).observation(replace(whole, state=hidden))
    ours, theirs = (policy.value(policy.prepare(observation)) for observation in (seen, other))
    assert torch.equal(ours, theirs)


@each
def test_a_name_that_the_simulator_has_not_is_refused(build):
    with pytest.raises(UserError, match=r"unknown part of the simulator's state 'hant': did you mean hand"):
        build(SEEN, "hant")
    with pytest.raises(UserError, match=r"'qqq': valid: gripper, hand, object.pose"):
        build(SEEN, "hand", "qqq")
    with pytest.raises(SpecError, match="does not name the numbers of its state"):
        build(replace(SEEN, state_names=()), "hand")


def test_a_network_with_another_number_of_states_refuses_them():
    with pytest.raises(SpecError, match="the network's state has 4 numbers, the policy's setting state names 1"):
        oft(SEEN, "gripper")


def test_a_policy_clones_a_demonstrator_that_sees_more(tmp_path):
    config = RunConfig(
        recipe="",
        simulator=MetaWorldConfig(observation="state+rgb", image_size=16, rendering="plain", num_envs=1, workers=1),
        policy=TinyVLAConfig(chunk=8),
        demonstrations=DemonstrationsConfig(episodes=1),
        imitation=ImitationConfig(steps=1, batch_size=2),
        algorithm=PPOConfig(epochs=1, minibatches=1),
        training=TrainingConfig(env_steps=1, decisions_per_iteration=1),
        evaluation=EvaluationConfig(episodes=1),
        logging=LoggingConfig(tensorboard=False),
    )
    train(override(config, "--policy.state hand,gripper --simulator.max-steps 60".split()), tmp_path)
    (episode,) = read(tmp_path / "demonstrations.h5")
    weights = checkpoint.load(checkpoint.latest(tmp_path / "checkpoints"))["policy"]
    assert episode.states.shape[1] == 39
    mean = torch.from_numpy(episode.states[:-1, :4].mean(0)).double()
    torch.testing.assert_close(weights["state_normaliser.statistics"][0], mean)

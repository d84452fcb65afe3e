"""What is said about memory without having it, against having it."""

import json

import pytest
import torch

from embodied_rl.algorithms.optimization import adam
from embodied_rl.policies.pi0.config import Pi0Config, tiny
from embodied_rl.policies.tiny_vla import TinyVLAConfig
from embodied_rl.registry import simulators
from embodied_rl.simulators.libero.config import LiberoConfig
from embodied_rl.simulators.reset_schedule import RandomSchedule
from embodied_rl.training import memory
from embodied_rl.training.recorded_specs import TABLE, read, recorded

SPECS = recorded(LiberoConfig(image_size=64))


@pytest.mark.parametrize("frozen", [(), ("vision", "language")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_of_the_real_thing(frozen, checkpointing):
    config = TinyVLAConfig(frozen=frozen, gradient_checkpointing=checkpointing)
    shapes, inputs = memory.build_on_meta(config, *SPECS)
    policy = config.build(*SPECS)
    real = policy.prepare(memory.blank(policy.observation_spec))
    assert {name: (each.shape, each.dtype) for name, each in inputs.items()} == {
        name: (each.shape, each.dtype) for name, each in real.items()
    }
    real["token_mask"][:] = True  # shapes do not tell how long the prompt is: it counts whole
    # CPU kernels of attention keep other scratch than the shapes tell
    assert memory.activations(shapes, inputs, 6)[0] == pytest.approx(memory.activations(policy, real, 6)[0], rel=0.1)
    assert memory.activations(shapes, inputs, 6)[1] == memory.activations(policy, real, 6)[1]


def test_nothing_is_allocated():
    policy, inputs = memory.build_on_meta(Pi0Config(network=tiny(False)), *SPECS)
    assert all(tensor.is_meta for tensor in [*policy.parameters(), *policy.buffers(), *inputs.values()])
    assert not torch.nn.Linear(1, 1).weight.is_meta


def test_gradients_and_adam_take_what_is_said():
    parameters = [torch.nn.Parameter(torch.zeros(50, 3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    optimizer = adam(parameters, 1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [each for states in optimizer.state.values() for name, each in states.items() if name != "step"]
    gradients = [parameter.grad for parameter in parameters]
    assert memory.learning(parameters) == memory.size([*gradients, *state])


def test_an_unknown_simulator_has_no_recorded_specs():
    assert recorded(LiberoConfig(observation="state+rgb")) is None


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "entry", json.loads(TABLE.read_text()), ids=lambda entry: "-".join(map(str, entry["settings"].values()))
)
def test_simulators_say_what_was_recorded(entry, tmp_path):
    others = {"libero": {"tasks": (0,)}, "isaaclab": {"reward": "staged"}}.get(entry["simulator"], {})
    config = simulators.load(entry["simulator"])(**entry["settings"], **others, num_envs=1, workers=1)
    with config.build(RandomSchedule(0), log_dir=tmp_path) as simulator:
        assert (simulator.observation_spec, simulator.action_spec) == read(entry)
    assert recorded(config) == read(entry)

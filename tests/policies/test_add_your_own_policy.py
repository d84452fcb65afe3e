"""scripts/add_your_own_policy.py is what docs/policies.md says: a wrapper that every part here works with."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_toys import roll_out, simulate

from embodied_rl import registry
from embodied_rl.algorithms.imitation import ImitationConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.policies import check

SCRIPT = Path(__file__).parents[2] / "scripts" / "add_your_own_policy.py"


@pytest.fixture
def script(monkeypatch):
    """The script as a module, its policy registered for this test alone."""
    monkeypatch.setattr(registry.policies, "_targets", dict(registry.policies._targets))
    spec = importlib.util.spec_from_file_location("add_your_own_policy", SCRIPT)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def policy(script):
    torch.manual_seed(0)
    with simulate() as simulator:
        return registry.policies.load("my_vla")().build(simulator.observation_spec, simulator.action_spec)


def test_it_is_as_short_as_promised():
    assert len([line for line in SCRIPT.read_text().splitlines() if line.strip()]) < 80


def test_keeps_the_contract(policy):
    check(policy)


def test_ppo_improves_it(policy):
    ppo = PPOConfig(epochs=1, minibatches=2, critic_warmup=0).build(policy, 0)
    generator = torch.Generator().manual_seed(0)
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    with simulate() as simulator:
        worker = roll_out(simulator, policy)
        for version in range(2):
            metrics = ppo.learn(worker.collect(decisions=4, version=version), generator)
            assert np.isfinite(list(metrics.values())).all()
    assert all(not torch.equal(before[name], parameter) for name, parameter in policy.named_parameters())


def test_imitation_reads_its_image_and_its_words(policy):
    with simulate() as simulator:
        inputs = policy.prepare(simulator.reset(tickets=np.arange(4)))
    actions = torch.linspace(-1, 1, 4)[:, None, None].expand(4, policy.chunk, 2)
    batch = {"inputs": inputs, "actions": actions, "valid": torch.ones(4, policy.chunk, dtype=torch.bool)}
    cloning, generator = ImitationConfig(steps=100, learning_rate=3e-3).build(policy, 0), torch.Generator()
    losses = [float(cloning.update(batch, generator)["loss"]) for _ in range(100)]
    assert losses[-1] < 0.1 * losses[0]
    for name in ("image", "words"):
        changed = {**inputs, name: torch.zeros_like(inputs[name])}
        assert not torch.allclose(policy.act(changed, True).actions, policy.act(inputs, True).actions, atol=1e-3)

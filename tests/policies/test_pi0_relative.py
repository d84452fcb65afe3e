"""π₀ whose first actions are relative to the state, as openpi's for LIBERO, against a slow version."""

import numpy as np
import pytest
import torch
from pi0_toys import SEEN, both, build, configure, noise

from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies import check
from embodied_rl.policies.check import synthesise
from embodied_rl.specs import ActionSpec


def relative(adaptive=False):
    """Two of the three actions start at the state; statistics as a checkpoint would have them, and bounds far away."""
    far = ActionSpec((-9.0,) * 3, (9.0,) * 3, (0.0,) * 3)
    torch.manual_seed(0)
    policy = configure(adaptive, relative_to_state=2).build(SEEN, far)
    rng = np.random.default_rng(0)
    has = {}
    for normaliser, size in ((policy.state_normaliser, 5), (policy.action_normaliser, 3)):
        mean, std = rng.normal(size=size), rng.uniform(0.3, 0.9, size)
        has = {"mean": mean, "std": std, "q01": mean - 2 * std, "q99": mean + 3 * std}
        normaliser.fit(has, "the test's statistics")
    return policy, has


def slowly_executed(adaptive, x, state, has):
    """The simulator's actions [B,K,3] for the network's, one number after the other."""
    out = np.zeros((*x.shape[:2], 3))
    for row, step, at in np.ndindex(out.shape):
        if adaptive:
            value = (x[row, step, at] + 1) / 2 * (has["q99"][at] - has["q01"][at] + 1e-6) + has["q01"][at]
        else:
            value = x[row, step, at] * (has["std"][at] + 1e-6) + has["mean"][at]
        out[row, step, at] = np.clip(value + (state[row, at] if at < 2 else 0), -9, 9)
    return out


def slow_target(adaptive, actions, state, has):
    """What the network learns to say, [B,H,3]."""
    out = np.zeros(actions.shape)
    for row, step, at in np.ndindex(out.shape):
        value = actions[row, step, at] - (state[row, at] if at < 2 else 0)
        if adaptive:
            out[row, step, at] = (value - has["q01"][at]) / (has["q99"][at] - has["q01"][at] + 1e-6) * 2 - 1
        else:
            out[row, step, at] = (value - has["mean"][at]) / (has["std"][at] + 1e-6)
    return out


@both
def test_relative_actions_start_at_the_state_however_they_are_made(adaptive, monkeypatch):
    policy, has = relative(adaptive)
    check(policy)
    observation = synthesise(policy.observation_spec)
    inputs, ends = policy.prepare(observation), []
    assert inputs["origin"].tolist() == [[*row[:2], 0] for row in observation.state.tolist()]
    ode, chain = policy.sampler.ode, policy.sampler.sample
    monkeypatch.setattr(policy.sampler, "ode", lambda *given: ends.append(ode(*given)) or ends[-1])

    def sampled(*given):
        result = chain(*given)
        ends.append(result[0])
        return result

    monkeypatch.setattr(policy.sampler, "sample", sampled)
    start = torch.randn(6, 4, 32)
    steered = policy.steered(policy.features(inputs).shape[1], (8,), False, 1.5, 0)
    made = {
        "act": policy.act(inputs, noise=noise()).actions,
        "deterministic": policy.act(inputs, deterministic=True, noise=noise()).actions,
        "sample": policy.sample(inputs, start),
        "follow": policy.follow(inputs, start),
        "steered": steered.act(inputs, noise=noise()).actions,
    }
    assert len(ends) == len(made)
    for (name, actions), x in zip(made.items(), ends, strict=True):
        expected = slowly_executed(adaptive, x.double().numpy(force=True), observation.state, has)
        np.testing.assert_allclose(
            actions.numpy(force=True), expected[:, : actions.shape[1]], rtol=0, atol=1e-5, err_msg=name
        )
    (gradient,) = torch.autograd.grad(made["sample"].sum(), policy.network.action_out_proj.weight)
    assert gradient.abs().sum() > 0


@both
def test_imitation_of_relative_actions_learns_the_difference(adaptive, monkeypatch):
    policy, has = relative(adaptive)
    observation = synthesise(policy.observation_spec)
    inputs, seen = policy.prepare(observation), []
    velocity = policy.velocity
    monkeypatch.setattr(policy, "velocity", lambda prefix, x, t: seen.append(x) or velocity(prefix, x, t))
    actions, valid = torch.randn(6, 4, 3), torch.ones(6, 4, dtype=torch.bool)
    valid[2, 2:] = False
    zeros = torch.zeros(6, 4, 32)
    loss = policy.imitation_loss(inputs, actions, valid, noise=zeros, time=torch.full((6,), 0.5))
    expected = slow_target(adaptive, actions.double().numpy(), observation.state, has)
    expected[2, 2:] = 0
    np.testing.assert_allclose(2 * seen[0][..., :3].numpy(), expected, rtol=0, atol=1e-5)
    assert not seen[0][..., 3:].any()
    target = np.pad(expected, ((0, 0), (0, 0), (0, 29)))
    v = velocity(policy.encode(inputs), seen[0], torch.full((6,), 0.5))[0].numpy(force=True)
    error = ((v + target) ** 2 * valid.numpy()[..., None]).sum((1, 2)) / (32 * valid.numpy().sum(1))
    np.testing.assert_allclose(loss.numpy(force=True), error, rtol=1e-4)


@both
def test_relative_actions_go_to_the_network_and_back(adaptive):
    policy, _ = relative(adaptive)
    inputs = policy.prepare(synthesise(policy.observation_spec))
    actions = torch.randn(6, 4, 3)
    torch.testing.assert_close(policy.to_simulator(policy.to_network(actions, inputs), inputs), actions)


def test_relative_actions_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(SpecError, match="pi0: relative_to_state is 4, state and actions share 3 numbers"):
        build(relative_to_state=4)
    with pytest.raises(UserError, match="layout 'openpi'"):
        build(relative_to_state=2).save_pretrained(tmp_path, "lerobot")

import dataclasses
import math

import numpy as np
import pytest
import torch
from algorithm_toys import ToyGaussian

from embodied_rl.algorithms.optimization import apply, backward
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.errors import UserError
from embodied_rl.types import Trajectory

STEPS, ENVS = 6, 5


def segment(policy, seed=0, reward=None, steps=STEPS, envs=ENVS):
    """Random states; without `reward` random rewards, ends and waiting rows."""
    generator = torch.Generator().manual_seed(seed)
    chunk = policy.chunk
    state = torch.randn(steps, envs, policy.observation_spec.state, generator=generator)
    torch.manual_seed(seed)
    inputs = {"state": state.flatten(0, 1)}
    sample = policy.act(inputs)

    def rows(x):
        return x.unflatten(0, (steps, envs))

    def draw(probability, *shape):
        return torch.rand(shape, generator=generator) < probability

    nothing = torch.zeros(steps, envs, chunk, dtype=torch.bool)
    valid, terminated, truncated = ~nothing, nothing.clone(), nothing.clone()
    actions = rows(sample.actions)
    if reward is None:
        numbers = torch.randn(steps, envs, chunk, generator=generator)
        terminated[..., 0], truncated[..., -1] = draw(0.2, steps, envs), draw(0.2, steps, envs)
        valid[..., 1:] &= ~terminated[..., :1]
        truncated &= valid
        valid &= draw(0.8, steps, envs)[..., None]
    else:
        numbers = reward(actions)
        terminated[..., -1] = True
    return Trajectory(
        inputs={"state": state},
        trace={name: rows(x) for name, x in sample.trace.items()},
        actions=actions,
        log_prob=rows(sample.log_prob),
        value=rows(policy.value(inputs).detach()),
        last_value=torch.randn(envs, generator=generator),
        final_value=torch.randn(steps, envs, generator=generator),
        reward=numbers,
        terminated=terminated,
        truncated=truncated,
        valid=valid,
        tickets=torch.zeros(steps, envs, dtype=torch.int64),
        version=0,
    )


def parameters(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def learned(trajectory_of, config, seed=0, iterations=1):
    """(policy, metrics of the last iteration) after learning from `trajectory_of(policy, iteration)`."""
    policy = ToyGaussian()
    algorithm = config.build(policy, seed)
    generator = torch.Generator().manual_seed(seed)
    metrics = {}
    for iteration in range(iterations):
        metrics = algorithm.learn(trajectory_of(policy, iteration), generator)
    return policy, metrics


@pytest.mark.parametrize("granularity", ["chunk", "action", "token"])
def test_it_finds_the_rewarded_action(granularity):
    def reward(actions):
        return -(actions - torch.tensor([0.8, -0.4])).square().sum(-1)

    config = PPOConfig(learning_rate=2e-2, granularity=granularity, critic_warmup=1, gamma=0.9)
    policy, metrics = learned(lambda p, i: segment(p, i, reward, 16, 16), config, iterations=25)
    first = learned(lambda p, i: segment(p, i, reward, 16, 16), config)[1]
    assert metrics["return"] > 0.35 * first["return"], (first, metrics)
    mean = policy.mean.bias.detach().reshape(2, 2).mean(0)
    assert (mean - torch.tensor([0.8, -0.4])).abs().max() < 0.25, mean


@pytest.mark.parametrize("granularity", ["chunk", "action", "token"])
def test_the_first_update_starts_at_ratio_one(granularity):
    config = PPOConfig(epochs=1, minibatches=1, critic_warmup=0, granularity=granularity)
    _, metrics = learned(lambda p, i: segment(p), config)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    if granularity == "chunk":  # one ratio per decision: the mean normalised advantage
        assert metrics["policy_loss"] == pytest.approx(0, abs=1e-6)
    entropy_of_a_dimension = -0.5 + 0.5 * (1 + math.log(2 * math.pi))
    if granularity == "token":
        assert metrics["entropy"] == pytest.approx(entropy_of_a_dimension, rel=1e-5)


def test_rows_without_a_valid_step_enter_nothing():
    def dirty(filling):
        def make(policy, _):
            trajectory = segment(policy)
            waiting = ~trajectory.valid.any(-1)
            assert waiting.any() and not waiting.all()
            for tensor in (
                trajectory.inputs["state"],
                trajectory.trace["x"],
                trajectory.log_prob,
                trajectory.reward,
                trajectory.final_value,
            ):
                tensor[waiting] = filling
            # what a decision before a waiting row bootstraps from is still looked at, unless its episode ended
            trajectory.truncated[:-1, :, 0] |= waiting[1:] & trajectory.valid[:-1, :, 0]
            trajectory.value[waiting] = filling
            return trajectory

        return make

    config = PPOConfig(critic_warmup=0)
    (clean, expected), (other, metrics) = learned(dirty(0.0), config), learned(dirty(math.nan), config)
    assert metrics == expected
    assert torch.equal(parameters(clean), parameters(other))
    trajectory = dirty(0.0)(ToyGaussian(), 0)
    assert metrics["decisions"] == trajectory.valid.any(-1).sum()


def test_a_segment_without_any_valid_step_changes_nothing():
    def make(policy, _):
        trajectory = segment(policy)
        trajectory.valid[:] = False
        return trajectory

    policy, metrics = learned(make, PPOConfig(critic_warmup=0))
    assert metrics == {"decisions": 0, "updates": 0}
    assert torch.equal(parameters(policy), parameters(ToyGaussian()))


def test_the_order_of_environments_does_not_matter():
    order = torch.tensor([3, 0, 4, 1, 2])

    def shuffled(policy, _):
        trajectory = segment(policy)
        by_row = {name: array[:, order] for name, array in trajectory.arrays().items() if name != "episodes"}
        return dataclasses.replace(
            trajectory,
            **by_row,
            inputs={name: x[:, order] for name, x in trajectory.inputs.items()},
            trace={name: x[:, order] for name, x in trajectory.trace.items()},
            last_value=trajectory.last_value[order],
        )

    config = PPOConfig(critic_warmup=0, epochs=2, minibatches=1)
    one, two = learned(lambda p, i: segment(p), config)[0], learned(shuffled, config)[0]
    torch.testing.assert_close(parameters(one), parameters(two), rtol=1e-4, atol=1e-6)


def test_warmup_trains_the_critic_alone():
    policy, metrics = learned(lambda p, i: segment(p), PPOConfig(critic_warmup=1))
    fresh = ToyGaussian()
    assert torch.equal(policy.mean.weight, fresh.mean.weight) and torch.equal(policy.log_std, fresh.log_std)
    assert not torch.equal(policy.value_head.weight, fresh.value_head.weight)
    assert "policy_loss" not in metrics and metrics["value_loss"] > 0
    policy, _ = learned(lambda p, i: segment(p, i), PPOConfig(critic_warmup=1), iterations=2)
    assert not torch.equal(policy.mean.weight, fresh.mean.weight)


def test_no_gradient_is_left_behind():
    policy, _ = learned(lambda p, i: segment(p), PPOConfig(critic_warmup=0))
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_each_optimizer_clips_its_own_gradient():
    small, large = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))
    optimizers = {"small": torch.optim.SGD([small], lr=1.0), "large": torch.optim.SGD([large], lr=1.0)}
    small.grad = torch.full_like(small, 1e6)  # a leftover that must not count
    norms = backward((0.3 * small).sum() + (1000 * large).sum(), optimizers)
    apply(optimizers, norms, max_grad_norm=1.0)
    torch.testing.assert_close(small.detach(), torch.full((2,), -0.3))
    assert large.detach().norm() == pytest.approx(1, rel=1e-4)
    assert norms["large"] == pytest.approx(1000 * math.sqrt(3), rel=1e-5)


def test_every_epoch_is_a_fresh_shuffle_from_the_generator():
    algorithm = PPOConfig(epochs=3, minibatches=4).build(ToyGaussian(), 0)

    def orders(seed):
        parts = list(algorithm._minibatches(22, torch.Generator().manual_seed(seed)))
        assert [len(part) for part in parts[:4]] == [6, 6, 5, 5]
        return [torch.cat(parts[4 * e : 4 * e + 4]).tolist() for e in range(3)]

    first = orders(0)
    assert all(sorted(order) == list(range(22)) for order in first)
    assert first[0] != first[1] != first[2] != first[0]
    assert first == orders(0) != orders(1)


def test_the_same_generator_gives_the_same_result():
    config = PPOConfig(critic_warmup=0)
    (one, first), (two, second) = (learned(lambda p, i: segment(p), config, seed=3) for _ in range(2))
    assert first == second and torch.equal(parameters(one), parameters(two))


@pytest.mark.parametrize(("field", "tensor"), [("reward", "value_loss"), ("log_prob", "policy_loss")])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(field, tensor):
    policy = ToyGaussian()
    algorithm = PPOConfig(critic_warmup=0, epochs=1, normalize_advantages=False).build(policy, 0)
    trajectory = segment(policy)
    before = parameters(policy)
    getattr(trajectory, field)[trajectory.valid.any(-1)] = math.nan
    with pytest.raises(UserError, match=rf"{tensor} is nan in update 0"):
        algorithm.learn(trajectory, torch.Generator())
    assert torch.equal(parameters(policy), before)


def test_target_kl_stops_before_the_policy_moves_further():
    _, free = learned(lambda p, i: segment(p), PPOConfig(critic_warmup=0, learning_rate=3e-2))
    policy, held = learned(lambda p, i: segment(p), PPOConfig(critic_warmup=0, learning_rate=3e-2, target_kl=0.02))
    assert free["updates"] == 20 and 1 <= held["updates"] < 20
    assert held["approx_kl"] <= 0.02 < free["approx_kl"]
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_a_segment_from_far_away_weights_is_left_alone():
    def stale(policy, _):
        trajectory = segment(policy)
        trajectory.log_prob -= 5
        return trajectory

    policy, metrics = learned(stale, PPOConfig(critic_warmup=0, target_kl=0.1))
    assert metrics["updates"] == 0
    assert torch.equal(parameters(policy), parameters(ToyGaussian()))


def test_terms_of_the_whole_chunk_have_no_action():
    class Joint(ToyGaussian):
        def evaluate_actions(self, inputs, trace):
            score = super().evaluate_actions(inputs, trace)
            return dataclasses.replace(score, term_step=torch.full_like(score.term_step, -1))

    policy = Joint()
    algorithm = PPOConfig(critic_warmup=0, granularity="action").build(policy, 0)
    with pytest.raises(UserError, match="use 'chunk'"):
        algorithm.learn(segment(policy), torch.Generator())
    algorithm = PPOConfig(critic_warmup=0, granularity="chunk").build(policy, 0)
    assert algorithm.learn(segment(policy), torch.Generator())["updates"] == 20


def test_counters_come_back():
    algorithm = PPOConfig().build(ToyGaussian(), 0)
    algorithm.load_counters({"iterations": 7, "updates": 90})
    assert algorithm.counters() == {"iterations": 7, "updates": 90}


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"gamma": 1.5}, {"dual_clip": 0.5}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        PPOConfig(**wrong)


def test_frozen_policies_are_refused():
    with pytest.raises(UserError, match="nothing to train"):
        PPOConfig().build(ToyGaussian().requires_grad_(False), 0)


def test_reward_and_discount_follow_gamma_per():
    policy = ToyGaussian()
    trajectory = segment(policy, reward=lambda actions: torch.ones(actions.shape[:-1]))
    by_step = PPOConfig(gamma=0.5, gamma_per="step").build(policy, 0).prepare(trajectory)
    by_decision = PPOConfig(gamma=0.5).build(policy, 0).prepare(trajectory)
    np.testing.assert_allclose(by_step["returns"], 1.5, rtol=1e-6)
    np.testing.assert_allclose(by_decision["returns"], 2.0, rtol=1e-6)


def test_rewards_are_scaled():
    policy = ToyGaussian()
    plain = PPOConfig().build(policy, 0).prepare(segment(policy, reward=lambda a: a[..., 0]))
    tenth = PPOConfig(reward_scale=0.1).build(policy, 0).prepare(segment(policy, reward=lambda a: 10 * a[..., 0]))
    assert plain["returns"].std() > 0
    torch.testing.assert_close(tenth["returns"], plain["returns"])


@pytest.mark.parametrize("proximal", ["recomputed", "interpolated"])
def test_without_lag_the_decoupled_loss_is_the_plain_one(proximal):
    plain, expected = learned(lambda p, i: segment(p), PPOConfig(critic_warmup=0))
    config = PPOConfig(critic_warmup=0, staleness=1, proximal=proximal)
    policy, metrics = learned(lambda p, i: segment(p), config)
    assert metrics.pop("dropped") == 0
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(parameters(policy), parameters(plain), rtol=1e-4, atol=1e-5)


def older(shift):
    """A segment that weights collected to which its actions were likelier by `shift` per chunk."""

    def make(policy, _):
        trajectory = segment(policy)
        trajectory.log_prob += shift / trajectory.log_prob.shape[-1]
        trajectory.valid[:] = True
        trajectory.version = -1
        return trajectory

    return make


def test_what_the_behavior_made_unlikely_is_left_out():
    policy, metrics = learned(older(-0.8), PPOConfig(critic_warmup=0, staleness=1, max_importance_weight=2.0))
    assert metrics["dropped"] == 1 and metrics["policy_loss"] == 0
    assert torch.equal(policy.mean.weight, ToyGaussian().mean.weight)
    assert not torch.equal(policy.value_head.weight, ToyGaussian().value_head.weight)


@pytest.mark.parametrize(("proximal", "ratio"), [("recomputed", 1.0), ("interpolated", math.exp(-0.3))])
def test_a_stale_segment_is_weighted_and_clipped_around_the_weights_at_the_start(proximal, ratio):
    """Weights one update old: half of the way is the behavior's, half the current update's (`interpolate`)."""
    config = PPOConfig(
        critic_warmup=0, epochs=1, minibatches=1, staleness=1, proximal=proximal, normalize_advantages=False
    )
    _, metrics = learned(older(0.6), config)
    algorithm = config.build(ToyGaussian(), 0)
    advantages = algorithm.prepare(older(0.6)(algorithm.policy, 0))["advantages"]
    weight = math.exp(-0.6) / ratio
    losses = torch.maximum(-advantages * ratio, -advantages * min(max(ratio, 0.8), 1.2))
    assert metrics["policy_loss"] == pytest.approx(float((weight * losses).mean()), rel=1e-4)
    assert metrics["clip_fraction"] == (0 if ratio == 1 else pytest.approx(float((advantages < 0).float().mean())))


def test_the_learning_rate_follows_the_kl():
    def rate(wanted):
        policy = ToyGaussian()
        algorithm = PPOConfig(critic_warmup=0, learning_rate=1e-3, adapt_to_kl=wanted).build(policy, 0)
        for seed in range(2):
            algorithm.learn(segment(policy, seed), torch.Generator().manual_seed(0))
        value = algorithm.optimizers()["value"].param_groups[0]["lr"]
        assert value == algorithm.config.value_learning_rate
        return algorithm.optimizers()["policy"].state_dict()["param_groups"][0]["lr"]

    assert rate(1e-9) == pytest.approx(1e-3 / 1.5**2)
    assert rate(1e3) == pytest.approx(1e-3 * 1.5**2)


def test_over_episodes_a_long_one_weighs_as_much_as_a_short_one():
    def lopsided(policy, _):
        trajectory = segment(policy, reward=lambda actions: torch.zeros(actions.shape[:-1]))
        trajectory.tickets[:] = 1
        trajectory.tickets[0] = 0  # an episode of one decision before one of five
        return trajectory

    config = PPOConfig(critic_warmup=0, epochs=1, minibatches=1, mean_over="episodes")
    data = config.build(ToyGaussian(), 0).prepare(lopsided(ToyGaussian(), 0))
    rows = data["weight"].view(STEPS, ENVS)
    assert rows[0].sum() == pytest.approx(1) and rows[1:].sum() == pytest.approx(1)

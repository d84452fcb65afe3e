"""Small tasks of Gymnasium that other libraries are known on; `benchmarks/learning/` runs both sides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.algorithms.sac import SACConfig
from embodied_rl.config import DemonstrationsConfig, EvaluationConfig, RunConfig, TrainingConfig
from embodied_rl.policies.categorical_mlp import CategoricalMLPConfig
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.policies.squashed_gaussian import SquashedGaussianMLPConfig
from embodied_rl.simulators.gymnasium.config import GymnasiumConfig


def cartpole_ppo() -> RunConfig:
    """CartPole-v1, PPO (arXiv 1707.06347) of a policy that chooses between two actions."""
    algorithm = PPOConfig(
        learning_rate=1e-3,
        value_learning_rate=1e-3,
        gamma=0.98,
        gae_lambda=0.8,
        epochs=20,
        minibatches=1,
        max_grad_norm=0.5,
        critic_warmup=0,
    )
    return RunConfig(
        recipe="cartpole_ppo",
        simulator=GymnasiumConfig("CartPole-v1", num_envs=8, workers=None),
        policy=CategoricalMLPConfig(),
        algorithm=algorithm,
        training=_training(100_000, 32, every=39),
        evaluation=EvaluationConfig(episodes=20),
    )


def half_cheetah_ppo() -> RunConfig:
    """HalfCheetah-v5, PPO."""
    algorithm = PPOConfig(
        learning_rate=3e-4,
        value_learning_rate=3e-4,
        gamma=0.99,
        epochs=10,
        minibatches=8,
        max_grad_norm=0.5,
        critic_warmup=0,
        reward_scale=0.1,
    )
    return RunConfig(
        recipe="half_cheetah_ppo",
        simulator=GymnasiumConfig("HalfCheetah-v5", num_envs=8, workers=None),
        policy=GaussianMLPConfig(hidden=(64, 64), value_hidden=(64, 64), initial_log_std=0.0),
        algorithm=algorithm,
        training=replace(_training(400_000, 256, every=20), statistics_episodes=8),
        evaluation=EvaluationConfig(episodes=20),
    )


def pendulum_sac() -> RunConfig:
    """Pendulum-v1, soft actor-critic (arXiv 1812.05905)."""
    algorithm = SACConfig(learning_rate=1e-3, critic_learning_rate=1e-3, temperature_learning_rate=1e-3)
    return _off_policy("pendulum_sac", "Pendulum-v1", algorithm, env_steps=6000, episode=200)


def pendulum_crossq() -> RunConfig:
    """Pendulum-v1, CrossQ (arXiv 1902.05605)."""
    algorithm = SACConfig(
        learning_rate=1e-3,
        critic_learning_rate=1e-3,
        temperature_learning_rate=1e-3,
        tau=None,
        critic_norm="batch_renorm",
        actor_norm="batch_renorm",
        critic_hidden=(512, 512),
        adam_beta1=0.5,
        actor_every=3,
    )
    return _off_policy("pendulum_crossq", "Pendulum-v1", algorithm, env_steps=5000, episode=200)


def fetch_reach_sac() -> RunConfig:
    """FetchReachDense-v4, soft actor-critic."""
    algorithm = SACConfig(
        learning_rate=1e-3,
        critic_learning_rate=1e-3,
        temperature_learning_rate=1e-3,
        initial_temperature=0.1,
        gamma=0.9,
        learning_starts=500,
    )
    return _off_policy("fetch_reach_sac", "FetchReachDense-v4", algorithm, env_steps=6000, episode=50)


def fetch_reach_rlpd() -> RunConfig:
    """FetchReach-v4, whose reward tells only whether the hand is at the goal, by RLPD (arXiv 2302.02948): half of every
    batch is from 20 scripted demonstrations."""
    algorithm = SACConfig(
        gamma=0.95,
        critics=5,
        target_critics=2,
        critic_norm="layer",
        actor_q="mean",
        entropy_backup=False,
        initial_temperature=0.1,
        symmetric=True,
        learning_starts=500,
    )
    return _off_policy(
        "fetch_reach_rlpd",
        "FetchReach-v4",
        algorithm,
        env_steps=3000,
        episode=50,
        demonstrations=DemonstrationsConfig(episodes=20, noise=0.3),
    )


def _off_policy(name: str, task: str, algorithm: SACConfig, env_steps: int, episode: int, **more: Any) -> RunConfig:
    """One environment, evaluated every 1000 steps; these are whole episodes, so that no evaluation cuts one short."""
    return RunConfig(
        recipe=name,
        simulator=GymnasiumConfig(task, num_envs=1, workers=None),
        policy=SquashedGaussianMLPConfig(),
        algorithm=algorithm,
        training=_training(env_steps, episode, every=1000 // episode),
        evaluation=EvaluationConfig(episodes=20),
        **more,
    )


def _training(env_steps: int, decisions: int, every: int) -> TrainingConfig:
    return TrainingConfig(
        env_steps=env_steps,
        decisions_per_iteration=decisions,
        evaluate_every=every,
        development_episodes=20,
        checkpoint_every=every,
    )

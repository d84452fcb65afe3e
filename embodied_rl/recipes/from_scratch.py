"""Learning without demonstrations, on any simulator with states and continuous actions."""

from __future__ import annotations

from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import EvaluationConfig, RunConfig, TrainingConfig
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.simulators.gymnasium.config import GymnasiumConfig


def ppo() -> RunConfig:
    """PPO from scratch with a Gaussian policy of states; `--simulator NAME --simulator.task TASK` for another task."""
    return RunConfig(
        recipe="ppo",
        simulator=GymnasiumConfig(task="Pendulum-v1", num_envs=16),
        policy=GaussianMLPConfig(hidden=(64, 64), value_hidden=(64, 64)),
        algorithm=PPOConfig(
            learning_rate=1e-3, value_learning_rate=1e-3, gamma=0.9, epochs=10, minibatches=16, critic_warmup=0
        ),
        training=TrainingConfig(env_steps=100_000, decisions_per_iteration=64, checkpoint_every=20),
        evaluation=EvaluationConfig(episodes=20),
    )

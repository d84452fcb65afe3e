"""Small policies from scratch in ManiSkill: PPO, and soft actor-critic with what was added to it."""

from __future__ import annotations

from typing import Any

from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.algorithms.sac import SACConfig
from embodied_rl.config import DemonstrationsConfig, RunConfig, TrainingConfig
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.policies.squashed_gaussian import SquashedGaussianCNNConfig, SquashedGaussianMLPConfig
from embodied_rl.recipes.amounts import Amounts
from embodied_rl.simulators.maniskill.config import ManiSkillConfig


def maniskill_ppo_mlp() -> RunConfig:
    """PickCube-v1 from states and dense rewards, PPO."""
    amounts = Amounts(1024, 1, 50, 1, 6400)
    return RunConfig(
        recipe="maniskill_ppo_mlp",
        simulator=_pick_cube(amounts.envs, reward="normalized_dense"),
        policy=GaussianMLPConfig(),
        algorithm=PPOConfig(
            learning_rate=3e-4,
            value_learning_rate=3e-4,
            gamma=0.8,
            gae_lambda=0.9,
            value_clip=1.0,
            huber_delta=10.0,
            value_coefficient=1.0,
            epochs=8,
            minibatches=amounts.minibatches,
            max_grad_norm=0.5,
            critic_warmup=0,
        ),
        training=amounts.training(200),
    )


def maniskill_sac_mlp() -> RunConfig:
    """PickCube-v1 from states and dense rewards, soft actor-critic (arXiv 1812.05905)."""
    return _sac("maniskill_sac_mlp", tau=0.01)


def maniskill_crossq_mlp() -> RunConfig:
    """PickCube-v1 from states and dense rewards, CrossQ (arXiv 1902.05605)."""
    return _sac("maniskill_crossq_mlp", tau=None, critic_norm="batch_renorm", actor_every=2, adam_beta1=0.5)


def maniskill_rlpd_cnn() -> RunConfig:
    """PickCube-v1 from images and success, RLPD (arXiv 2302.02948): half of every batch is demonstrations. One
    environment, like a robot."""
    return RunConfig(
        recipe="maniskill_rlpd_cnn",
        simulator=_pick_cube(1, workers=1, observation="state+rgb", image_size=128),
        policy=SquashedGaussianCNNConfig(state=("agent.qpos", "extra.tcp_pose")),
        demonstrations=DemonstrationsConfig(episodes=20),
        algorithm=SACConfig(
            batch_size=256,
            gamma=0.96,
            critics=10,
            target_critics=2,
            critic_norm="layer",
            actor_q="mean",
            actor_every=4,
            entropy_backup=False,
            target_entropy=-3.0,
            symmetric=True,
            updates_per_decision=8.0,
            replay_capacity=20_000,
        ),
        training=TrainingConfig(env_steps=20_000, decisions_per_iteration=200, evaluate_every=10),
    )


def _sac(name: str, **more: Any) -> RunConfig:
    return RunConfig(
        recipe=name,
        simulator=_pick_cube(32, reward="normalized_dense"),
        policy=SquashedGaussianMLPConfig(),
        algorithm=SACConfig(
            batch_size=1024,
            gamma=0.8,
            initial_temperature=0.01,
            target_entropy=-4.0,
            updates_per_decision=0.5,
            **more,
        ),
        training=TrainingConfig(env_steps=1_000_000, decisions_per_iteration=100, evaluate_every=50),
    )


def _pick_cube(envs: int, **more: Any) -> ManiSkillConfig:
    return ManiSkillConfig("PickCube-v1", "pd_ee_delta_pos", num_envs=envs, **more)

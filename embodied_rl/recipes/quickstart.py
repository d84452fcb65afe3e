"""The quickstart: a mediocre clone of a few noisy demonstrations becomes reliable, in minutes on two CPU cores."""

from __future__ import annotations

from embodied_rl.algorithms.flow_actor_critic import FlowActorCriticConfig
from embodied_rl.algorithms.imitation import ImitationConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import DemonstrationsConfig, EvaluationConfig, RunConfig, TrainingConfig
from embodied_rl.policies.flow_mlp import FlowMLPConfig
from embodied_rl.simulators.maniskill.config import ManiSkillConfig


def quickstart() -> RunConfig:
    """PickCube-v1 in ManiSkill3: a flow-matching clone of 24 demonstrations, improved off-policy by critics."""
    return RunConfig(
        recipe="quickstart",
        simulator=ManiSkillConfig(
            task="PickCube-v1", control_mode="pd_ee_delta_pos", reward="normalized_dense", num_envs=16, workers=2
        ),
        policy=FlowMLPConfig(horizon=4, chunk=4),
        demonstrations=DemonstrationsConfig(episodes=24, noise=0.05),
        imitation=ImitationConfig(steps=1500),
        algorithm=FlowActorCriticConfig(shaping=1.0),
        training=TrainingConfig(
            env_steps=110_000,
            decisions_per_iteration=16,
            evaluate_every=20,
            checkpoint_every=20,
            stop_at_success=0.97,
            converged_clone_steps=6000,
        ),
        evaluation=EvaluationConfig(episodes=100),
    )


def quickstart_ppo() -> RunConfig:
    """The same clone improved on-policy: PPO on the density of one stochastic denoise step (Flow-SDE)."""
    return RunConfig(
        recipe="quickstart_ppo",
        simulator=ManiSkillConfig(
            task="PickCube-v1", control_mode="pd_ee_delta_pos", reward="sparse", num_envs=16, workers=2
        ),
        policy=FlowMLPConfig(horizon=4, chunk=4, joint=True, noise_level=0.3),
        demonstrations=DemonstrationsConfig(episodes=24, noise=0.05),
        imitation=ImitationConfig(steps=1500),
        algorithm=PPOConfig(learning_rate=8e-5, epochs=6, minibatches=8),
        training=TrainingConfig(env_steps=470_000, decisions_per_iteration=64, evaluate_every=10, checkpoint_every=10),
        evaluation=EvaluationConfig(episodes=100),
    )

"""A small vision-language-action policy, cloned from a few demonstrations and improved from pixels on two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from embodied_rl.algorithms.grpo import GRPOConfig
from embodied_rl.algorithms.imitation import ImitationConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import DemonstrationsConfig, EvaluationConfig, RunConfig, TrainingConfig
from embodied_rl.policies.tiny_vla import TinyVLAConfig
from embodied_rl.simulators.metaworld.config import MetaWorldConfig


def small_vla_ppo() -> RunConfig:
    """Turn a tap on or off in MetaWorld, as told: one camera, the hand's own state and the instruction. PPO on the
    density of all denoise steps (Flow-SDE), from success alone."""
    return RunConfig(
        recipe="small_vla_ppo",
        simulator=MetaWorldConfig(
            tasks=("faucet-open-v3", "faucet-close-v3"),
            observation="state+rgb",  # the demonstrator looks at the state, the policy does not
            reward="sparse",
            placements="random",
            max_steps=120,
            image_size=64,
            rendering="plain",
        ),
        policy=TinyVLAConfig(state=("hand", "gripper"), horizon=8, chunk=8, joint=True, noise_level=0.3),
        demonstrations=DemonstrationsConfig(episodes=24, noise=0.3),
        imitation=ImitationConfig(learning_rate=5e-4, batch_size=32, steps=1000),
        algorithm=PPOConfig(learning_rate=5e-5, epochs=2, minibatches=8, target_kl=0.5),
        training=TrainingConfig(env_steps=300_000, decisions_per_iteration=30, evaluate_every=10),
        evaluation=EvaluationConfig(episodes=100),
    )


def small_vla_grpo() -> RunConfig:
    """The same clone improved by GRPO: eight episodes from each initial state, compared with each other."""
    return replace(
        small_vla_ppo(),
        recipe="small_vla_grpo",
        algorithm=GRPOConfig(
            learning_rate=1e-5, group_size=8, groups_per_iteration=8, drop_uniform=True, epochs=2, minibatches=8
        ),
    )

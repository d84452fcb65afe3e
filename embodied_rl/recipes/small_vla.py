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
    """Turn a tap on or off in MetaWorld, as told: one camera, the hand's own state and the instruction. The clone of a
    few shaky demonstrations is often too slow for the time limit; PPO on the density of a denoise step (Flow-SDE)
    improves it by MetaWorld's dense reward."""
    return RunConfig(
        recipe="small_vla_ppo",
        simulator=MetaWorldConfig(
            tasks=("faucet-open-v3", "faucet-close-v3"),
            observation="state+rgb",  # the demonstrator looks at the whole state, the policy does not
            reward="dense",
            placements="random",
            end_on_success=False,  # or the reward would be to put success off
            max_steps=72,
            image_size=64,
            rendering="plain",
        ),
        policy=TinyVLAConfig(state=("hand", "gripper"), horizon=8, chunk=8, noise_level=0.7),
        demonstrations=DemonstrationsConfig(episodes=16, noise=0.5),
        imitation=ImitationConfig(learning_rate=5e-4, batch_size=32, steps=500),
        algorithm=PPOConfig(
            learning_rate=3e-5, adapt_to_kl=0.05, gamma=0.9, reward_scale=0.01, epochs=3, minibatches=8
        ),
        training=TrainingConfig(
            env_steps=150_000,
            decisions_per_iteration=27,
            evaluate_every=10,
            checkpoint_every=20,
        ),
        evaluation=EvaluationConfig(episodes=100),
    )


def small_vla_grpo() -> RunConfig:
    """The same clone improved by GRPO: eight episodes from each of sixteen initial states, of which those that succeed
    are reinforced. (By returns over their deviation, starts from which all succeed would count as much as others.)"""
    ppo = small_vla_ppo()
    return replace(
        ppo,
        recipe="small_vla_grpo",
        algorithm=GRPOConfig(
            learning_rate=3e-5,
            adapt_to_kl=0.03,
            score="success",
            group_size=8,
            groups_per_iteration=16,
            epochs=3,
            minibatches=16,
        ),
        training=replace(ppo.training, env_steps=165_000, evaluate_every=3, checkpoint_every=6),
    )

"""The quickstart: a mediocre clone of a few noisy demonstrations becomes reliable, in minutes on two CPU cores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from embodied_rl.algorithms.flow_actor_critic import FlowActorCriticConfig
from embodied_rl.algorithms.grpo import DAPOConfig, GRPOConfig, ReinforcePlusPlusConfig
from embodied_rl.algorithms.imitation import ImitationConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.algorithms.sac import SACConfig
from embodied_rl.config import DemonstrationsConfig, EvaluationConfig, RunConfig, TrainingConfig
from embodied_rl.policies.flow_mlp import FlowMLPConfig
from embodied_rl.policies.token_mlp import TokenMLPConfig
from embodied_rl.simulators.maniskill.config import ManiSkillConfig


def quickstart() -> RunConfig:
    """PickCube-v1 in ManiSkill3: a flow-matching clone of 32 noisy demonstrations, improved off-policy by critics."""
    return RunConfig(
        recipe="quickstart",
        simulator=ManiSkillConfig(
            task="PickCube-v1", control_mode="pd_ee_delta_pos", reward="normalized_dense", num_envs=32, workers=2
        ),
        policy=FlowMLPConfig(horizon=4, chunk=4),
        demonstrations=DemonstrationsConfig(episodes=32, noise=0.1),
        imitation=ImitationConfig(steps=1500),
        algorithm=FlowActorCriticConfig(
            shaping=1.0,
            learning_rate=5e-4,
            q_weight=0.05,
            q_warmup_updates=500,
            candidates=8,
            exploration_noise=0.05,
            batch_size=128,
            actor_batch_size=64,
            critic_warmup_updates=500,
        ),
        training=TrainingConfig(
            env_steps=200_000,
            decisions_per_iteration=16,
            retry_failed=0.3,
            evaluate_every=10,
            development_episodes=100,
            checkpoint_every=10,
            stop_at_success=0.97,
            converged_clone_steps=6000,
        ),
        evaluation=EvaluationConfig(episodes=100),
    )


def quickstart_ppo() -> RunConfig:
    """The same clone improved on-policy: PPO on the density of all denoise steps (Flow-SDE), from success alone."""
    start = quickstart()
    return replace(
        start,
        recipe="quickstart_ppo",
        simulator=replace(start.simulator, reward="sparse"),
        policy=FlowMLPConfig(horizon=4, chunk=4, joint=True, noise_level=0.3),
        algorithm=PPOConfig(learning_rate=8e-5, epochs=6, minibatches=8, target_kl=0.5),
        training=replace(
            start.training, env_steps=500_000, decisions_per_iteration=64, retry_failed=0.0, evaluate_every=10
        ),
    )


def quickstart_grpo() -> RunConfig:
    """The same clone improved by GRPO: eight episodes from each of eight initial states, judged by their success."""
    return _groups("quickstart_grpo", GRPOConfig(**_STEPS))


def quickstart_dapo() -> RunConfig:
    """The same by DAPO: groups that all succeed or all fail are replaced by others."""
    return _groups("quickstart_dapo", DAPOConfig(**_STEPS))


def quickstart_reinforce() -> RunConfig:
    """The same by REINFORCE++: 64 initial states, compared over the batch."""
    return _groups("quickstart_reinforce", ReinforcePlusPlusConfig(gamma=0.95, **_STEPS))


def quickstart_token_reinforce() -> RunConfig:
    """A policy that acts in tokens, cloned from twice the demonstrations, which try three times as much, and
    REINFORCE++."""
    algorithm = ReinforcePlusPlusConfig(
        gamma=0.95, learning_rate=1e-4, adapt_to_kl=0.01, granularity="token", epochs=4, minibatches=8
    )
    run = _groups("quickstart_token_reinforce", algorithm)
    return replace(run, policy=TokenMLPConfig(bins=15), demonstrations=DemonstrationsConfig(episodes=64, noise=0.3))


def quickstart_dsrl() -> RunConfig:
    """The same clone stays as it is: soft actor-critic chooses the noise that it starts from (DSRL)."""
    start = quickstart()
    algorithm = SACConfig(
        steer="chunk",
        learning_rate=5e-4,
        critic_learning_rate=5e-4,
        batch_size=256,
        gamma=0.95,
        gamma_per="decision",
        shaping=1.0,
        critic_norm="layer",
        actor_q="mean",
        entropy_backup=False,
        initial_temperature=0.02,
        learning_starts=4000,
        updates_per_decision=0.5,
    )
    training = replace(start.training, env_steps=80_000, retry_failed=0.0, converged_clone_steps=0)
    return replace(start, recipe="quickstart_dsrl", algorithm=algorithm, training=training)


_STEPS: dict[str, Any] = {"learning_rate": 1e-4, "epochs": 4, "minibatches": 4, "target_kl": 0.5}


def _groups(name: str, algorithm: GRPOConfig) -> RunConfig:
    """`quickstart_ppo` with whole episodes, for five minutes."""
    start = quickstart_ppo()
    training = replace(start.training, env_steps=160_000, evaluate_every=15, converged_clone_steps=0)
    simulator = replace(start.simulator, max_steps=50)  # PickCube's own
    return replace(start, recipe=name, simulator=simulator, algorithm=algorithm, training=training)

"""π₀, π₀.₅ and GR00T N1.5, with the settings of pi_RL (arXiv 2510.25889); every one starts from a checkpoint.

The vision-language model stays as it is, the action expert learns in float32: its steps are lost when bfloat16 weights
are rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from embodied_rl.algorithms.grpo import GRPOConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.algorithms.sac import SACConfig
from embodied_rl.config import EvaluationConfig, RunConfig, TrainingConfig
from embodied_rl.policies.gr00t.config import Gr00tConfig
from embodied_rl.policies.pi0.config import Pi0Config, Pi05Config
from embodied_rl.recipes.amounts import Amounts
from embodied_rl.simulators.isaaclab.config import IsaacLabConfig
from embodied_rl.simulators.libero.config import LiberoConfig
from embodied_rl.simulators.maniskill.config import ManiSkillConfig

GROUP = 8
HAND = ("policy.eef_pos", "policy.eef_quat:axis_angle", "policy.gripper_pos")
VIEWS = ("table_cam", "wrist_cam")


# -- LIBERO, PPO ------------------------------------------------------------------------------------------------------


def libero_spatial_ppo_pi0() -> RunConfig:
    """π₀ in LIBERO-Spatial, PPO."""
    return _libero_ppo("libero_spatial_ppo_pi0", "libero_spatial", _pi0, epochs=4)


def libero_object_ppo_pi0() -> RunConfig:
    """π₀ in LIBERO-Object, PPO."""
    return _libero_ppo("libero_object_ppo_pi0", "libero_object", _pi0, epochs=4)


def libero_goal_ppo_pi0() -> RunConfig:
    """π₀ in LIBERO-Goal, PPO."""
    return _libero_ppo("libero_goal_ppo_pi0", "libero_goal", _pi0, epochs=4)


def libero_long_ppo_pi0() -> RunConfig:
    """π₀ in LIBERO-10, the long tasks, PPO."""
    return _libero_ppo("libero_long_ppo_pi0", "libero_10", _pi0, epochs=4)


def libero_spatial_ppo_pi05() -> RunConfig:
    """π₀.₅ in LIBERO-Spatial, PPO."""
    return _libero_ppo("libero_spatial_ppo_pi05", "libero_spatial", _pi05, epochs=1)


def libero_object_ppo_pi05() -> RunConfig:
    """π₀.₅ in LIBERO-Object, PPO."""
    return _libero_ppo("libero_object_ppo_pi05", "libero_object", _pi05, epochs=1)


def libero_goal_ppo_pi05() -> RunConfig:
    """π₀.₅ in LIBERO-Goal, PPO."""
    return _libero_ppo("libero_goal_ppo_pi05", "libero_goal", _pi05, epochs=1)


def libero_long_ppo_pi05() -> RunConfig:
    """π₀.₅ in LIBERO-10, the long tasks, PPO."""
    return _libero_ppo("libero_long_ppo_pi05", "libero_10", _pi05, epochs=1)


def libero_spatial_ppo_gr00t() -> RunConfig:
    """GR00T N1.5 in LIBERO-Spatial, PPO."""
    unit_gripper = partial(_gr00t, unit_gripper=True)
    return _libero_ppo("libero_spatial_ppo_gr00t", "libero_spatial", unit_gripper, 4, batch=1024, adam_beta2=0.999)


# -- LIBERO, GRPO -----------------------------------------------------------------------------------------------------


def libero_spatial_grpo_pi0() -> RunConfig:
    """π₀ in LIBERO-Spatial, GRPO."""
    return _libero_grpo("libero_spatial_grpo_pi0", "libero_spatial", _pi0)


def libero_object_grpo_pi0() -> RunConfig:
    """π₀ in LIBERO-Object, GRPO."""
    return _libero_grpo("libero_object_grpo_pi0", "libero_object", _pi0)


def libero_goal_grpo_pi0() -> RunConfig:
    """π₀ in LIBERO-Goal, GRPO."""
    return _libero_grpo("libero_goal_grpo_pi0", "libero_goal", _pi0)


def libero_long_grpo_pi0() -> RunConfig:
    """π₀ in LIBERO-10, the long tasks, GRPO."""
    return _libero_grpo("libero_long_grpo_pi0", "libero_10", _pi0)


def libero_spatial_grpo_pi05() -> RunConfig:
    """π₀.₅ in LIBERO-Spatial, GRPO."""
    return _libero_grpo("libero_spatial_grpo_pi05", "libero_spatial", _pi05)


def libero_object_grpo_pi05() -> RunConfig:
    """π₀.₅ in LIBERO-Object, GRPO."""
    return _libero_grpo("libero_object_grpo_pi05", "libero_object", _pi05)


def libero_goal_grpo_pi05() -> RunConfig:
    """π₀.₅ in LIBERO-Goal, GRPO."""
    return _libero_grpo("libero_goal_grpo_pi05", "libero_goal", _pi05)


def libero_long_grpo_pi05() -> RunConfig:
    """π₀.₅ in LIBERO-10, the long tasks, GRPO."""
    return _libero_grpo("libero_long_grpo_pi05", "libero_10", _pi05)


# -- elsewhere --------------------------------------------------------------------------------------------------------


def maniskill_ppo_pi0() -> RunConfig:
    """π₀ in ManiSkill, PPO with learned noise (Flow-Noise)."""
    return _maniskill_ppo("maniskill_ppo_pi0", Pi0Config, epochs=4)


def maniskill_ppo_pi05() -> RunConfig:
    """π₀.₅ in ManiSkill, PPO with learned noise (Flow-Noise)."""
    return _maniskill_ppo("maniskill_ppo_pi05", partial(Pi05Config, state_in_prompt=False), epochs=5)


def isaaclab_ppo_gr00t() -> RunConfig:
    """GR00T N1.5 stacks cubes in Isaac Lab, PPO."""
    amounts = Amounts(64, 2, 448, 16, 512, 32)
    algorithm = _ppo(amounts, epochs=3, learning_rate=1e-5, value_learning_rate=2e-5)
    return _isaaclab("isaaclab_ppo_gr00t", _gr00t(amounts.chunk, state=HAND, cameras=VIEWS), algorithm, amounts)


def isaaclab_ppo_pi05() -> RunConfig:
    """π₀.₅ stacks cubes in Isaac Lab, PPO."""
    amounts = Amounts(128, 2, 450, 5, 256, 32)
    return _isaaclab("isaaclab_ppo_pi05", _pi05(amounts.chunk, state=HAND), _ppo(amounts, epochs=3), amounts)


def libero_spatial_dsrl_pi0() -> RunConfig:
    """π₀ in LIBERO-Spatial, its noise chosen by soft actor-critic (DSRL, arXiv 2506.15799); π₀ does not learn."""
    amounts = Amounts(16, 1, 240, 5, 512)
    return RunConfig(
        recipe="libero_spatial_dsrl_pi0",
        simulator=_libero("libero_spatial", amounts),
        policy=Pi0Config(
            chunk=amounts.chunk, relative_to_state=6, frozen=("vision", "language", "expert"), dtype="bfloat16"
        ),
        algorithm=SACConfig(
            learning_rate=1e-4,
            batch_size=amounts.batch,
            gamma=0.999,
            gamma_per="step",
            critics=10,
            actor_q="mean",
            target_entropy=-16.0,
            steer="step",
            updates_per_decision=200 / (amounts.envs * amounts.decisions),
        ),
        training=TrainingConfig(
            env_steps=500 * amounts.envs * amounts.steps, decisions_per_iteration=amounts.decisions
        ),
        evaluation=EvaluationConfig(episodes=500),
    )


# -- what they share --------------------------------------------------------------------------------------------------


def _pi0(chunk: int) -> Pi0Config:
    # the checkpoints to start from predict the hand's six numbers relative to the state
    return Pi0Config(chunk=chunk, denoise_steps=4, relative_to_state=6, dtype="float32")


def _pi05(chunk: int, **more: Any) -> Pi05Config:
    # the checkpoints to start from were trained without the state
    return Pi05Config(horizon=10, chunk=chunk, denoise_steps=3, state_in_prompt=False, dtype="float32", **more)


def _gr00t(chunk: int, **more: Any) -> Gr00tConfig:
    return Gr00tConfig(chunk=chunk, denoise_steps=4, dtype="float32", **more)


def _ppo(
    amounts: Amounts, epochs: int, learning_rate: float = 5e-6, value_learning_rate: float = 1e-4, **more: Any
) -> PPOConfig:
    return PPOConfig(
        learning_rate=learning_rate,
        value_learning_rate=value_learning_rate,
        gamma=0.99,
        gae_lambda=0.95,
        value_clip=0.2,
        huber_delta=10.0,
        value_coefficient=1.0,
        epochs=epochs,
        minibatches=amounts.minibatches,
        microbatch=amounts.microbatch,
        critic_warmup=0,
        **more,
    )


def _libero(suite: str, amounts: Amounts) -> LiberoConfig:
    return LiberoConfig(suite, num_envs=amounts.envs, max_steps=amounts.steps)


def _amounts(suite: str, batch: int = 2048) -> Amounts:
    """Long tasks take twice the steps, in chunks twice as long."""
    return Amounts(64, 8, 480, 10, batch, 128) if suite == "libero_10" else Amounts(64, 8, 240, 5, batch, 128)


def _libero_ppo(
    name: str, suite: str, policy: Any, epochs: int, batch: int = 2048, adam_beta2: float = 0.95
) -> RunConfig:
    amounts = _amounts(suite, batch)
    return RunConfig(
        recipe=name,
        simulator=_libero(suite, amounts),
        policy=policy(amounts.chunk),
        algorithm=_ppo(
            amounts,
            epochs,
            adam_beta2=adam_beta2,
            max_grad_norm=2.0 if suite == "libero_10" else 1.0,
        ),
        training=amounts.training(),
        evaluation=EvaluationConfig(episodes=500),
    )


def _libero_grpo(name: str, suite: str, policy: Any) -> RunConfig:
    amounts = _amounts(suite)
    return RunConfig(
        recipe=name,
        simulator=_libero(suite, amounts),
        policy=policy(amounts.chunk),
        algorithm=GRPOConfig(
            learning_rate=5e-6,
            group_size=GROUP,
            groups_per_iteration=amounts.groups(GROUP),
            score="success",
            keep_mean=(0.1, 0.9),
            epochs=4 if suite == "libero_10" else 2,
            minibatches=amounts.minibatches,
            microbatch=amounts.microbatch,
            adam_beta2=0.95,
        ),
        training=amounts.training(),
        evaluation=EvaluationConfig(episodes=500),
    )


def _maniskill_ppo(name: str, kind: Callable[..., Pi0Config], epochs: int) -> RunConfig:
    amounts = Amounts(320, 1, 80, 5, 5120, 32)
    return RunConfig(
        recipe=name,
        simulator=ManiSkillConfig(
            "PickCube-v1", "pd_ee_delta_pose", "rgb", num_envs=amounts.envs, image_size=224, max_steps=amounts.steps
        ),
        # clipping was tuned for ratios of the mean, not of the sum of a chain's log-probs
        policy=kind(
            horizon=8, chunk=amounts.chunk, method="noise", joint=True, joint_reduction="mean", dtype="float32"
        ),
        algorithm=_ppo(amounts, epochs, 7.91e-6, 1.55e-4, granularity="token", entropy_coefficient=0.005),
        training=amounts.training(),
    )


def _isaaclab(name: str, policy: Any, algorithm: PPOConfig, amounts: Amounts) -> RunConfig:
    return RunConfig(
        recipe=name,
        simulator=IsaacLabConfig(
            "IsaacContrib-Stack-Cube-Franka-IK-Rel-Visuomotor",
            "rgb",
            reward="staged",
            num_envs=amounts.envs,
            max_steps=amounts.steps,
        ),
        policy=policy,
        algorithm=algorithm,
        training=amounts.training(),
    )

"""OpenVLA and OpenVLA-OFT, with the settings of RLinf-VLA (arXiv 2510.06710); every one starts from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from embodied_rl.algorithms.grpo import GRPOConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import EvaluationConfig, RunConfig
from embodied_rl.policies.openvla.config import OpenVLAConfig, OpenVLAOFTConfig
from embodied_rl.recipes.amounts import Amounts
from embodied_rl.simulators.libero.config import LiberoConfig
from embodied_rl.simulators.maniskill.config import ManiSkillConfig

GROUP = 8


def maniskill_ppo_openvla() -> RunConfig:
    """OpenVLA in ManiSkill, PPO of LoRA adapters."""
    return _maniskill_ppo("maniskill_ppo_openvla", _lora(OpenVLAConfig()), Amounts(128, 1, 160, 1, 640, 80))


def maniskill_async_ppo_openvla() -> RunConfig:
    """OpenVLA in ManiSkill, asynchronous PPO of LoRA adapters: the policy that acts is one update behind."""
    return _maniskill_ppo(
        "maniskill_async_ppo_openvla",
        _lora(OpenVLAConfig()),
        Amounts(64, 1, 80, 1, 320, 40),
        clip_low=0.3,
        clip_high=0.3,
        staleness=1,
        max_importance_weight=2.0,
        critic_warmup=40,
    )


def maniskill_grpo_openvla() -> RunConfig:
    """OpenVLA in ManiSkill, GRPO of all weights."""
    policy = replace(_full(OpenVLAConfig()), top_k=50)
    return _grpo("maniskill_grpo_openvla", _maniskill(256), policy, Amounts(256, 1, 80, 1, 640, 40), learning_rate=1e-5)


def maniskill_ppo_openvla_oft() -> RunConfig:
    """OpenVLA-OFT in ManiSkill, PPO of LoRA adapters."""
    policy = _lora(OpenVLAOFTConfig())
    return _maniskill_ppo("maniskill_ppo_openvla_oft", policy, Amounts(128, 1, 160, 8, 640, 40), clip_high=0.28)


def maniskill_grpo_openvla_oft() -> RunConfig:
    """OpenVLA-OFT in ManiSkill, GRPO of LoRA adapters."""
    policy, amounts = replace(_lora(OpenVLAOFTConfig()), value_head=False), Amounts(256, 1, 80, 8, 640, 40)
    return _grpo("maniskill_grpo_openvla_oft", _maniskill(256), policy, amounts, learning_rate=1e-4)


def libero_spatial_grpo_openvla_oft() -> RunConfig:
    """OpenVLA-OFT in LIBERO-Spatial, GRPO of all weights."""
    return _libero_grpo("libero_spatial_grpo_openvla_oft", "libero_spatial", epochs=16)


def libero_long_grpo_openvla_oft() -> RunConfig:
    """OpenVLA-OFT in LIBERO-10, the long tasks, GRPO of all weights."""
    return _libero_grpo("libero_long_grpo_openvla_oft", "libero_10", epochs=16)


def libero_130_grpo_openvla_oft() -> RunConfig:
    """OpenVLA-OFT in all 130 tasks of LIBERO at once, GRPO of all weights."""
    return _libero_grpo("libero_130_grpo_openvla_oft", "libero_130", epochs=64)


def _maniskill(envs: int) -> ManiSkillConfig:
    return ManiSkillConfig(
        "PickCube-v1", "pd_ee_delta_pose", "rgb", reward="sparse", num_envs=envs, image_size=224, max_steps=80
    )


def _lora(policy: Any) -> Any:
    """The adapters are float32; nothing else but the value head learns."""
    return replace(policy, lora_rank=32, lora_alpha=32.0, gradient_checkpointing=True)


def _full(policy: Any) -> Any:
    """float32, because steps this small are lost when bfloat16 weights are rounded."""
    return replace(policy, dtype="float32", value_head=False, gradient_checkpointing=True)


def _maniskill_ppo(name: str, policy: Any, amounts: Amounts, critic_warmup: int = 0, **more: Any) -> RunConfig:
    return RunConfig(
        recipe=name,
        simulator=_maniskill(amounts.envs),
        policy=policy,
        algorithm=PPOConfig(
            learning_rate=1e-4,
            value_learning_rate=3e-3,
            gamma=0.99,
            gae_lambda=0.95,
            value_clip=0.2,
            huber_delta=10.0,
            value_coefficient=1.0,
            granularity="token" if policy.executed > 1 else "action",
            epochs=1,
            minibatches=amounts.minibatches,
            microbatch=amounts.microbatch,
            max_grad_norm=10.0,
            critic_warmup=critic_warmup,
            **more,
        ),
        training=amounts.training(),
    )


def _grpo(name: str, simulator: Any, policy: Any, amounts: Amounts, learning_rate: float, **more: Any) -> RunConfig:
    return RunConfig(
        recipe=name,
        simulator=simulator,
        policy=policy,
        algorithm=GRPOConfig(
            learning_rate=learning_rate,
            clip_high=0.28,
            group_size=GROUP,
            groups_per_iteration=amounts.groups(GROUP),
            score="success",
            granularity="token",
            epochs=1,
            minibatches=amounts.minibatches,
            microbatch=amounts.microbatch,
            **more,
        ),
        training=amounts.training(),
    )


def _libero_grpo(name: str, suite: str, epochs: int) -> RunConfig:
    amounts = Amounts(64, epochs, 512, 8, 16384, 32)
    simulator = LiberoConfig(suite, num_envs=amounts.envs, max_steps=amounts.steps)
    policy = replace(_full(OpenVLAOFTConfig()), temperature=1.6)
    run = _grpo(name, simulator, policy, amounts, learning_rate=2e-5, keep_mean=(0.1, 0.9))
    return replace(run, evaluation=EvaluationConfig(episodes=500))

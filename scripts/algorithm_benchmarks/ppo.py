"""PPO on HalfCheetah-v5: stepping, acting and learning together."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from algorithm_benchmarks.cleanrl import PPOLoop
from algorithm_benchmarks.measuring import Side, compare, repeat

from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.pipeline.rollout import RolloutWorker
from embodied_rl.pipeline.tickets import TicketCounter
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.simulators.gymnasium.config import GymnasiumConfig
from embodied_rl.specs import connect
from embodied_rl.training.on_policy import SegmentWorkflow
from embodied_rl.training.streams import Streams

TASK, ENVS, STEPS, EPOCHS, MINIBATCH, HIDDEN = "HalfCheetah-v5", 16, 64, 5, 256, [256, 256, 256]
SEGMENT = ENVS * STEPS


def measure(rounds: int, smoke: bool) -> dict[str, Any]:
    """Environment steps per CPU second."""
    iterations = 1 if smoke else 2
    steps = iterations * SEGMENT
    workflow, simulator = ours()
    with simulator:
        loop, model = cleanrl(), stable_baselines3()
        envs = [gymnasium.make(TASK) for _ in range(ENVS)]
        sides = {
            "ours": Side(repeat(lambda: workflow.iterate(border=False), iterations), steps),
            "sb3": Side(lambda: model.learn(steps, reset_num_timesteps=False), steps),
            "cleanrl": Side(repeat(loop.iterate, iterations), steps),
        }
        floors = {
            "bare stepping": Side(lambda: step(envs, steps), steps),
            "forward and backward": Side(repeat(passes(), iterations * EPOCHS * SEGMENT // MINIBATCH), steps),
        }
        return compare("ppo", "steps", sides, floors, rounds)


def ours(staleness: int = 0) -> tuple[SegmentWorkflow, Any]:
    """What a run does with this configuration, and its simulator."""
    simulator = GymnasiumConfig(task=TASK, num_envs=ENVS, workers=None).build(Streams(0, 1, 1, 1))
    torch.manual_seed(0)
    policy = GaussianMLPConfig().build(simulator.observation_spec, simulator.action_spec)
    assert GaussianMLPConfig().hidden == GaussianMLPConfig().value_hidden == tuple(HIDDEN)
    algorithm = PPOConfig(
        learning_rate=3e-4,
        value_learning_rate=3e-4,
        gamma=0.99,
        epochs=EPOCHS,
        minibatches=SEGMENT // MINIBATCH,
        max_grad_norm=0.5,
        critic_warmup=0,
        staleness=staleness,
    ).build(policy, 0)
    connection = connect(simulator.observation_spec, simulator.action_spec, policy.observation_spec, policy.action_spec)
    worker = RolloutWorker(simulator, policy, connection, 0)
    workflow = SegmentWorkflow(worker, algorithm, STEPS, torch.Generator().manual_seed(0))
    workflow.restart(TicketCounter(0))
    return workflow, simulator


def stable_baselines3() -> Any:
    """Its PPO, in its default `DummyVecEnv`."""
    from stable_baselines3 import PPO  # pyright: ignore[reportMissingImports]
    from stable_baselines3.common.env_util import make_vec_env  # pyright: ignore[reportMissingImports]

    network = {"net_arch": {"pi": HIDDEN, "vf": HIDDEN}, "activation_fn": torch.nn.Tanh}
    envs = make_vec_env(TASK, ENVS, seed=0)
    sizes = {"n_steps": STEPS, "batch_size": MINIBATCH, "n_epochs": EPOCHS}
    return PPO("MlpPolicy", envs, **sizes, policy_kwargs=network, device="cpu", seed=0)


def cleanrl() -> PPOLoop:
    """CleanRL's loop, in the vector environment that it uses."""
    envs = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make(TASK)] * ENVS)
    return PPOLoop(envs, STEPS, HIDDEN, EPOCHS, MINIBATCH)


def step(envs: list[Any], steps: int) -> None:
    """Step bare environments, one after the other."""
    actions = np.random.default_rng(0).uniform(-1, 1, (ENVS, 6)).astype(np.float32)
    for env in envs:
        env.reset(seed=0)
    for _ in range(steps // ENVS):
        for env, action in zip(envs, actions, strict=True):
            env.step(action)


def passes() -> Any:
    """Forward and backward of actor and critic on one minibatch."""
    state = torch.randn(MINIBATCH, 17)
    sizes = [17, *HIDDEN]
    networks = [[torch.randn(b, a) / a**0.5 for a, b in zip(sizes, [*HIDDEN, out], strict=True)] for out in (6, 1)]
    weights = [weight.requires_grad_() for network in networks for weight in network]

    def run() -> None:
        outputs = []
        for network in networks:
            x = state
            for weight in network[:-1]:
                x = F.linear(x, weight).tanh()
            outputs.append(F.linear(x, network[-1]))
        torch.autograd.grad(outputs, weights, [torch.ones_like(x) for x in outputs])

    return run

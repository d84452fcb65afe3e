"""One run of another library in a process of its own: what `run.py` starts, not meant to be called by hand.

    python benchmarks/learning/peers.py CASE SEED FILE

Its policy is judged by our evaluation, in our simulator, on the episodes that ours is judged on: after every as many
environment steps as in the recipe of the case, and at the end. FILE gets {"curve", "final", "versions"}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embodied_rl import registry
from embodied_rl.config import RunConfig
from embodied_rl.pipeline.rollout import RolloutWorker
from embodied_rl.simulators.base import Simulator
from embodied_rl.specs import connect
from embodied_rl.training.evaluation import EvaluationResult, run_episodes
from embodied_rl.training.report import versions
from embodied_rl.training.streams import Streams
from embodied_rl.types import ActionSample, Observation

# stable-baselines3 and sbx are imported where they are used: only the group `peers` installs them.


def cartpole_ppo(envs: Callable[[int], Any], seed: int) -> Any:
    """As tuned in stable-baselines3's own zoo."""
    from stable_baselines3 import PPO  # pyright: ignore[reportMissingImports]

    return PPO(
        "MlpPolicy",
        envs(8),
        n_steps=32,
        batch_size=256,
        n_epochs=20,
        gamma=0.98,
        gae_lambda=0.8,
        ent_coef=0.0,
        learning_rate=lambda left: 1e-3 * left,
        clip_range=lambda left: 0.2 * left,
        seed=seed,
        device="cpu",
    )


def half_cheetah_ppo(envs: Callable[[int], Any], seed: int) -> Any:
    """Its defaults but for the number of environments, with normalised observations and rewards."""
    from stable_baselines3 import PPO  # pyright: ignore[reportMissingImports]
    from stable_baselines3.common.vec_env import VecNormalize  # pyright: ignore[reportMissingImports]

    return PPO("MlpPolicy", VecNormalize(envs(8)), n_steps=256, batch_size=256, seed=seed, device="cpu")


def pendulum_sac(envs: Callable[[int], Any], seed: int) -> Any:
    from stable_baselines3 import SAC  # pyright: ignore[reportMissingImports]

    return SAC("MlpPolicy", envs(1), learning_rate=1e-3, learning_starts=1000, seed=seed, device="cpu")


def fetch_reach_sac(envs: Callable[[int], Any], seed: int) -> Any:
    from stable_baselines3 import SAC  # pyright: ignore[reportMissingImports]

    return SAC(
        "MultiInputPolicy",
        envs(1),
        learning_rate=1e-3,
        learning_starts=500,
        gamma=0.9,
        ent_coef="auto_0.1",
        seed=seed,
        device="cpu",
    )


def pendulum_crossq(envs: Callable[[int], Any], seed: int) -> Any:
    from sbx import CrossQ  # pyright: ignore[reportMissingImports]

    networks = {"net_arch": {"pi": [256, 256], "qf": [512, 512]}}
    return CrossQ("MlpPolicy", envs(1), learning_starts=1000, policy_kwargs=networks, seed=seed)


class Peer:
    """The acting half of our policy contract, by a model of stable-baselines3's interface."""

    def __init__(self, model: Any, simulator: Simulator) -> None:
        self.model = model
        self.observation_spec, self.action_spec = simulator.observation_spec, simulator.action_spec

    def prepare(self, observation: Observation) -> dict[str, torch.Tensor]:
        return {"state": torch.tensor(observation.state)}

    def act(self, inputs: dict[str, torch.Tensor], deterministic: bool, noise: Any) -> ActionSample:
        """The most likely actions; `deterministic` is always asked for here."""
        actions, _ = self.model.predict(self._seen(inputs["state"].numpy()), deterministic=deterministic)
        actions = np.asarray(actions, np.float32).reshape(len(actions), 1, -1)
        return ActionSample(torch.from_numpy(actions), {})

    def _seen(self, state: np.ndarray) -> Any:
        """Our flattened states [N,S] as the model knows them."""
        from gymnasium.spaces import Dict, unflatten

        space = self.model.observation_space
        if isinstance(space, Dict):
            rows = [unflatten(space, row) for row in state]
            return {name: np.stack([row[name] for row in rows]) for name in space}
        normaliser = self.model.get_vec_normalize_env()
        return state if normaliser is None else normaliser.normalize_obs(state)


def main(case: str, seed: int, file: Path) -> None:
    """Train, judge, write."""
    from stable_baselines3.common.callbacks import BaseCallback  # pyright: ignore[reportMissingImports]
    from stable_baselines3.common.env_util import make_vec_env  # pyright: ignore[reportMissingImports]

    from embodied_rl.simulators.gymnasium.registered import spec

    torch.set_num_threads(1)
    config: RunConfig = registry.recipes.load(case)()
    training, task = config.training, config.simulator.task
    spec(task)  # have it registered
    streams = Streams(seed, 1, training.development_episodes, config.evaluation.episodes)
    judging = replace(config.simulator, num_envs=training.development_episodes)  # their number changes no result
    with judging.build(streams) as simulator:
        model = globals()[case](lambda count: make_vec_env(task, n_envs=count, seed=seed), seed)
        peer: Any = Peer(model, simulator)
        connection = connect(peer.observation_spec, peer.action_spec, peer.observation_spec, peer.action_spec)

        def judge(name: str, stream: str) -> EvaluationResult:
            worker = RolloutWorker(simulator, peer, connection, seed)
            return EvaluationResult.of(name, run_episodes(worker, streams.episodes(stream)))

        curve = [point(0, judge("initial", "test"))]
        every = training.evaluate_every * training.decisions_per_iteration * config.simulator.num_envs

        class Judge(BaseCallback):
            def _on_step(self) -> bool:
                if self.num_timesteps % every == 0:
                    curve.append(point(self.num_timesteps, judge("development", "development")))
                return True

        model.learn(training.env_steps, callback=Judge())
        final = judge("final", "test")
    packages = {name: version(name) for name in ("stable-baselines3", "sbx-rl", "jax")}
    found = {"curve": curve, "final": final.to_dict(), "versions": versions() | packages}
    file.write_text(json.dumps(found))


def point(env_steps: int, result: EvaluationResult) -> dict[str, Any]:
    """Of a curve."""
    return {"env_steps": env_steps, "return": result.mean_return, "success": result.success}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))

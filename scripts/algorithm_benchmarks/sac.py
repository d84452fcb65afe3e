"""Updates of SAC from a replay buffer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import torch
from algorithm_benchmarks.cleanrl import SACLoop
from algorithm_benchmarks.measuring import Side, compare, repeat
from torch import Tensor

from embodied_rl.algorithms.sac import SACConfig
from embodied_rl.data.replay_buffer import ReplayBuffer
from embodied_rl.policies.squashed_gaussian import SquashedGaussianMLPConfig
from embodied_rl.specs import ActionSpec, ObservationSpec

SIZE, WIDTH, BATCH, HIDDEN, CAPACITY = 17, 6, 256, [256, 256], 20_000


def measure(rounds: int, smoke: bool) -> dict[str, Any]:
    """Updates per CPU second."""
    updates = 5 if smoke else 40
    model = stable_baselines3()
    sides = {
        "ours": Side(repeat(ours(), updates), updates),
        "sb3": Side(lambda: model.train(updates, BATCH), updates),
        "cleanrl": Side(repeat(cleanrl().update, updates), updates),
    }
    floors = {"forward and backward": Side(repeat(passes(), updates), updates)}
    return compare("sac", "updates", sides, floors, rounds)


def decisions() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`CAPACITY` made-up ones, the same for all sides: state, action, reward, terminated (every hundredth)."""
    rng = np.random.default_rng(0)
    state = rng.normal(size=(CAPACITY + 1, SIZE)).astype(np.float32)
    action = rng.uniform(-1, 1, (CAPACITY, WIDTH)).astype(np.float32)
    return state, action, rng.normal(size=CAPACITY).astype(np.float32), np.arange(CAPACITY) % 100 == 99


def ours() -> Any:
    """What a run does for an update."""
    bounds = (-1.0,) * WIDTH, (1.0,) * WIDTH, (0.0,) * WIDTH
    torch.manual_seed(0)
    policy = SquashedGaussianMLPConfig().build(ObservationSpec(state=SIZE), ActionSpec(*bounds))
    algorithm = SACConfig(batch_size=BATCH).build(policy, 0)
    buffer, nothing = ReplayBuffer(2 * CAPACITY, 1), np.zeros(1, bool)
    states, actions, rewards, terminated = decisions()
    for i in range(CAPACITY):
        ended = terminated[[i]]
        buffer.add(
            inputs={"state": states[[i]]},
            actions=actions[[i], None],
            reward=rewards[[i], None],
            valid=np.ones((1, 1), bool),
            terminated=ended,
            truncated=nothing,
            success=nothing,
            final_inputs={"state": states[[i + 1]][ended]},
            final_rows=np.flatnonzero(ended),
            tickets=np.array([i // 100]),
            lost=nothing,
        )
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    return lambda: algorithm.update(algorithm.draw(buffer, None, rng), generator)


def stable_baselines3() -> Any:
    """Its SAC with a full replay buffer."""
    from stable_baselines3 import SAC  # pyright: ignore[reportMissingImports]
    from stable_baselines3.common.logger import configure  # pyright: ignore[reportMissingImports]

    model = SAC("MlpPolicy", spaces(), batch_size=BATCH, buffer_size=CAPACITY, device="cpu", seed=0)
    model.set_logger(configure(None, []))
    fill(model.replay_buffer)
    return model


def cleanrl() -> SACLoop:
    """CleanRL's loop."""
    from stable_baselines3.common.buffers import ReplayBuffer as Buffer  # pyright: ignore[reportMissingImports]

    env = spaces()
    replay = Buffer(CAPACITY, env.observation_space, env.action_space, "cpu", handle_timeout_termination=False)
    fill(replay)
    return SACLoop(replay, SIZE, WIDTH, HIDDEN, BATCH)


def spaces() -> gymnasium.Env[Any, Any]:
    """What tells the others their sizes."""
    env = gymnasium.Env[Any, Any]()
    env.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (SIZE,), np.float32)
    env.action_space = gymnasium.spaces.Box(-1, 1, (WIDTH,), np.float32)
    return env


def fill(replay: Any) -> None:
    """Put the decisions into a replay buffer of stable-baselines3."""
    states, actions, rewards, terminated = decisions()
    for i in range(CAPACITY):
        replay.add(states[i], states[i + 1], actions[i], rewards[[i]], terminated[[i]], [{}])


def passes() -> Any:
    """The least that an update takes: actor and target critics forward, critics forward and backward, then actor and
    critics forward and backward to the actor."""
    actor = weights([SIZE, *HIDDEN, 2 * WIDTH], 1)
    critics, targets = (weights([SIZE + WIDTH, *HIDDEN, 1], 2) for _ in range(2))
    state = torch.randn(1, BATCH, SIZE)

    def q_of_actor(networks: list[Tensor]) -> Tensor:
        return forward(torch.cat([state, forward(state, actor)[..., :WIDTH]], 2).expand(2, -1, -1), networks)

    def run() -> None:
        with torch.no_grad():
            q_of_actor(targets)
        q = forward(torch.cat([state, state[..., :WIDTH]], 2).expand(2, -1, -1), critics)
        torch.autograd.grad(q, critics, torch.ones_like(q))
        q = q_of_actor(critics)
        torch.autograd.grad(q, actor, torch.ones_like(q))

    return run


def weights(sizes: list[int], networks: int) -> list[Tensor]:
    """[E,in,out] of every layer."""
    return [(torch.randn(networks, a, b) / a**0.5).requires_grad_() for a, b in pairwise(sizes)]


def forward(x: Tensor, layers: list[Tensor]) -> Tensor:
    """E perceptrons, [E,B,in] -> [E,B,out]."""
    for layer in layers[:-1]:
        x = torch.bmm(x, layer).relu()
    return torch.bmm(x, layers[-1])

"""Collecting demonstrations with a scripted demonstrator, and fitting a policy's statistics to them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from embodied_rl.config import RunConfig
from embodied_rl.data.demonstrations import DemonstrationEpisode, write
from embodied_rl.errors import UserError
from embodied_rl.randomness import RowNoise
from embodied_rl.simulators.base import Demonstrator, Simulator
from embodied_rl.training.streams import Streams
from embodied_rl.types import Observation

_IMAGE = "image."
MAX_TRIES = 20
"""Tries per wanted demonstration before giving up on the demonstrator."""


def demonstrate(
    simulator: Simulator, demonstrator: Demonstrator, streams: Streams, episodes: int, noise: float, seed: int
) -> list[DemonstrationEpisode]:
    """`episodes` successful demonstrations, those with the lowest tickets, in ticket order.

    `noise`: standard deviation of the Gaussian noise on every action, in units of half the action range. Tickets are
    run in rounds of N, so the result does not depend on which episode of a round ends first. Raises `UserError` when
    the demonstrator hardly ever succeeds.
    """
    n = simulator.num_envs
    low, high = np.array(simulator.action_spec.low, np.float32), np.array(simulator.action_spec.high, np.float32)
    first = streams.first("demonstrations")
    found: list[DemonstrationEpisode] = []
    for tried in range(0, MAX_TRIES * max(episodes, n), n):
        tickets = np.arange(first + tried, first + tried + n)
        rows: list[dict[str, list]] = [defaultdict(list) for _ in range(n)]
        observation = simulator.reset(tickets=tickets)
        demonstrator.reset(np.arange(n), observation.task)
        for row in range(n):
            _remember(rows[row], observation, row)
        step, running = 0, np.ones(n, bool)
        while running.any():
            jitter = RowNoise(seed, tickets, np.full(n, step)).normal(len(low))
            actions = demonstrator.actions(np.array(observation.state)) + noise * jitter * (high - low) / 2
            actions = np.clip(actions, low, high).astype(np.float32)
            result = simulator.step(actions[:, None])
            final = dict(zip(result.final_rows.tolist(), range(len(result.final_rows)), strict=True))
            for row in np.flatnonzero(result.lost):  # a dead worker restarted this episode: so do we
                demonstrator.reset(np.array([row]), result.observation.task[[row]])
                rows[row].clear()
                _remember(rows[row], result.observation, row)
            for row in np.flatnonzero(result.valid[:, 0]):
                after = result.observation if row not in final else result.final_observation
                assert after is not None
                record = rows[row]
                _remember(record, after, final.get(int(row), int(row)))
                record["actions"].append(actions[row])
                record["rewards"].append(result.reward[row, 0])
                record["success"].append(result.success is not None and bool(result.success[row, 0]))
                record["terminated"].append(bool(result.terminated[row, 0]))
                record["truncated"].append(bool(result.truncated[row, 0]))
            running[result.final_rows] = False
            observation, step = result.observation, step + 1
        for row, ticket in enumerate(tickets):
            if any(rows[row]["success"]) and len(found) < episodes:
                start = streams.state(int(ticket))
                arrays: dict[str, Any] = {name: np.stack(values) for name, values in rows[row].items()}
                images = {name: arrays.pop(name) for name in list(arrays) if name.startswith(_IMAGE)}
                images = {name.removeprefix(_IMAGE): frames for name, frames in images.items()}
                found.append(DemonstrationEpisode(**arrays, seed=start.seed, images=images, task=start.task))
        if len(found) == episodes:
            return found
    raise UserError(
        f"only {len(found)} of {episodes} demonstrations succeeded in {MAX_TRIES * max(episodes, n)} tries: lower "
        f"demonstrations.noise (now {noise}) or give demonstrations.path"
    )


def _remember(record: dict[str, list], observation: Observation, row: int) -> None:
    """Add a copy of what `row` shows."""
    record["states"].append(np.array(observation.state[row]))
    for name, frames in observation.images.items():
        record[_IMAGE + name].append(np.array(frames[row]))


def collect(config: RunConfig, path: Path, episodes: int) -> dict[str, int | str]:
    """Collect `episodes` demonstrations of a recipe's task into an HDF5 file at `path`."""
    noise = config.demonstrations.noise if config.demonstrations else 0.0
    streams = Streams(config.seed, config.simulator.num_tasks, 1, 1, num_states=config.simulator.num_states)
    demonstrator = config.simulator.demonstrator()
    with config.simulator.build(streams) as simulator:
        found = demonstrate(simulator, demonstrator, streams, episodes, noise, config.seed)
        write(path, found, simulator.tasks[0].name, simulator.action_spec.control)
    return {"path": str(path), "episodes": len(found), "steps": sum(len(episode.actions) for episode in found)}

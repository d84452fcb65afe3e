"""Demonstrations on disk, in the layout of ManiSkill's `RecordEpisode`: `NAME.h5` with one group per episode and
`NAME.json` with what is not an array. ManiSkill's own tools read our files and we read theirs (recorded with rewards
and an observation mode that contains `state`)."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from embodied_rl.errors import UserError
from embodied_rl.files import write_together
from embodied_rl.types import Observation

DIGEST = "metadata_sha256"
"""Attribute of our HDF5 files that tells a torn pair of files from a whole one."""


@dataclass
class DemonstrationEpisode:
    """One episode of T >= 1 steps."""

    states: np.ndarray
    """float32 [T+1,S], the last one after the last action."""
    actions: np.ndarray
    """float32 [T,A] in the simulator's units."""
    rewards: np.ndarray | None
    """float32 [T]; None when none were recorded."""
    success: np.ndarray | None
    """bool [T]; None when the task defines no success."""
    terminated: np.ndarray
    """bool [T]."""
    truncated: np.ndarray
    """bool [T]."""
    seed: int
    """What the simulator was reset with."""
    images: dict[str, np.ndarray] = field(default_factory=dict)
    """{camera: uint8 [T+1,H,W,3]}."""
    task: int = 0
    """Index into the simulator's tasks."""

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def succeeded(self) -> bool:
        """Success at any step; False when the task defines none."""
        return self.success is not None and bool(self.success.any())


def write(path: Path, episodes: Sequence[DemonstrationEpisode], task: str, control_mode: str) -> None:
    """Write `path` (ending in .h5) and its .json sibling, each atomically. Raises `UserError` when that fails."""
    if path.suffix != ".h5":
        raise UserError(f"demonstrations are written to a file ending in .h5, not {path}")
    for index, episode in enumerate(episodes):
        _check(episode, f"episode {index}")
    mode = "state+rgb" if any(episode.images for episode in episodes) else "state"
    metadata = {
        "env_info": {
            "env_id": task,
            "max_episode_steps": max((len(episode) for episode in episodes), default=0),
            "env_kwargs": {"obs_mode": mode, "control_mode": control_mode},
        },
        "source_type": "embodied_rl",
        "episodes": [_metadata(i, episode, control_mode) for i, episode in enumerate(episodes)],
    }
    text = json.dumps(metadata, indent=2)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs[DIGEST] = hashlib.sha256(text.encode()).hexdigest()
        for i, episode in enumerate(episodes):
            _write_episode(file.create_group(f"traj_{i}", track_order=True), episode)
    write_together({path.with_suffix(".json"): text, path: buffer.getvalue()})


def read(path: Path, task: str | None = None, control_mode: str | None = None) -> list[DemonstrationEpisode]:
    """Read all episodes. Raises `UserError` for a file that is missing, corrupt, torn or not in this layout, and when
    it was recorded in another task or through another controller than the given ones."""
    try:
        text = path.with_suffix(".json").read_text()
        metadata = json.loads(text)
        with h5py.File(path, "r") as file:
            if file.attrs.get(DIGEST, digest := hashlib.sha256(text.encode()).hexdigest()) != digest:
                raise ValueError(f"it does not belong to {path.with_suffix('.json').name}")
            infos = metadata["episodes"]
            episodes = [_read_episode(file[f"traj_{info['episode_id']}"], info) for info in infos]
        recorded = metadata["env_info"]["env_id"], metadata["env_info"]["env_kwargs"].get("control_mode")
        if recorded[1] is None and infos:
            recorded = recorded[0], infos[0]["control_mode"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is not a readable ManiSkill demonstration file: {error}") from error
    for what, wanted, found in zip(("task", "controller"), (task, control_mode), recorded, strict=True):
        if wanted is not None and wanted != found:
            raise UserError(f"{path} was recorded with {what} {found}, this run uses {wanted}: collect your own")
    if not episodes:
        raise UserError(f"{path} holds no episodes")
    return episodes


def observations(
    episodes: Sequence[DemonstrationEpisode], instructions: tuple[str, ...], final: bool = False
) -> Observation:
    """What was seen before every action of every episode, in order: M rows, the number of recorded steps; with `final`
    also what was seen after the last one. Cameras that not all episodes have are left out."""
    end = None if final else -1
    task = np.concatenate([np.full(len(episode.states[:end]), episode.task) for episode in episodes])
    cameras = set.intersection(*(set(episode.images) for episode in episodes))
    images = {name: np.concatenate([episode.images[name][:end] for episode in episodes]) for name in sorted(cameras)}
    masks = {name: np.ones(len(task), bool) for name in images}
    states = np.concatenate([episode.states[:end] for episode in episodes])
    return Observation(images, masks, states, task, task, instructions)


def chunks(episodes: Sequence[DemonstrationEpisode], horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """For every row of `observations` the actions that follow, float32 [M,H,A], and valid bool [M,H], False (and action
    zero) past the episode's end."""
    actions, valid = [], []
    for episode in episodes:
        padded = np.concatenate([episode.actions, np.zeros((horizon, episode.actions.shape[1]), np.float32)])
        steps = np.arange(len(episode))[:, None] + np.arange(horizon)
        actions.append(padded[steps])
        valid.append(steps < len(episode))
    return np.concatenate(actions), np.concatenate(valid)


def mixture_statistics(states: np.ndarray, others: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(mean [S], standard deviation [S]) of a mixture of which `share` is drawn from `others` [M',S], the rest from
    `states` [M,S]."""
    mean, variance = states.mean(axis=0), states.var(axis=0)
    if not share:
        return mean, np.sqrt(variance)
    own, mean = mean, (1 - share) * mean + share * others.mean(axis=0)
    variance = (1 - share) * (variance + (own - mean) ** 2)
    return mean, np.sqrt(variance + share * (others.var(axis=0) + (others.mean(axis=0) - mean) ** 2))


def _metadata(index: int, episode: DemonstrationEpisode, control_mode: str) -> dict[str, Any]:
    info: dict[str, Any] = {
        "episode_id": index,
        "episode_seed": episode.seed,
        "control_mode": control_mode,
        "elapsed_steps": len(episode),
        "task": episode.task,
        "reset_kwargs": {"options": {}, "seed": episode.seed},
    }
    if episode.success is not None:
        info["success"] = bool(episode.success[-1])  # ManiSkill's meaning: at the end
    return info


def _write_episode(group: h5py.Group, episode: DemonstrationEpisode) -> None:
    if episode.images:
        observation = group.create_group("obs", track_order=True)
        observation["state"] = episode.states
        for camera, frames in episode.images.items():
            observation.create_dataset(f"sensor_data/{camera}/rgb", data=frames, compression="gzip", compression_opts=5)
    else:
        group["obs"] = episode.states
    for name in ("actions", "terminated", "truncated", "success", "rewards"):
        if getattr(episode, name) is not None:
            group[name] = getattr(episode, name)


def _read_episode(group: Any, info: dict[str, Any]) -> DemonstrationEpisode:
    observation = found = group.get("obs")
    images: dict[str, np.ndarray] = {}
    if isinstance(observation, h5py.Group):
        for camera, data in found.get("sensor_data", {}).items():
            if "rgb" in data:
                images[camera] = data["rgb"][:]
        observation = found.get("state")
    if not isinstance(observation, h5py.Dataset):
        raise ValueError("it has no state observations; replay it with --obs-mode state")
    if "rewards" not in group:
        raise ValueError("it has no rewards; replay it with --record-rewards")
    if not isinstance(group["actions"], h5py.Dataset):
        raise ValueError("it has actions of several robots")
    episode = DemonstrationEpisode(
        states=observation[:].astype(np.float32),
        actions=group["actions"][:].astype(np.float32),
        rewards=group["rewards"][:].astype(np.float32),
        success=group["success"][:].astype(bool) if "success" in group else None,
        terminated=group["terminated"][:].astype(bool),
        truncated=group["truncated"][:].astype(bool),
        seed=int(np.ravel(info["episode_seed"])[0]),
        images=images,
        task=int(info.get("task", 0)),
    )
    _check(episode, group.name)
    return episode


def _check(episode: DemonstrationEpisode, where: str) -> None:
    """The shapes and finite numbers that a `DemonstrationEpisode` promises; raises ValueError."""
    steps = len(episode)
    lengths = {name: len(value) for name in ("rewards", "terminated", "truncated", "success")
               if (value := getattr(episode, name)) is not None}  # fmt: skip
    framed = {"states": len(episode.states)} | {camera: len(frames) for camera, frames in episode.images.items()}
    if steps < 1 or set(lengths.values()) != {steps} or set(framed.values()) != {steps + 1}:
        raise ValueError(f"{where} has {steps} actions but {lengths | framed}")
    if episode.actions.ndim != 2 or episode.states.ndim != 2:
        raise ValueError(f"{where} has actions {episode.actions.shape} and states {episode.states.shape}")
    for name in ("states", "actions", "rewards"):
        if (value := getattr(episode, name)) is not None and not np.isfinite(value).all():
            raise ValueError(f"{where} has a non-finite number in its {name}")

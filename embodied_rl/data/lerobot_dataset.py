"""Demonstrations in a LeRobotDataset v3: a folder with meta/info.json, parquet files and, where images are stored as
video, mp4 files (https://huggingface.co/docs/lerobot/lerobot-dataset-v3). Read from this machine only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied_rl.data.demonstrations import DemonstrationEpisode
from embodied_rl.errors import UserError

INFO = Path("meta", "info.json")
VERSION = "v3."
STATE, ACTION = "observation.state", "action"
REWARD, SUCCESS, DONE, TRUNCATED = "next.reward", "next.success", "next.done", "next.truncated"


def read(root: Path, instructions: Sequence[str], count: int | None = None) -> list[DemonstrationEpisode]:
    """The first `count` episodes (None = all), failed ones included. `instructions`: of the simulator's tasks.

    States, actions and camera NAME are the columns observation.state, action and observation.images.NAME. An episode is
    of the task whose instruction its text is; where both have only one task, the texts may differ. Rewards are
    next.reward, else next.success, else None. next.done ends an episode, by its time limit where next.truncated says
    so. What was seen after the last action is not in this format: the observation before it stands for it.

    Raises `UserError` for a folder that is not such a dataset, is of another version, or lacks files, columns, episodes
    or the tasks of the simulator.
    """
    info = _info(root)
    missing = [name for name in (STATE, ACTION) if name not in info["features"]]
    if missing:
        raise UserError(f"{root} has no column {' and no '.join(missing)}, only {', '.join(sorted(info['features']))}")
    if info["total_episodes"] < (count or 1):
        raise UserError(f"{root} holds {info['total_episodes']} episodes, {count or 1} are asked for")
    absent = [each for each in ("meta/episodes", "meta/tasks.parquet", "data") if not (root / each).exists()]
    if absent:  # lerobot would look for them on the hub
        raise UserError(f"{root} is an incomplete LeRobotDataset: it has no {' and no '.join(absent)}")

    from datasets.exceptions import DatasetsError
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.feature_utils import get_hf_features_from_features
    from lerobot.datasets.io_utils import load_nested_dataset

    try:
        meta: Any = LeRobotDatasetMetadata(root.name, root)
        wanted = list(range(meta.total_episodes if count is None else count))
        table = load_nested_dataset(root / "data", get_hf_features_from_features(meta.features), wanted)
        index = np.array(table.with_format("numpy")["episode_index"])
        found = np.unique(index).tolist()
        if found != wanted:
            raise ValueError(f"its data has no episode {min(set(wanted) - set(found))}")
        tasks = _tasks(root, list(meta.tasks.index), instructions)
        rows = [np.flatnonzero(index == number) for number in wanted]
        return [_episode(root, meta, table.select(each), n, tasks) for n, each in zip(wanted, rows, strict=True)]
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, DatasetsError) as error:
        raise UserError(f"{root} is not a readable LeRobotDataset: {error}") from error


def _info(root: Path) -> dict[str, Any]:
    try:
        info = json.loads((root / INFO).read_text())
        version, _ = info["codebase_version"], (info["features"].keys(), int(info["total_episodes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{root / INFO} cannot be read: {error}") from error
    if not version.startswith(VERSION):
        raise UserError(
            f"{root} is a LeRobotDataset {version}, {VERSION}0 is needed: convert it with "
            f"`python -m lerobot.scripts.convert_dataset_v21_to_v30`"
        )
    return info


def _tasks(root: Path, texts: list[str], instructions: Sequence[str]) -> list[int]:
    """The simulator's task for each of the dataset's; -1 where it has none."""
    if len(texts) == len(instructions) == 1:
        return [0]
    if not set(texts) & set(instructions):
        raise UserError(f"{root} is of other tasks, such as '{texts[0]}'; this run's are '{instructions[0]}', ...")
    return [instructions.index(text) if text in instructions else -1 for text in texts]


def _episode(root: Path, meta: Any, table: Any, number: int, tasks: list[int]) -> DemonstrationEpisode:
    columns = table.with_format("numpy")

    def column(name: str) -> np.ndarray | None:
        return np.asarray(columns[name]).reshape(len(table)) if name in meta.features else None

    def vectors(name: str) -> np.ndarray:
        return np.asarray(columns[name], np.float32).reshape(len(table), -1)

    task = tasks[int(columns["task_index"][0])]
    if task < 0:
        text = meta.tasks.index[int(columns["task_index"][0])]
        raise UserError(f"episode {number} of {root} is of task '{text}', which this run does not have")
    success, done, truncated = column(SUCCESS), column(DONE), column(TRUNCATED)
    ended = np.zeros(len(table), bool) if done is None else done.astype(bool)
    limit = np.zeros(len(table), bool) if truncated is None else truncated.astype(bool)
    rewards = column(REWARD) if REWARD in meta.features else success
    times = np.asarray(columns["timestamp"], np.float64)
    cameras = [name for name in meta.camera_keys if name not in meta.depth_keys]
    images = {name: _with_last_again(_frames(root, meta, table, number, name, times)) for name in cameras}
    return DemonstrationEpisode(
        states=_with_last_again(vectors(STATE)),
        actions=vectors(ACTION),
        rewards=None if rewards is None else rewards.astype(np.float32),
        success=None if success is None else success.astype(bool),
        terminated=ended & ~limit,
        truncated=limit,
        seed=number,
        images={name.removeprefix("observation.").removeprefix("images."): each for name, each in images.items()},
        task=task,
    )


def _frames(root: Path, meta: Any, table: Any, episode: int, name: str, times: np.ndarray) -> np.ndarray:
    """uint8 [T,H,W,3] of camera `name`."""
    if name in meta.image_keys:
        return np.stack([np.asarray(image.convert("RGB")) for image in table.with_format(None)[name]])

    from lerobot.datasets.video_utils import decode_video_frames

    first = meta.episodes[episode][f"videos/{name}/from_timestamp"]
    path, tolerance = root / meta.get_video_file_path(episode, name), 0.5 / meta.fps
    frames = decode_video_frames(path, (first + times).tolist(), tolerance, backend="pyav", return_uint8=True)
    return frames.movedim(1, -1).numpy()


def _with_last_again(frames: np.ndarray) -> np.ndarray:
    return np.concatenate([frames, frames[-1:]])

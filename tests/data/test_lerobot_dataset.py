"""LeRobotDatasets written by lerobot itself, read back."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied_rl.data.lerobot_dataset import read
from embodied_rl.errors import UserError

LENGTHS = (5, 3, 4)
TEXTS = ("push the cube", "lift the cube", "push the cube")
SIZE = (32, 48)


def frames(episode: int) -> list[dict[str, np.ndarray]]:
    """Smooth pictures, which a video codec can keep; the second episode fails and ends by its time limit."""
    random = np.random.default_rng(episode)
    rows, columns = np.mgrid[0 : SIZE[0], 0 : SIZE[1]]
    found = []
    for t in range(LENGTHS[episode]):
        last = t == LENGTHS[episode] - 1
        shade = 60 + 20 * episode + 10 * t
        image = np.stack([np.full(SIZE, shade), 2 * rows + shade, 2 * columns + 40], -1).astype(np.uint8)
        found.append(
            {
                "observation.state": random.standard_normal(6).astype(np.float32),
                "action": random.uniform(-1, 1, 3).astype(np.float32),
                "observation.images.front": image,
                "next.reward": random.standard_normal(1).astype(np.float32),
                "next.success": np.array([last and episode != 1]),
                "next.done": np.array([last]),
                "next.truncated": np.array([last and episode == 1]),
            }
        )
    return found


def make(root: Path, videos: bool = False, without: tuple[str, ...] = ()) -> Path:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    kinds: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": (6,), "names": None},
        "action": {"dtype": "float32", "shape": (3,), "names": None},
        "observation.images.front": {
            "dtype": "video" if videos else "image",
            "shape": (*SIZE, 3),
            "names": ["height", "width", "channels"],
        },
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
        "next.truncated": {"dtype": "bool", "shape": (1,), "names": None},
    }
    kinds = {name: kind for name, kind in kinds.items() if name not in without}
    dataset = LeRobotDataset.create("toy", fps=10, features=kinds, root=root, use_videos=videos, video_backend="pyav")
    for episode, text in enumerate(TEXTS):
        for frame in frames(episode):
            dataset.add_frame({name: value for name, value in frame.items() if name in kinds} | {"task": text})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("lerobot") / "images")


@pytest.fixture
def damaged(images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(images, tmp_path / "damaged"))


INSTRUCTIONS = ("lift the cube", "open the door", "push the cube")


def test_what_lerobot_wrote_is_read_exactly(images: Path) -> None:
    episodes = read(images, INSTRUCTIONS)
    assert [len(episode) for episode in episodes] == list(LENGTHS)
    assert [episode.task for episode in episodes] == [2, 0, 2] and [e.seed for e in episodes] == [0, 1, 2]
    for number, episode in enumerate(episodes):
        written = frames(number)
        for found, name in ((episode.actions, "action"), (episode.states[:-1], "observation.state")):
            np.testing.assert_array_equal(found, [each[name] for each in written], strict=True)
        np.testing.assert_array_equal(episode.states[-1], episode.states[-2])
        shown = episode.images["front"]
        np.testing.assert_array_equal(shown[:-1], [each["observation.images.front"] for each in written], strict=True)
        np.testing.assert_array_equal(shown[-1], shown[-2])
        flat = {name: np.concatenate([each[f"next.{name}"] for each in written]) for name in ("reward", "success")}
        np.testing.assert_array_equal(episode.rewards, flat["reward"], strict=True)
        np.testing.assert_array_equal(episode.success, flat["success"], strict=True)
        end = np.arange(LENGTHS[number]) == LENGTHS[number] - 1
        np.testing.assert_array_equal(episode.terminated, end & (number != 1))
        np.testing.assert_array_equal(episode.truncated, end & (number == 1))


def test_videos_are_read_frame_by_frame(tmp_path: Path) -> None:
    """Within what the codec keeps of a smooth picture; a neighbouring frame is further away."""
    episodes = read(make(tmp_path / "videos", videos=True), INSTRUCTIONS, count=2)
    assert [len(episode) for episode in episodes] == [5, 3]
    for number, episode in enumerate(episodes):
        shown = episode.images["front"]
        assert shown.dtype == np.uint8 and shown.shape == (LENGTHS[number] + 1, *SIZE, 3)
        for t, frame in enumerate(frames(number)):
            error = np.abs(shown[t].astype(int) - frame["observation.images.front"]).mean()
            assert error < 3, (number, t, error)


def test_success_is_the_reward_where_there_is_no_other(tmp_path: Path) -> None:
    none = ("observation.images.front", "next.reward", "next.done", "next.truncated")
    (*_, last) = read(make(tmp_path / "success", without=none), INSTRUCTIONS)
    assert last.rewards is not None and last.rewards.tolist() == [0, 0, 0, 1]
    assert not last.images and not last.terminated.any() and not last.truncated.any()
    (*_, last) = read(make(tmp_path / "bare", without=(*none, "next.success")), INSTRUCTIONS)
    assert last.rewards is None and last.success is None


def edit(root: Path, **changes: Any) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_column(root: Path) -> None:
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text())
    del info["features"]["action"]
    path.write_text(json.dumps(info))


def cut(root: Path) -> None:
    (data,) = root.glob("data/*/*.parquet")
    data.write_bytes(data.read_bytes()[:400])


DAMAGES: list[tuple[Any, str]] = [
    (lambda root: shutil.rmtree(root / "meta"), "info.json cannot be read"),
    (lambda root: edit(root, codebase_version="v2.1"), "is a LeRobotDataset v2.1, v3.0 is needed: convert it"),
    (drop_column, "has no column action, only"),
    (lambda root: edit(root, total_episodes=0), "holds 0 episodes, 1 are asked for"),
    (lambda root: edit(root, total_episodes=4), "its data has no episode 3"),
    (
        lambda root: (root / "meta" / "tasks.parquet").unlink(),
        "incomplete LeRobotDataset: it has no meta/tasks",
    ),
    (lambda root: shutil.rmtree(root / "data"), "it has no data"),
    (cut, "not a readable LeRobotDataset"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_datasets_are_refused(
    damaged: Path, damage: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without looking for what is missing anywhere else."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it went to the network"))
    damage(damaged)
    with pytest.raises(UserError, match=message) as error:
        read(damaged, INSTRUCTIONS)
    assert str(damaged) in str(error.value) and "\n" not in str(error.value)


def test_more_episodes_than_there_are_and_other_tasks_are_refused(images: Path) -> None:
    with pytest.raises(UserError, match="holds 3 episodes, 7 are asked for"):
        read(images, INSTRUCTIONS, 7)
    with pytest.raises(UserError, match="is of other tasks, such as 'push the cube'; this run's are 'dance'"):
        read(images, ("dance",))
    with pytest.raises(UserError, match=r"episode 1 of .* is of task 'lift the cube', which this run does not have"):
        read(images, ("push the cube",))
    assert [episode.task for episode in read(images, ("push the cube",), 1)] == [0]

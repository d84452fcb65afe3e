"""What the LIBERO adapter reads off files: suites, limits, recorded states, assets; and its configuration's errors."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from embodied_rl.errors import UserError
from embodied_rl.simulators.libero import assets, init_states, suites
from embodied_rl.simulators.libero.config import LiberoConfig, tasks
from embodied_rl.simulators.reset_schedule import RandomSchedule


def has_assets() -> bool:
    try:
        return assets.folder().is_dir()
    except UserError:
        return False


needs_assets = pytest.mark.skipif(not has_assets(), reason=f"no LIBERO assets; set {assets.VARIABLE}")


def test_libero_130_joins_the_suites_in_liberos_order() -> None:
    theirs = runpy.run_path(str(suites.package() / "benchmark" / "libero_suite_task_map.py"))["libero_task_map"]
    order = ("libero_spatial", "libero_object", "libero_goal", "libero_90", "libero_10")
    joined = suites.suite_tasks("libero_130")
    assert [(task.suite, task.name) for task in joined] == [(suite, name) for suite in order for name in theirs[suite]]
    assert len({task.name for task in joined}) == len(joined) == 130
    assert all(task.bddl.is_file() for task in joined)


def test_instructions() -> None:
    words = [suites.suite_tasks(suite)[0].instruction for suite in ("libero_spatial", "libero_10", "libero_90")]
    assert words == [
        "pick up the black bowl between the plate and the ramekin and place it on the plate",
        "put both the alphabet soup and the tomato sauce in the basket",
        "close the top drawer of the cabinet",
    ]
    assert all(
        task.instruction[0].islower() and "_" not in task.instruction for task in suites.suite_tasks("libero_130")
    )


@pytest.mark.parametrize(
    ("table", "limits"),
    [
        ("openvla", (220, 280, 300, 520, 400)),
        ("lerobot", (280, 280, 300, 520, 400)),
        ("rlinf", (240, None, None, 512, 512)),
        ("simplevla", (512,) * 5),
    ],
)
def test_published_step_limits(table: str, limits: tuple[int | None, ...]) -> None:
    for suite, limit in zip(("spatial", "object", "goal", "10", "90"), limits, strict=True):
        if limit is None:
            with pytest.raises(UserError, match="set max_steps"):
                LiberoConfig(f"libero_{suite}", step_limits=table)
        else:
            assert set(LiberoConfig(f"libero_{suite}", step_limits=table).limits) == {limit}


def test_step_limits_of_libero_130() -> None:
    every = LiberoConfig("libero_130").limits
    assert [every[i] for i in (0, 10, 20, 30, 119, 120)] == [220, 280, 300, 400, 400, 520]
    assert set(LiberoConfig("libero_130", step_limits="rlinf").limits) == {512}
    assert set(LiberoConfig("libero_goal", step_limits="rlinf", max_steps=7).limits) == {7}


def test_every_task_has_fifty_recorded_states() -> None:
    shapes = {init_states.read(task.init_states).shape[0] for task in suites.suite_tasks("libero_130")}
    assert shapes == {50}
    assert LiberoConfig("libero_130").num_states == 50


def test_a_recorded_state_that_is_something_else_is_refused_and_not_run(tmp_path: Path) -> None:
    good = suites.suite_tasks("libero_goal")[0].init_states
    with zipfile.ZipFile(good) as archive:
        program = archive.read("archive/data.pkl")
    victim = tmp_path / "executed"
    attack = b"cposix\nsystem\n(V" + f"touch {victim}".encode() + b"\ntR."
    named = program.replace(b"cnumpy\ndtype\n", b"cposix\nsystem\n")
    for index, bad in enumerate(
        (attack, attack[:-1] + program, named, program[:-40], b"", program.replace(b"f8", b"O8"))
    ):
        path = tmp_path / f"{index}.pruned_init"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", bad)
        with pytest.raises(UserError, match=path.name):
            init_states.read(path)
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(UserError, match="cannot be read"):
        init_states.read(tmp_path / "text")
    assert not victim.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "libero_spatal"}, "did you mean libero_spatial"),
        ({"tasks": (0, 10)}, "from 0 to 9"),
        ({"tasks": (1, 1)}, "different"),
        ({"observation": "depth"}, "LIBERO observation 'depth'"),
        ({"step_limits": "mine"}, "step limits 'mine'"),
        ({"image_size": 0}, "image_size is 0"),
        ({"settle_steps": -1}, "settle_steps is -1"),
    ],
)
def test_configurations_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LiberoConfig(**options)


def test_libero_has_no_expert() -> None:
    with pytest.raises(UserError, match="no scripted expert"):
        LiberoConfig().demonstrator()


LIST = """
import sys
from embodied_rl.simulators.libero import config
print(len(config.tasks()), sorted({"libero", "robosuite", "mujoco", "torch"} & sys.modules.keys()))
"""


def test_listing_tasks_imports_no_simulator() -> None:
    output = subprocess.run([sys.executable, "-c", LIST], capture_output=True, text=True, timeout=60, check=True).stdout
    assert output.split() == ["130", "[]"]


@needs_assets
def test_what_is_listed_as_missing_is_what_the_assets_lack() -> None:
    listed = {one.name: one for one in tasks()}
    runs = {name for name, one in listed.items() if not one.missing}
    whole = [name for name in listed if name.startswith(("libero_spatial", "libero_object"))]
    assert runs.issuperset(whole)
    for name in sorted(set(listed) - runs):
        assert assets.DOWNLOAD in listed[name].missing
        assert "\n" not in listed[name].missing
    one = listed["libero_goal/open_the_middle_drawer_of_the_cabinet"]
    assert (one.cameras, one.action_dim, one.max_steps, one.reward) == (suites.CAMERAS, 7, 300, "sparse")


def test_missing_assets_are_an_error_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scenes").mkdir()
    monkeypatch.setenv(assets.VARIABLE, str(tmp_path))
    for cached in (assets.folder, assets._description, assets._lacks):
        monkeypatch.setattr(assets, cached.__name__, cached.__wrapped__)
    with pytest.raises(
        UserError, match=r"'open_the_middle_drawer_of_the_cabinet' needs \S+\.xml and \d more.*hf download"
    ):
        LiberoConfig("libero_goal").build(RandomSchedule(0))
    monkeypatch.setenv(assets.VARIABLE, str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="holds no LIBERO assets"):
        LiberoConfig("libero_goal").build(RandomSchedule(0))
    monkeypatch.delenv(assets.VARIABLE)
    for home in ("HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(home, str(tmp_path))
    with pytest.raises(UserError, match="hf download lerobot/libero-assets"):
        LiberoConfig("libero_goal").build(RandomSchedule(0))


@needs_assets
def test_object_states_of_tasks_that_differ_are_refused() -> None:
    with pytest.raises(UserError, match="equally many objects"):
        LiberoConfig("libero_90", (0, 6), "state").build(RandomSchedule(0))


IMPORT = """
from embodied_rl.simulators.libero import installed
print(len(installed.problems()) > 4)
"""


@needs_assets
def test_importing_libero_asks_nothing_and_leaves_nothing_at_home(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LIBERO", "XDG"))}
    environment |= {
        "HOME": str(tmp_path),
        assets.VARIABLE: str(assets.folder()),
        "NUMBA_CACHE_DIR": str(tmp_path / "n"),
    }
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert done.stdout.split() == ["True"], done.stderr
    assert not (tmp_path / ".libero").exists()


def test_recorded_states_are_liberos_own() -> None:
    """Against a reader written for one file: the numbers of a pickled array are its last long string."""
    for task in (suites.suite_tasks("libero_10")[3], suites.suite_tasks("libero_90")[40]):
        with zipfile.ZipFile(task.init_states) as archive:
            program = archive.read("archive/data.pkl")
        ours = init_states.read(task.init_states)
        text = ours.astype("<f8").tobytes().decode("latin1").encode()
        assert text in program
        assert ours[:, 0].min() >= 0  # time
        arm = ours[:, 1:8]
        assert np.abs(arm - [0, -0.161, 0, -2.444, 0, 2.227, np.pi / 4]).max() < 0.1

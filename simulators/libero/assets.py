"""Where LIBERO's meshes and textures are, and what a task would miss there; nothing here imports LIBERO."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from xml.etree import ElementTree

from embodied_rl.errors import UserError
from embodied_rl.simulators.libero.suites import Task, contents, package

VARIABLE = "EMBODIED_RL_LIBERO_ASSETS"
DOWNLOAD = "hf download lerobot/libero-assets --repo-type dataset"

_SCENES = {
    "coffee_table": "libero_coffee_table_base_style",
    "floor": "libero_floor_base_style",
    "kitchen_tabletop": "libero_kitchen_tabletop_base_style",
    "living_room_tabletop": "libero_living_room_tabletop_base_style",
    "study_tabletop": "libero_study_base_style",
    "tabletop": "libero_tabletop_base_style",
}
"""The scene of each kind of problem, the X of "(define (problem LIBERO_X_Manipulation)"."""

_BUILT_IN = {"table", "floor", "kitchen_table", "living_room_table", "study_table", "coffee_table", "main_table"}
"""Fixtures that are part of the scene."""

_REPLACED = {"texplane", "tex-wall"}
"""Textures of a scene for which LIBERO puts in others."""


@functools.cache
def folder() -> Path:
    """The folder with `scenes`, `textures` and the objects: named by EMBODIED_RL_LIBERO_ASSETS (itself, or the folder
    around it), else inside the installed package, else the user's download. Raises `UserError` when there is none."""
    named = os.environ.get(VARIABLE)
    if named:
        for place in (Path(named) / "assets", Path(named)):
            if (place / "scenes").is_dir():
                return place.resolve()
        raise UserError(f"{VARIABLE}={named} holds no LIBERO assets: name the folder with 'scenes' and the objects")
    for place in (package() / "assets", Path.home() / ".cache/libero/assets", *_hub_snapshots()):
        if (place / "scenes").is_dir():
            return place.resolve()
    raise UserError(f"LIBERO's assets are not on this machine: run '{DOWNLOAD}', or set {VARIABLE} to their folder")


def _hub_snapshots() -> list[Path]:
    """Finished downloads of the assets in the Hugging Face cache, the newest first."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    snapshots = (cache / "datasets--lerobot--libero-assets" / "snapshots").glob("*")
    return sorted(snapshots, key=lambda path: path.stat().st_mtime, reverse=True)


def missing(task: Task) -> list[str]:
    """Files that the scene of `task` refers to and `folder()` lacks, relative to it, sorted."""
    problem = re.search(r"problem LIBERO_(\w+?)_Manipulation", task.bddl.read_text(), re.IGNORECASE)
    scene = _SCENES.get(problem[1].lower()) if problem else None
    lacks = _lacks(f"scenes/{scene}.xml") if scene else {f"the scene of {task.bddl.name}"}
    for category in {category for category, _ in contents(task)} - _BUILT_IN:
        lacks = lacks | _lacks(_description(category))
    return sorted(lacks)


@functools.cache
def _description(category: str) -> str:
    """The XML file of an object, wherever it is."""
    places = [f"articulated_objects/{category}.xml"] + [
        f"{group}/{category}/{category}.xml"
        for group in ("stable_hope_objects", "stable_scanned_objects", "turbosquid_objects")
    ]
    return next((place for place in places if (folder() / place).is_file()), f"*/{category}.xml")


@functools.cache
def _lacks(description: str) -> frozenset[str]:
    """What is not there of an XML file and of the files that it names."""
    path = folder() / description
    if not path.is_file():
        return frozenset([description])
    # Of two elements with one name MuJoCo is given the first.
    files: dict[tuple[str, str | None], str] = {}
    for element in ElementTree.parse(path).iter():
        name, file = element.get("name"), element.get("file")
        if file and name not in _REPLACED:
            files.setdefault((element.tag, name or file), file)
    wanted = {os.path.normpath(path.parent / file) for file in files.values()}
    return frozenset(os.path.relpath(file, folder()) for file in wanted if not Path(file).is_file())


def check(task: Task) -> None:
    """Raises `UserError` naming the first missing file."""
    lacks = missing(task)
    if lacks:
        more = f" and {len(lacks) - 1} more" if len(lacks) > 1 else ""
        raise UserError(
            f"LIBERO task '{task.name}' needs {lacks[0]}{more}, not in {folder()}: complete the assets with "
            f"'{DOWNLOAD}', or set {VARIABLE} to a folder that has them"
        )

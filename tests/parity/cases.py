"""Where the reference numbers lie: cases are found by their files, at any depth and under any name, below
tests/fixtures/parity and below the folder that EMBODIED_RL_PARITY names."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

COMMITTED = Path(__file__).parents[1] / "fixtures" / "parity"
VARIABLE = "EMBODIED_RL_PARITY"
NUMBERS = (".safetensors", ".npz")


def family(folder: Path) -> str | None:
    """What `folder` is a case of (for OpenVLA the kind that its meta.json gives); None when it is none."""
    if any(folder.glob("*.npz")):
        return "algorithms"
    if (folder / "meta.json").is_file():
        return read(folder / "meta.json")["kind"]
    if (folder / "preprocess.json").is_file():
        return "pi_preprocess"
    if (folder / "steps.safetensors").is_file():
        return "flow_sde"
    if (folder / "inputs.safetensors").is_file() and (folder / "config.json").is_file():
        config = read(folder / "config.json")
        if "action_head_cfg" in config:
            return "gr00t"
        if "pi05" in config:
            return "pi05" if config["pi05"] else "pi0"
    return "openvla_tokenization" if (folder / "tokenization.json").is_file() else None


def roots() -> dict[str, Path]:
    """Folders that cases are looked for in, by the word that begins the names of their tests."""
    named = os.environ.get(VARIABLE)
    return {"committed": COMMITTED} | ({"named": Path(named)} if named else {})


@cache
def found() -> dict[str, dict[str, Path]]:
    """{family: {name of a test: folder}}. Raises FileNotFoundError for a root without a case."""
    families: dict[str, dict[str, Path]] = {}
    for word, root in roots().items():
        folders = [root, *sorted(path for path in root.rglob("*") if path.is_dir())]
        cases = [(kind, folder) for folder in folders if (kind := family(folder))]
        if not cases:
            raise FileNotFoundError(f"no parity case below '{root}', named by {VARIABLE}")
        for kind, folder in cases:
            families.setdefault(kind, {})[f"{word}/{folder.relative_to(root)}"] = folder
    return families


def cases(*families: str) -> list[Any]:
    """The folders of these families as parameters of a test; without one there is no test (see conftest.py)."""
    return [pytest.param(folder, id=name) for kind in families for name, folder in found().get(kind, {}).items()]


def folders(*families: str) -> list[Path]:
    """The folders of these families."""
    return [folder for kind in families for folder in found().get(kind, {}).values()]


def listed(kind: str, of: str) -> list[Any]:
    """What config.json of the family's cases lists under `of`, as parameters (folder, entry) of a test."""
    return [
        pytest.param(folder, entry, id=f"{name}/{number}")
        for name, folder in found().get(kind, {}).items()
        for number, entry in enumerate(read(folder / "config.json")[of])
    ]


def arrays(pattern: str) -> list[Any]:
    """Files of the algorithms' cases that fit `pattern` ("ppo_cleanrl*") as parameters of a test; for `load`."""
    files = [
        pytest.param(file, id=f"{name}/{file.stem}")
        for name, folder in found()["algorithms"].items()
        for file in sorted(folder.glob(f"{pattern}.npz"))
    ]
    assert files, f"no case has {pattern}.npz"
    return files


def load(file: Path) -> dict[str, Any]:
    """What a .npz holds: arrays as tensors, numbers as Python numbers."""
    with np.load(file) as data:
        return {key: data[key].item() if data[key].ndim == 0 else torch.from_numpy(data[key]) for key in data.files}


def read(path: Path) -> dict[str, Any]:
    """A JSON object."""
    return json.loads(path.read_text())

"""Checkpoints: a folder with `tensors.safetensors` and `state.json`, written atomically, read without pickle.

A checkpoint is any tree of dicts, lists, tensors, numpy arrays and plain values (the `state_dict` of a policy, an
optimizer, a replay buffer, a generator). Tensors go to safetensors under the path of their place in the tree,
memory-mapped arrays, which may be larger than memory, to a file each, the rest to JSON with the sha256 of the other
files, so that a torn or foreign set is recognised.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from embodied_rl.errors import UserError

FORMAT = "embodied_rl.checkpoint/1"
TENSORS = "tensors.safetensors"
STATE = "state.json"


def save(folder: Path, tree: dict[str, Any], keep: int = 2) -> Path:
    """Write `tree` as checkpoint `folder`, then drop all but the newest `keep` of its siblings.

    The checkpoint appears under its name only when both files are on disk; an interrupted or failed save leaves the
    older ones as they were. Raises `UserError` when the disk refuses (full, read-only).
    """
    tensors: dict[str, torch.Tensor] = {}
    mapped: list[np.memmap] = []
    plain = _split(tree, "", tensors, mapped)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / TENSORS)
        files = [partial / f"mapped-{number}.bin" for number in range(len(mapped))]
        for path, array in zip(files, mapped, strict=True):
            with path.open("wb") as file:
                for part in array:  # without a copy in memory
                    np.ascontiguousarray(part).tofile(file)
        digests = {path.name: _digest(path) for path in files}
        state = {"format": FORMAT, "sha256": _digest(partial / TENSORS), "mapped": digests, "tree": plain}
        (partial / STATE).write_text(json.dumps(state))
        for path in (partial / TENSORS, *files, partial / STATE, partial):
            _sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        last = latest(folder.parent)
        survives = f"the last good one is {last}" if last else "there is no earlier one"
        raise UserError(f"cannot save checkpoint {folder}: {error}; {survives}. Free disk space and resume.") from error
    for old in sorted(_complete(folder.parent))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def load(folder: Path) -> dict[str, Any]:
    """Read the tree written by `save`; raises `UserError` when it is missing, torn, corrupt or not ours."""
    try:
        state = json.loads((folder / STATE).read_text())
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise UserError(f"{folder} is not a checkpoint of this version (expected format {FORMAT})")
        for name, digest in {TENSORS: state["sha256"], **state.get("mapped", {})}.items():
            if digest != _digest(folder / name):
                raise UserError(f"checkpoint {folder} is corrupt: {name} does not match {STATE}; use an older one")
        return _join(state["tree"], load_file(folder / TENSORS), folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot read checkpoint {folder}: {error}; use an older one or start a new run") from error


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder` (names sort by age), or None."""
    return max(_complete(folder), default=None)


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if not path.name.startswith(".") and (path / STATE).exists()]


def _split(node: Any, path: str, tensors: dict[str, torch.Tensor], mapped: list[np.memmap]) -> Any:
    """JSON for `node`, its tensors moved to `tensors` and its memory-mapped arrays to `mapped`. Dicts become lists of
    pairs: optimizer states have int keys."""
    if isinstance(node, torch.Tensor):
        tensors[path] = node.detach().contiguous().clone()
        return {"tensor": path}
    if isinstance(node, np.memmap):
        mapped.append(node)
        return {"mapped": [f"mapped-{len(mapped) - 1}.bin", node.dtype.str, *node.shape]}
    if isinstance(node, np.ndarray):
        tensors[path] = torch.from_numpy(np.array(node))
        return {"array": path}
    if isinstance(node, dict):
        return {"dict": [[key, _split(value, f"{path}/{key}", tensors, mapped)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        kind = "list" if isinstance(node, list) else "tuple"
        return {kind: [_split(value, f"{path}/{i}", tensors, mapped) for i, value in enumerate(node)]}
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(f"a checkpoint cannot hold {type(node).__name__} (at {path or 'the root'})")


def _join(node: Any, tensors: dict[str, torch.Tensor], folder: Path) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "array":
        return tensors[value].numpy()
    if kind == "mapped":
        name, dtype, *shape = value
        return np.memmap(folder / name, dtype, "r", shape=tuple(shape))
    if kind == "dict":
        return {key: _join(child, tensors, folder) for key, child in value}
    items = [_join(child, tensors, folder) for child in value]
    return items if kind == "list" else tuple(items)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files that are either there in full or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from embodied_rl.errors import UserError


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` under a temporary name, flush it to the disk and rename it to `path`.

    An interrupted or failed write leaves what was there before. Raises `UserError` when the disk refuses.
    """
    write_together({path: data})


def write_together(files: Mapping[Path, bytes | str]) -> None:
    """`write_atomic` for files that belong together: none is renamed before all are on the disk."""
    partial = {path: path.with_name(f".{path.name}.partial") for path in files}
    path = next(iter(files))
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial[path].open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            partial[path].replace(path)
        _sync(path.parent)
    except OSError as error:
        for leftover in partial.values():
            with contextlib.suppress(OSError):  # its folder may be what is wrong
                leftover.unlink()
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; free disk space or choose another place") from error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

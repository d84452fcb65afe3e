"""Small files of a run folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from embodied_rl.errors import UserError


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds either the old or the new content, never half; raises `UserError` when the disk
    refuses."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w") as file:
            json.dump(value, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error

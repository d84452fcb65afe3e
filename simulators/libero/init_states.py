"""LIBERO's recorded initial states, which are pickled NumPy arrays, read without running what a pickle asks for."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from embodied_rl.errors import UserError

_GLOBALS = ["numpy.core.multiarray _reconstruct", "numpy ndarray", "_codecs encode", "numpy dtype"]
_MEMO = {"PROTO", "BINPUT", "LONG_BINPUT", "BINGET", "MEMOIZE", "FRAME"}
_INTEGERS = {"BININT", "BININT1", "BININT2"}


def read(path: Path) -> np.ndarray:
    """float64 [S,1+nq+nv], one row (time, qpos, qvel) per recorded state.

    The pickle is only taken apart: it must name nothing but what an array of float64 is made of, and its shape and
    numbers are read off the arguments. Raises `UserError` for anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            program = archive.read(name)
        steps: list[tuple[str, Any]] = [
            (op.name, argument) for op, argument, _ in pickletools.genops(program) if op.name not in _MEMO
        ]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as LIBERO initial states: {error}") from error
    named = [argument for op, argument in steps if op.endswith("GLOBAL") or op in ("INST", "OBJ")]
    integers = [argument for op, argument in steps if op in _INTEGERS]
    texts = [argument for op, argument in steps if op == "BINUNICODE"]
    # Texts: a placeholder byte and its encoding, the dtype, its byte order, the data.
    array = named == _GLOBALS and len(texts) == 5 and texts[1:4] == ["latin1", "f8", "<"]
    data = texts[4].encode("latin1", "replace") if array else b""
    # Integers: the placeholder's shape, the version of the format, the shape.
    shape = tuple(integers[2:4])
    if not array or len(data) != 8 * int(np.prod(shape)):
        raise UserError(f"{path} is not an array of float64 as LIBERO records initial states; it names {named}")
    return np.frombuffer(data, "<f8").reshape(shape).copy()

"""What the tests of mjlab share."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import embodied_rl
from embodied_rl.errors import UserError
from embodied_rl.simulators import interpreters

DEADLINE = 900.0
"""Seconds: kernels may have to be compiled."""


def interpreter() -> str:
    """mjlab's Python; skips the test without it."""
    try:
        return interpreters.interpreter("mjlab")
    except UserError as error:
        pytest.skip(str(error))


class Reference:
    """A run of mjlab_reference.py in the background."""

    def __init__(self, folder: Path, **order):
        self._result = folder / "result.npz"
        self._log = folder / "log.txt"
        (folder / "order.json").write_text(json.dumps(order))
        script = Path(__file__).with_name("mjlab_reference.py")
        path = Path(embodied_rl.__file__).parent.parent
        environ = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
        with self._log.open("w") as log:
            command = [interpreter(), str(script), str(folder / "order.json"), str(self._result)]
            self._process = subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._arrays = None

    def arrays(self):
        """Its result, {"part.name": array}."""
        if self._arrays is None:
            code = self._process.wait(DEADLINE)
            assert code == 0, self._log.read_text()[-3000:]
            with np.load(self._result) as stored:
                self._arrays = dict(stored)
        return self._arrays

    def close(self):
        self._process.kill()
        self._process.wait(60)

"""What tests of the Isaac Lab adapter share: skipping without its environment, its reference run, a played record."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import embodied_rl
from embodied_rl.errors import UserError
from embodied_rl.simulators import interpreters

try:
    PYTHON, ABSENT = interpreters.interpreter("isaaclab"), ""
except UserError as error:
    PYTHON, ABSENT = "", str(error)

needs_isaaclab = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)


class Reference:
    """`isaaclab_reference.py` in a process of its own, started at once, waited for when its numbers are needed."""

    def __init__(self, tasks: Sequence[str], folder: Path) -> None:
        self._output, self._log = folder / "reference.npz", folder / "reference.log"
        script = Path(__file__).parent / "isaaclab_reference.py"
        package = Path(embodied_rl.__file__).parent
        command = [PYTHON, "-P", str(script), str(package), str(self._output), *tasks]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    def numbers(self, task: str, timeout: float = 1500.0) -> dict[str, np.ndarray]:
        """{what: array} of `task`."""
        assert self._process.wait(timeout) == 0, self._log.read_text()[-3000:]
        with np.load(self._output) as file:
            return {key.partition("|")[2]: file[key] for key in file.files if key.startswith(f"{task}|")}

    def close(self) -> None:
        self._process.kill()
        self._process.wait(30)


def check_against_isaac_lab(task: str, numbers: dict[str, np.ndarray], limit: int, first: int = 0) -> None:
    """Up to its end every episode of the adapter, one of three side by side, has the numbers of Isaac Lab's own
    environment, alone and without the time limit; the final observation is the one at that end. Observations count from
    `first`, the number of steps after which Isaac Lab's own can be trusted."""
    difference = 0.0
    for row, valid in enumerate(numbers["isaac valid"]):
        steps = min(int(valid.sum()), limit)
        pairs = [
            (numbers["isaac state"][row, first : steps + 1], numbers["state"][row, first : steps + 1]),
            (numbers["isaac reward"][row, :steps], numbers["reward"][row, :steps]),
            (numbers["isaac state"][row, steps], numbers["final"][row]),
        ]
        difference = max(difference, *(float(np.abs(one - other).max()) for one, other in pairs))
        assert np.array_equal(numbers["isaac terminated"][row, :steps], numbers["terminated"][row, :steps])
        ends = numbers["terminated"][row] | numbers["truncated"][row]
        assert not ends[: steps - 1].any() and ends[steps - 1]
        assert numbers["truncated"][row, steps - 1] == (not numbers["isaac terminated"][row, steps - 1])
    print(f"{task}: three rows side by side and each alone in Isaac Lab differ by {difference:.3g}")
    assert difference < 1e-5


def check_hosting(played: dict[str, np.ndarray], numbers: dict[str, np.ndarray]) -> None:
    """The same bits from a worker process and without one."""
    for name, array in played.items():
        assert np.array_equal(array, numbers[name]), name

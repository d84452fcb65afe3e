"""How a run that trains is asked for another number of processes, by whoever can write to its folder.

A request is a file `scale/NAME.json` there, {"rollout_workers": 4, "learners": 2} or one of the two; the run looks for
it between two iterations. What came of it is a line in `scale/NAME.txt`, in its place.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from embodied_rl.errors import UserError
from embodied_rl.files import write_atomic

FOLDER = "scale"
KNOWN = ("rollout_workers", "learners")
DONE, REFUSED = "done: ", "refused: "
"""How an answer begins."""


@dataclass(frozen=True)
class Request:
    path: Path

    def numbers(self) -> dict[str, int]:
        """What is asked for, by the names of `PipelineConfig`; raises `UserError` where that makes no sense."""
        wrong = f"{self.path} must hold an object with some of {', '.join(KNOWN)}, each a positive int"
        try:
            values = json.loads(self.path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(wrong) from error
        if not isinstance(values, dict) or not values or not values.keys() <= set(KNOWN):
            raise UserError(wrong)
        if not all(type(value) is int and value > 0 for value in values.values()):
            raise UserError(wrong)
        return values

    def answer(self, text: str) -> None:
        """Say what became of it; it is not asked for any more."""
        write_atomic(self.path.with_suffix(".txt"), text + "\n")
        self.path.unlink(missing_ok=True)

    def wait(self, seconds: float) -> str | None:
        """What became of it, or None when that is not known after `seconds`. Raises `UserError` when it is refused."""
        found, deadline = self.path.with_suffix(".txt"), time.monotonic() + seconds
        while not found.exists():
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)
        text = found.read_text().strip()
        if text.startswith(REFUSED):
            raise UserError(text)
        return text


def ask(out: Path, rollout_workers: int | None = None, learners: int | None = None) -> Request:
    """Ask the run in folder `out` for so many rollout workers on Ray and so many learners; None leaves them as they
    are. A newer request takes the place of an older one. Raises `UserError` when there is no run that goes on."""
    if not (out / "config.json").is_file():
        raise UserError(f"{out} is not a run folder: it has no config.json")
    if (out / "result.json").exists():
        raise UserError(f"the run in {out} has ended: there is nothing to scale")
    asked = {name: number for name, number in zip(KNOWN, (rollout_workers, learners), strict=True) if number}
    if not asked:
        raise UserError("nothing is asked for: give --rollout-workers, --learners or both")
    path = out / FOLDER / f"{time.time_ns()}.json"
    write_atomic(path, json.dumps(asked))
    return Request(path)


def newest(out: Path) -> Request | None:
    """What the run in folder `out` is asked for; older requests are refused."""
    found = [Request(path) for path in sorted((out / FOLDER).glob("*.json"))]
    for request in found[:-1]:
        request.answer(REFUSED + "a newer request took its place")
    return found[-1] if found else None

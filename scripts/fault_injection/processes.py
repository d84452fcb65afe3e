"""Which processes belong to a training: all that inherited its mark, whoever started them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

MARK = "FAULTS_MARK"
"""The environment variable."""

KINDS = {
    "simulator": "embodied_rl.simulators.worker import main",
    "rollout_worker": "ray::RolloutActor",
    "learner_rank": "embodied_rl.pipeline.learner_rank import main",
}
"""What their command lines contain."""


class Process(NamedTuple):
    pid: int
    parent: int
    command: str


def marked(mark: str) -> list[Process]:
    """All that live; zombies do not."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        try:
            if wanted not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state, parent = (folder / "stat").read_text().rpartition(") ")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        if state not in "ZX":
            found.append(Process(int(folder.name), int(parent), command))
    return found


def of_kind(mark: str, kind: str) -> list[Process]:
    """Those of `KINDS[kind]`, oldest first."""
    return sorted(process for process in marked(mark) if KINDS[kind] in process.command)

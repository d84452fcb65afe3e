"""A process that outlives a run with a private Ray cluster, in case the run dies without a word.

Ray ends a program by `_exit` when the raylet beside it has died, say by the SIGBUS of a full /dev/shm, so the program
itself cannot tell why; and Ray's agents stay for a minute after a program was killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 10.0
"""Seconds that a raylet gets to follow its run, and the guard itself when it is no longer needed."""


@contextmanager
def guarded(node: Any) -> Iterator[None]:
    """Around a run on a private cluster; `node` is Ray's own handle of what it started here."""
    raylet = node.all_processes["raylet"][0].process.pid
    command = [sys.executable, "-I", __file__, str(raylet), node.get_session_dir_path()]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        guard.communicate(b"all is well", timeout=PATIENCE)


def main(raylet: int, session: Path) -> None:
    """Wait for the end of the run; `session` is the folder of its cluster."""
    if sys.stdin.buffer.read(1):
        return
    deadline = time.monotonic() + PATIENCE
    while _runs(raylet) and time.monotonic() < deadline:
        time.sleep(0.05)
    log = session / "logs" / "raylet.err"
    with contextlib.suppress(OSError):
        if cause := re.search(r"\*\*\* (SIG\w+) received", log.read_text(errors="replace")):
            why = ", as it does when /dev/shm is full" if cause[1] == "SIGBUS" else ""
            print(
                f"error: Ray's raylet died of {cause[1]}{why}, and the run with it; its log is {log}; "
                f"`embodied-rl train --resume DIR` goes on from the last checkpoint",
                file=sys.stderr,
            )
    for pid in _agents(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _agents(session: Path) -> Iterator[int]:
    """Processes by Ray's names that write logs in the folder of the cluster."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended just now, or another user's
            if (folder / "cmdline").read_bytes().startswith(b"ray::") and any(
                os.readlink(link).startswith(f"{session}/") for link in (folder / "fd").iterdir()
            ):
                yield int(folder.name)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

"""A run on a private Ray cluster that is ended from outside."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

RUN = """
import time
from embodied_rl.pipeline.ray_cluster import _node, cluster
with cluster(None):
    print(_node().get_session_dir_path(), _node().all_processes["raylet"][0].process.pid, flush=True)
    import ray
    while True:
        ray.put(bytes(10**6))
        time.sleep(0.1)
"""


@pytest.fixture
def run() -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", RUN], stdout=pipe, stderr=pipe, text=True) as process:
        yield process
        process.kill()


def processes(session: str) -> set[str]:
    """Names of processes that write logs of the cluster."""
    found = set[str]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(link).startswith(f"{session}/") for link in (folder / "fd").iterdir()):
                found.add((folder / "cmdline").read_bytes().split(b"\0")[0].decode().rpartition("/")[2])
        except OSError:
            continue
    return found


def test_a_raylet_that_dies_is_told_of_and_nothing_is_left(run: subprocess.Popen[str]) -> None:
    assert run.stdout and run.stderr
    session, raylet = run.stdout.readline().split()
    assert "raylet" in processes(session)
    os.kill(int(raylet), 7)  # SIGBUS
    run.wait(60)
    said = run.stderr.read()
    assert "error: Ray's raylet died of SIGBUS, as it does when /dev/shm is full" in said, said
    assert gone(session)


def test_a_run_that_is_killed_leaves_nothing(run: subprocess.Popen[str]) -> None:
    assert run.stdout and run.stderr
    session, _ = run.stdout.readline().split()
    run.kill()
    assert gone(session)
    assert "error" not in run.stderr.read()


def gone(session: str) -> bool:
    deadline = time.monotonic() + 20
    while (left := processes(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left

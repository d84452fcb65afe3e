"""Improve the quickstart's clone by one algorithm after another; success before and after, on the same test episodes.

    uv run python benchmarks/learning/quickstart.py --seeds 0 1

Every run is one of the command line. The results file is written after each, and what it holds of other recipes and
seeds, and any note, stays. `--parallel 2` runs two at a time, each slower for it: "cpu_seconds" (of all processes of a
run) says what it costs whatever else the machine does. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

RECIPES = tuple(f"quickstart_{name}" for name in ("grpo", "dapo", "reinforce", "token_reinforce", "dsrl"))
RESULTS = Path(__file__).parents[1] / "results" / "quickstart_algorithms.json"
LIMIT = 3600
"""Seconds; a run that takes longer has failed."""
WRITING = Lock()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: a temporary one)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write or to add to")
    arguments = parser.parse_args()
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="quickstart-algorithms-"))

    def one(case: tuple[str, int]) -> None:
        name = "-".join(map(str, case))
        add(arguments.results, name, run(*case, folder / name) | {"runs_at_a_time": arguments.parallel})

    with ThreadPoolExecutor(arguments.parallel) as pool:
        list(pool.map(one, product(arguments.recipes, arguments.seeds)))
    runs = json.loads(arguments.results.read_text())["runs"]
    print(json.dumps({name: numbers["gain"] for name, numbers in runs.items()}))


def run(recipe: str, seed: int, out: Path, *settings: str) -> dict[str, Any]:
    """One run; success is [rate, lower, upper] with a 95 % interval."""
    command = [sys.executable, "-m", "embodied_rl.cli", "train", recipe, "--seed", str(seed), "--out", str(out)]
    cpu_seconds = cost([*command, *settings])
    result = json.loads((out / "result.json").read_text())
    evaluations = {each["name"]: each for each in result["evaluations"]}
    initial, final = ([evaluations[name][key] for key in ("success", "low", "high")] for name in ("initial", "final"))
    return {
        "initial": initial,
        "final": final,
        "gain": round(final[0] - initial[0], 3),
        "intervals_disjoint": initial[2] < final[1],
        "episodes": result["evaluation_episodes"],
        "env_steps": result["env_steps"],
        "wall_seconds": round(result["wall_seconds"]),
        "cpu_seconds": round(cpu_seconds),
        "phases": {name: round(seconds) for name, seconds in result["phases"].items()},
    }


def cost(command: list[str]) -> float:
    """Run `command`; CPU seconds of it and of the processes it started and waited for."""
    process = subprocess.Popen(command)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command)
            return usage.ru_utime + usage.ru_stime
        time.sleep(0.2)
    process.kill()
    raise subprocess.TimeoutExpired(command, LIMIT)


def add(file: Path, name: str, numbers: dict[str, Any]) -> None:
    """Write one run into the results."""
    print(name, numbers, flush=True)
    with WRITING:
        known = json.loads(file.read_text()) if file.exists() else {}
        summary = known | {
            "command": "uv run python benchmarks/learning/quickstart.py --seeds 0 1",
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}",
            "runs": dict(sorted((known.get("runs", {}) | {name: numbers}).items())),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""PPO that learns while it collects, by weights one batch behind, against PPO that waits: success at equal steps.

    uv run python benchmarks/learning/asynchronous.py --seeds 0 1 2

Runs of the command line, of `quickstart_ppo` with both stalenesses and nothing else changed, from the same clone and
judged on the same test episodes. "difference" is asynchronous - synchronous success after learning, of every seed, and
[mean, lower, upper] over them with the 95 % interval of all episodes as independent ones. `--parallel 2` runs both
sides of a seed at a time. The last line printed is the JSON object that the results file holds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from quickstart import run

RESULTS = Path(__file__).parents[1] / "results" / "asynchronous.json"
STEPS, EPISODES = 200_000, 400
SIDES = {"synchronous": 0, "asynchronous": 1}
"""And their staleness."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=1, choices=(1, 2), help="runs at a time")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: a temporary one)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="asynchronous-"))
    runs: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        with ThreadPoolExecutor(arguments.parallel) as pool:
            started = {side: pool.submit(one, side, seed, folder / f"{side}-{seed}") for side in SIDES}
            runs[str(seed)] = {side: found.result() for side, found in started.items()}
        print(seed, runs[str(seed)], flush=True)
        found = {
            "command": "uv run python benchmarks/learning/asynchronous.py --seeds 0 1 2",
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}",
            "runs_at_a_time": arguments.parallel,
            "difference": difference(runs),
            "runs": runs,
        }
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


def one(side: str, seed: int, out: Path) -> dict[str, Any]:
    settings = {
        "--algorithm.staleness": SIDES[side],
        "--training.env-steps": STEPS,
        "--training.stop-at-success": "none",  # neither ends before the other
        "--training.converged-clone-steps": 0,
        "--evaluation.episodes": EPISODES,
    }
    return run("quickstart_ppo", seed, out, *(str(part) for setting in settings.items() for part in setting))


def difference(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of success after learning."""
    rates = [tuple(found[side]["final"][0] for side in reversed(SIDES)) for found in runs.values()]
    each = [later - at_once for later, at_once in rates]
    variance = sum(rate * (1 - rate) / EPISODES for pair in rates for rate in pair) / len(rates) ** 2
    mean, half = fmean(each), 1.96 * variance**0.5
    return {"seeds": each, "mean": [round(number, 4) for number in (mean, mean - half, mean + half)]}


if __name__ == "__main__":
    main()

"""Run the quickstart with several seeds and summarise what reinforcement learning made of the clone.

    uv run python scripts/benchmark_quickstart.py --seeds 0 1 2 3 4 --results benchmarks/results/quickstart.json

Every seed is a run of the command line, in a folder of its own under --out. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

KEPT = (
    "seed",
    "initial_success",
    "final_success",
    "converged_clone_success",
    "evaluation_episodes",
    "env_steps",
    "wall_seconds",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, help="folder of the runs (default: a temporary one)")
    parser.add_argument("--results", type=Path, help="write the summary to this file as well")
    arguments = parser.parse_args()
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="quickstart-"))
    runs = [run(arguments.recipe, seed, folder / f"seed{seed}") for seed in arguments.seeds]
    summary = {
        "command": " ".join(["uv run python scripts/benchmark_quickstart.py", *sys.argv[1:]]),
        "recipe": arguments.recipe,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}",
        "runs": runs,
        "mean": {name: mean(run[name] for run in runs) for name in KEPT if name not in ("seed", "evaluation_episodes")},
    }
    if arguments.results:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps({"quickstart": summary["mean"], "seeds": len(runs)}))


def run(recipe: str, seed: int, out: Path) -> dict[str, Any]:
    """One seed through the command line; its numbers from result.json."""
    command = [sys.executable, "-m", "embodied_rl.cli", "train", recipe, "--seed", str(seed), "--out", str(out)]
    subprocess.run(command, check=True, timeout=3600)
    result = json.loads((out / "result.json").read_text())
    numbers = {name: result[name] for name in KEPT}
    print(numbers, flush=True)
    return numbers


if __name__ == "__main__":
    main()

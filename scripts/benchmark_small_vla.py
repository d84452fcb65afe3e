"""Clone a small vision-language-action policy, improve it by PPO and by GRPO; see what it owes to its eyes and ears.

    uv run python scripts/benchmark_small_vla.py --seeds 0 1 --results benchmarks/results/small_vla.json

Every run is one of the command line; afterwards the trained policy is evaluated again on the same test episodes with
black images and with the other task's instruction. Beside the JSON file a picture of the training curves is drawn.
`--parallel 2` runs two at a time, each slower for it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from embodied_rl.training.evaluation import Ablation, evaluate_run

RECIPES = ("small_vla_ppo", "small_vla_grpo")
ABLATIONS: tuple[Ablation, ...] = ("images", "instruction")
LIMIT = 3600
"""Seconds; a run that takes longer has failed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: a temporary one)")
    parser.add_argument("--results", type=Path, help="write the summary to this file, and the curves beside it")
    arguments = parser.parse_args()
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="small-vla-"))
    names = [
        (recipe, seed, folder / f"{recipe}-{seed}") for recipe, seed in product(arguments.recipes, arguments.seeds)
    ]
    with ThreadPoolExecutor(arguments.parallel) as pool:
        runs = list(pool.map(lambda each: run(*each), names))
    summary = {
        "command": " ".join(["uv run python scripts/benchmark_small_vla.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}",
        "runs": runs,
    }
    if arguments.results:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(summary, indent=2) + "\n")
        draw([out for _, _, out in names], arguments.results.with_suffix(".png"))
    print(json.dumps({f"{each['recipe']}-{each['seed']}": each["gain"] for each in runs}))


def run(recipe: str, seed: int, out: Path) -> dict[str, Any]:
    """One run through the command line and the evaluations after it."""
    command = [sys.executable, "-m", "embodied_rl.cli", "train", recipe, "--seed", str(seed), "--out", str(out)]
    subprocess.run(command, check=True, timeout=LIMIT)
    result = json.loads((out / "result.json").read_text())
    before, after = (next(each for each in result["evaluations"] if each["name"] == n) for n in ("initial", "final"))
    numbers: dict[str, Any] = {
        "recipe": recipe,
        "seed": seed,
        "initial": [before[key] for key in ("success", "low", "high")],
        "final": [after[key] for key in ("success", "low", "high")],
        "gain": round(after["success"] - before["success"], 3),
        "intervals_disjoint": before["high"] < after["low"],
        "episodes": after["episodes"],
        "env_steps": result["env_steps"],
        "minutes": round(result["wall_seconds"] / 60, 1),
    }
    for without in ABLATIONS:
        blind = evaluate_run(out, after["episodes"], without=without)
        numbers[f"without_{without}"] = blind["success"]
    print(numbers, flush=True)
    return numbers


def draw(runs: list[Path], file: Path) -> None:
    """Success in development evaluations and of training episodes, over environment steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for folder in runs:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for axis, key in zip(axes, ("evaluation/success", "train/success"), strict=True):
            points = [(row["env_steps"], row[key]) for row in rows if row.get(key) is not None]
            axis.plot(*zip(*points, strict=True), label=folder.name)
            axis.set(title=key, xlabel="environment steps", ylim=(0, 1))
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()

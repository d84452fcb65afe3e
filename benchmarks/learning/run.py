"""Do our algorithms learn as well as the libraries they are known from?

    uv run --group peers python benchmarks/learning/run.py --results benchmarks/results/learning.json
    uv run --group peers python benchmarks/learning/run.py pendulum_sac --seeds 3 4 --results learning.json

Ours is `embodied-rl train RECIPE`, the other side `peers.py`; they alternate, seed by seed, each in processes of its
own with one thread and equal budgets, and are judged by the same evaluation on the same episodes. The file of results
is added to after every run, and what it already holds is not run again, so that a benchmark may be split into many
calls, and calls of different cases may run side by side. The curves are drawn beside it. The last line printed is one
JSON object with the summaries of the cases.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from comparison import CASES, Case, Runs, merge, summary

LIMIT = 1800
"""Seconds; a run that takes longer has failed."""
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--sides", nargs="+", default=["ours", "peer"], choices=["ours", "peer"])
    parser.add_argument("--results", type=Path, help="file to add to; the curves go to a PNG beside it")
    arguments = parser.parse_args()
    cases: list[str] = arguments.cases or list(CASES)
    seeds: list[int] = arguments.seeds
    sides: list[str] = arguments.sides
    if unknown := set(cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    file = arguments.results or Path(tempfile.mkdtemp(prefix="learning-")) / "results.json"
    known = read(file)
    for case, seed, side in product(cases, seeds, sides):
        if side not in known.get(case, {}).get(str(seed), {}):
            found = run(CASES[case], seed, side)
            known = merge(read(file), case, seed, side, found)  # others may have added to it meanwhile
            write(file, known)
    write(file, known)  # what follows from the runs may be counted in another way by now
    print(json.dumps({case: summary(CASES[case], known[case]) for case in cases}))


def run(case: Case, seed: int, side: str) -> dict[str, Any]:
    """One run of one side: {"final", "curve", "cpu_seconds", "wall_seconds", "versions"}."""
    with tempfile.TemporaryDirectory(prefix="learning-") as folder:
        out = Path(folder) / "out"
        if side == "ours" or not case.peer:
            settings = [] if side == "ours" else case.overrides
            command = ["-m", "embodied_rl.cli", "train", case.recipe, "--seed", str(seed), "--out", str(out), *settings]
        else:
            command = [str(HERE / "peers.py"), case.recipe, str(seed), str(out)]
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], check=True, timeout=LIMIT, env=os.environ | ONE_THREAD)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = _ours(out) if out.is_dir() else json.loads(out.read_text())
    found["final"] = {name: found["final"][name] for name in ("episodes", "mean_return", "success_at_end")}
    found["cpu_seconds"] = round(used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime, 1)
    found["wall_seconds"] = round(time.monotonic() - began, 1)
    print(case.recipe, seed, side, found["final"], f"{found['cpu_seconds']} CPU seconds", flush=True)
    return found


def _ours(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text())
    evaluations = {each["name"]: each for each in result["evaluations"]}
    curve = [{"env_steps": 0, "return": evaluations["initial"]["mean_return"], "success": result["initial_success"]}]
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "evaluation/return" in row:
            names = {"return": "evaluation/return", "success": "evaluation/success"}
            curve.append({"env_steps": row["env_steps"]} | {name: row.get(key) for name, key in names.items()})
    return {"final": evaluations["final"], "curve": curve, "versions": result["versions"]}


def read(file: Path) -> dict[str, Runs]:
    """The runs of all cases that `file` holds."""
    return json.loads(file.read_text())["runs"] if file.exists() else {}


def write(file: Path, known: dict[str, Runs]) -> None:
    """Results and curves."""
    content = {
        "command": f"uv run --group peers python benchmarks/learning/run.py --results {file}",
        "machine": f"{os.cpu_count()} CPU cores, one thread for each run, {platform.machine()}",
        "summary": {case: summary(CASES[case], runs) for case, runs in known.items()},
        "runs": known,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(file)
    draw(known, file.with_suffix(".png"))


def draw(known: dict[str, Runs], file: Path) -> None:
    """A panel per case: every run thin, the mean over the seeds thick, the threshold dotted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        -(-len(known) // 3), min(3, len(known)), figsize=(12, 3.4 * -(-len(known) // 3)), squeeze=False
    )
    for axis in axes.flat[len(known) :]:
        axis.remove()
    for axis, (name, runs) in zip(axes.flat, known.items(), strict=False):
        case = CASES[name]
        for side, colour in (("ours", "C0"), ("peer", "C1")):
            curves = [sides[side]["curve"] for sides in runs.values() if side in sides]
            for curve in curves:
                axis.plot(*_columns(curve, case.measure), color=colour, alpha=0.3, linewidth=0.8)
            label = "embodied_rl" if side == "ours" else case.peer or "without demonstrations"
            means = [
                [sum(values) / len(values) for values in zip(*column, strict=True)]
                for column in zip(*(_columns(curve, case.measure) for curve in curves), strict=True)
            ]
            if means:
                axis.plot(*means, color=colour, label=f"{label}, {len(curves)} seeds")
        if case.threshold is not None:
            axis.axhline(case.threshold, color="grey", linestyle=":")
        axis.set(title=name, xlabel="environment steps", ylabel=case.measure)
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def _columns(curve: list[dict[str, Any]], measure: str) -> tuple[list[float], list[float]]:
    return [point["env_steps"] for point in curve], [point[measure] for point in curve]


if __name__ == "__main__":
    main()

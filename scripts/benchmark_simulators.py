"""How fast are the simulator adapters against what one would otherwise use?

Each section alternates the two sides in one run and takes medians of ratios, because machines are noisy:

    maniskill   against gymnasium's AsyncVectorEnv over ManiSkill's CPU wrapper, and the difference of numbers
    libero      against lerobot's LiberoEnv in an AsyncVectorEnv, and against one environment without any wrapper;
                the reset of the same task against the full one
    metaworld   against gymnasium.make_vec
    isaaclab    against calling the environment directly: the share of time that the adapter costs
    transport   images out of a simulator's process against one memcpy of them

    python scripts/benchmark_simulators.py                      # everything, about half an hour
    python scripts/benchmark_simulators.py --smoke              # shorter rounds
    python scripts/benchmark_simulators.py libero transport     # some of it

The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on both sides: one thread per process

SECTIONS = ("maniskill", "libero", "metaworld", "isaaclab", "transport")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help="default: all")
    parser.add_argument("--smoke", action="store_true", help="fewer, shorter rounds")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    wrong = set(options.sections) - set(SECTIONS)
    if wrong:
        parser.error(f"unknown section {', '.join(sorted(wrong))}; choose from {', '.join(SECTIONS)}")
    found: dict[str, Any] = {}
    for section in options.sections or SECTIONS:
        print(f"--- {section}", flush=True)
        found |= importlib.import_module(f"simulator_benchmarks.{section}").measure(options.smoke)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()

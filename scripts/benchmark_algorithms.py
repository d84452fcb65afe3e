"""How fast do the algorithms learn, against stable-baselines3 and the loop of CleanRL's single-file scripts?

All sides take turns in one process on one thread, with the same networks, data, batch sizes and environments, which are
all in that process (ours by `simulator.workers` none). What is measured is CPU seconds, so that a busy machine changes
little; a ratio is the median over the rounds, above 1: how many times faster ours is. Only "two_cores" is by the clock.

    ppo    HalfCheetah-v5, 16 environments x 64 steps, 5 epochs of minibatches of 256, actor and critic each 256 x 256 x
           256 tanh: environment steps per CPU second, stepping, acting and learning together
    sac    batches of 256 drawn from a replay buffer, observations of 17, actions of 6, actor and two critics each 256 x
           256: updates of everything (critics, actor, temperature, targets) per CPU second
    two_cores  as "ppo", but ours learns in another process, beside collecting (staleness 1), and stable-baselines3
           computes in one or in two threads, whichever is faster: on a quiet machine only

    uv run --group peers python scripts/benchmark_algorithms.py            # two minutes
    uv run --group peers python scripts/benchmark_algorithms.py --smoke    # shows that everything runs
    uv run --group peers python scripts/benchmark_algorithms.py sac        # some of it

The floor beside each is what the matrix products alone allow: one fused forward and backward pass per minibatch, no
optimizer, no loss, and for PPO bare environments besides. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from importlib.util import find_spec
from pathlib import Path

SECTIONS = ("ppo", "sac", "two_cores")
"""Each is a module of algorithm_benchmarks with a function `measure`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"default: all of {', '.join(SECTIONS)}")
    parser.add_argument("--smoke", action="store_true", help="little work, in two rounds")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    if wrong := set(options.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(wrong))}; choose from {', '.join(SECTIONS)}")
    if find_spec("stable_baselines3") is None:
        parser.error("stable-baselines3 is not installed: uv run --group peers python scripts/benchmark_algorithms.py")

    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    import torch

    torch.set_num_threads(1)
    found: dict[str, object] = {}
    for section in options.sections or SECTIONS:
        module = importlib.import_module(f"algorithm_benchmarks.{section}")
        found |= module.measure(2 if options.smoke else options.rounds, options.smoke)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()

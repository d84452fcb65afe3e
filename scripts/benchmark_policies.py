"""How fast are the vision-language-action policies against what one would otherwise run with the same weights?

Each section alternates the two sides in one run, on the same weights and inputs, checks that both give the same numbers
and takes medians of ratios (above 1: how many times faster ours is):

    openvla   openvla_act_vs_generate      an action's 7 tokens, against transformers' `generate`
              openvla_update_vs_full       score and gradients, against the logits of all tokens at all positions
    oft       oft_update_vs_full           the same for a chunk of 8 actions decoded at once
              oft_memory_vs_full           peak memory of that update over the peak of the other: 0.6 = 40 % lower
    (updates of all weights of the language model; with adapters the keys are openvla_lora_… and oft_lora_…)
    pi0       pi0_act_vs_lerobot           a chunk in 10 denoise steps, against LeRobot's `PI0Policy`
              pi0_update_vs_recomputed     score of 4 denoise steps and gradients, against a prefix for every step

    python scripts/benchmark_policies.py                # width 1024, 16 layers, 256 image tokens: some minutes
    python scripts/benchmark_policies.py --smoke        # a toy that shows that everything runs
    python scripts/benchmark_policies.py pi0            # some of it
    python scripts/benchmark_policies.py --device cuda  # OpenVLA-7B and π₀ in bfloat16, random weights

Besides, "latency_ms", "tflops" and "share_of_peak" of ours, the peak being that of a large matrix product here. The run
on a GPU is written and untried: none was at hand. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

SECTIONS = {"openvla": "openvla", "oft": "openvla", "pi0": "pi0"}
"""Section: the module in policy_benchmarks that has it, as a function."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help="default: all")
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; on cuda the published sizes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    wrong = set(options.sections) - set(SECTIONS)
    if wrong:
        parser.error(f"unknown section {', '.join(sorted(wrong))}; choose from {', '.join(SECTIONS)}")

    from policy_benchmarks.measuring import Bench

    bench = Bench(options.device, 2 if options.smoke else options.rounds)
    scale = "toy" if options.smoke else "published" if options.device == "cuda" else "laptop"
    for section in options.sections or SECTIONS:
        print(f"--- {section}, {scale} size on {options.device}", flush=True)
        getattr(importlib.import_module(f"policy_benchmarks.{SECTIONS[section]}"), section)(bench, scale)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(bench.found, indent=2) + "\n")
    print(json.dumps(bench.found))


if __name__ == "__main__":
    main()

"""How much of the time that simulating, deciding and learning could overlap do they overlap?

    uv run python scripts/benchmark_pipeline.py            # two minutes
    uv run python scripts/benchmark_pipeline.py --smoke    # shows that everything runs

Costs are simulated by sleeping, as of devices that work beside this one: a step of n environments takes 2.5 n ms, a
decision for n rows 8 + 1.5 n ms, learning from a segment of 24 decisions 480 ms. Everything else is real: 16
environments x 2 cameras x 224 x 224 x 3 bytes per step go from simulator processes through the rollout worker into the
segment, whose images the learner checks; the policy and its gradients are torch's.

    local_sync              one group of environments; collect, then learn
    local_double_buffered   two groups that take turns; collect, then learn
    local_async             two groups; learning from a segment while the next one is collected (staleness 1)

A number is ideal / achieved seconds per iteration, the median over the repetitions. Ideal is the closed formula of
pipeline_benchmarks/ideal.py from the nominal costs of simulating and learning and the measured time of a decision;
handing weights over is free in it. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

MODES = {"local_sync": (1, 0), "local_double_buffered": (2, 0), "local_async": (2, 1)}
"""(groups, staleness)."""
ENVIRONMENTS = 16
DECISIONS = 24
SIMULATE, INFER, LEARN = 2.5e-3, (8e-3, 1.5e-3), 0.48
"""Seconds: per row; fixed and per row; per segment of DECISIONS."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", help=f"default: all of {', '.join(MODES)}")
    parser.add_argument("--smoke", action="store_true", help="one repetition of one iteration")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=4, help="of a repetition")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    if wrong := set(options.modes) - set(MODES):
        parser.error(f"unknown mode {', '.join(sorted(wrong))}; choose from {', '.join(MODES)}")

    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    import torch

    torch.set_num_threads(1)
    repetitions, iterations = (1, 1) if options.smoke else (options.repetitions, options.iterations)
    found: dict[str, float] = {}
    print(f"{'':22} {'ideal':>8} {'achieved':>8} {'decision':>9}  ideal / achieved, median (all)")
    for mode in options.modes or MODES:
        rounds = measure(*MODES[mode], repetitions, iterations)
        shares = [ideal / achieved for ideal, achieved, _ in rounds]
        found[mode] = round(statistics.median(shares), 3)
        ideal, achieved, infer = (statistics.median(column) for column in zip(*rounds, strict=True))
        each = " ".join(f"{share:.3f}" for share in shares)
        print(
            f"{mode:22} {ideal:6.3f} s {achieved:6.3f} s {1e3 * infer:6.2f} ms  {found[mode]:.3f} ({each})", flush=True
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


def measure(groups: int, staleness: int, repetitions: int, iterations: int) -> list[tuple[float, float, float]]:
    """(ideal, achieved seconds of an iteration, seconds of a decision) of every repetition."""
    import torch
    from pipeline_benchmarks.ideal import iteration
    from pipeline_benchmarks.learned import Learner, Sleeping, inference_seconds
    from pipeline_benchmarks.simulated import SimulatedConfig

    from embodied_rl.pipeline.env_groups import build_simulator, rollout_worker
    from embodied_rl.pipeline.tickets import TicketCounter
    from embodied_rl.simulators.reset_schedule import RandomSchedule
    from embodied_rl.specs import connect
    from embodied_rl.training.on_policy import SegmentWorkflow

    found = []
    with build_simulator(SimulatedConfig(ENVIRONMENTS, groups, SIMULATE), groups, RandomSchedule(0)) as simulator:
        seen, told = simulator.observation_spec, simulator.action_spec
        policy = Sleeping(seen, told, *INFER)
        connection = connect(seen, told, policy.observation_spec, policy.action_spec)
        worker = rollout_worker(simulator, policy, connection, seed=0)
        workflow = SegmentWorkflow(worker, Learner(policy, staleness, LEARN), DECISIONS, torch.Generator())
        workflow.restart(TicketCounter(0))
        for _ in range(2):  # until all memory has been touched
            workflow.iterate(border=False)
        acting = workflow.replica.policy if workflow.replica else policy
        for _ in range(repetitions):
            acting.spent.clear()
            began = time.perf_counter()
            for _ in range(iterations):
                workflow.iterate(border=False)
            achieved = (time.perf_counter() - began) / iterations
            infer = inference_seconds(acting.spent)
            ideal = iteration(DECISIONS, groups, staleness, SIMULATE * ENVIRONMENTS / groups, infer, LEARN)
            found.append((ideal, achieved, infer))
    return found


if __name__ == "__main__":
    main()

"""How much of the time that simulating, deciding and learning could overlap do they overlap?

    uv run python scripts/benchmark_pipeline.py            # ten minutes
    uv run python scripts/benchmark_pipeline.py --smoke    # shows that everything runs
    uv run python scripts/benchmark_pipeline.py local      # some of it, by how the names begin

Costs are simulated by sleeping, as of devices that work beside this one: a step of n environments takes 2.5 n ms, a
decision for n rows 8 + 1.5 n ms, learning from a segment of 24 decisions 480 ms. Everything else is real: 16
environments x 2 cameras x 224 x 224 x 3 bytes per step go from simulator processes through the rollout worker into the
segment, whose images the learner checks; the policy and its gradients are torch's.

    local_sync              one group of environments; collect, then learn
    local_double_buffered   two groups that take turns; collect, then learn
    local_async             two groups; learning from a segment while the next one is collected (staleness 1)
    ray_...                 the same in a rollout worker on Ray: a segment is one call
    queue_...               the same loop in this process, but every order to a simulator, every answer, images and all,
                            and every segment goes through a ray.util.queue: what central channels cost

A number is ideal / achieved seconds per iteration, the median over the repetitions, in which the modes take turns.
Ideal is the closed formula of pipeline_benchmarks/ideal.py from the nominal costs of simulating and learning and the
measured time of a decision; handing weights over is free in it. "vs_ray_queue" is how many times as long as local_async
the queue takes for the same, "vs_ray_queue_double_buffered" likewise. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

WAYS = {"sync": (1, 0), "double_buffered": (2, 0), "async": (2, 1)}
"""(groups, staleness)."""
MODES = {f"{where}_{way}": (where, *settings) for where in ("local", "ray", "queue") for way, settings in WAYS.items()}
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
    modes = [mode for mode in MODES if not options.modes or mode.startswith(tuple(options.modes))]
    if wrong := [name for name in options.modes if not any(mode.startswith(name) for mode in MODES)]:
        parser.error(f"unknown mode {', '.join(wrong)}; choose from {', '.join(MODES)}")

    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    import torch

    torch.set_num_threads(1)
    repetitions, iterations = (1, 1) if options.smoke else (options.repetitions, options.iterations)
    with ExitStack() as resources:
        if any(not mode.startswith("local") for mode in modes):
            from embodied_rl.pipeline.ray_cluster import cluster

            resources.enter_context(cluster(None))
        sides = {mode: resources.enter_context(side(*MODES[mode])) for mode in modes}
        rounds = [{mode: run(iterations) for mode, run in sides.items()} for _ in range(repetitions)]
    found = report({mode: [each[mode] for each in rounds] for mode in modes})
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


@dataclass(frozen=True)
class Round:
    """Seconds of an iteration, ideal and achieved, and of a decision."""

    ideal: float
    achieved: float
    infer: float


@contextmanager
def side(where: str, groups: int, staleness: int) -> Iterator[Callable[[int], Round]]:
    """A way to run it, as a function that runs so many iterations."""
    import torch
    from pipeline_benchmarks.ideal import iteration
    from pipeline_benchmarks.learned import Learner, Sleeping, inference_seconds, spent
    from pipeline_benchmarks.queued import QueuedSimulator, QueuedWorkflow
    from pipeline_benchmarks.simulated import SimulatedConfig

    from embodied_rl.config import PipelineConfig
    from embodied_rl.pipeline import executor
    from embodied_rl.pipeline.env_groups import EnvGroups
    from embodied_rl.pipeline.tickets import TicketCounter
    from embodied_rl.simulators.reset_schedule import RandomSchedule
    from embodied_rl.specs import connect
    from embodied_rl.training.on_policy import SegmentWorkflow

    rows = ENVIRONMENTS // groups
    if where == "queue":
        each = [QueuedSimulator(rows, SIMULATE, RandomSchedule(0)) for _ in range(groups)]
        started = EnvGroups(each) if groups > 1 else each[0]
    else:
        pipeline = PipelineConfig(executor=where, env_groups=groups, rollout_cpus=0.1)  # type: ignore[arg-type]
        started = executor.start(SimulatedConfig(ENVIRONMENTS, groups, SIMULATE), pipeline, RandomSchedule(0))
    with started as simulator:
        seen, told = simulator.observation_spec, simulator.action_spec
        policy = Sleeping(seen, told, *INFER)
        connection = connect(seen, told, policy.observation_spec, policy.action_spec)
        worker = executor.collector(simulator, policy, connection, seed=0)
        loop = QueuedWorkflow if where == "queue" else SegmentWorkflow
        workflow = loop(worker, Learner(policy, staleness, LEARN), DECISIONS, torch.Generator())
        acting = workflow.replica.policy if workflow.replica else policy

        def run(iterations: int) -> Round:
            began = time.perf_counter()
            for _ in range(iterations):
                workflow.iterate(border=False)
            achieved = (time.perf_counter() - began) / iterations
            infer = inference_seconds(worker.apart(acting, spent, range(1))[0])
            ideal = iteration(DECISIONS, groups, staleness, SIMULATE * rows, infer, LEARN)
            return Round(ideal, achieved, infer)

        workflow.restart(TicketCounter(0))
        run(2)  # until all memory has been touched
        yield run


def report(rounds: Mapping[str, Sequence[Round]]) -> dict[str, float]:
    """Print the medians; ideal / achieved of each mode, and what the queue costs."""
    found: dict[str, float] = {}
    print(f"{'':22} {'ideal':>8} {'achieved':>8} {'decision':>9}  ideal / achieved, median (all)")
    for mode, each in rounds.items():
        shares = [one.ideal / one.achieved for one in each]
        found[mode] = round(statistics.median(shares), 3)
        ideal, achieved, infer = (statistics.median(column) for column in zip(*map(astuple, each), strict=True))
        listed = " ".join(f"{share:.3f}" for share in shares)
        print(f"{mode:22} {ideal:6.3f} s {achieved:6.3f} s {1e3 * infer:6.2f} ms  {found[mode]:.3f} ({listed})")
    for key, way in {"vs_ray_queue": "async", "vs_ray_queue_double_buffered": "double_buffered"}.items():
        queued, local = rounds.get(f"queue_{way}"), rounds.get(f"local_{way}")
        if queued and local:
            ratios = [theirs.achieved / ours.achieved for theirs, ours in zip(queued, local, strict=True)]
            found[key] = round(statistics.median(ratios), 3)
    return found


if __name__ == "__main__":
    main()

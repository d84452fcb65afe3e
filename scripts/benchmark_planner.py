"""Does the planner know beforehand how fast a configuration will be, and does it pick a fast one?

    uv run python scripts/benchmark_planner.py            # four minutes
    uv run python scripts/benchmark_planner.py --smoke    # shows that everything runs

    sleeping    the simulator, policy and learner of benchmark_pipeline.py, which cost what they are told to
    cheetah     HalfCheetah in the learner's own process, policy and PPO of half_cheetah_ppo, with shorter segments
    quickstart  PickCube in ManiSkill, flow-matching policy and PPO of quickstart_ppo, with shorter segments

Each is profiled once, with all its environments in one group and learning after collecting; then every configuration
(environments, groups, staleness) is predicted from that profile alone, and run. An error is measured / predicted
seconds per iteration - 1; the measured ones are medians. A pick is the best plan for all environments; its loss is
how much longer its iterations take than those of the fastest configuration measured. The last line of the output is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Setting = tuple[int, int, int]
"""(environments, groups, staleness)."""
SETTINGS: dict[str, list[Setting]] = {
    "sleeping": [(16, 1, 0), (16, 2, 0), (16, 1, 1), (16, 2, 1), (8, 2, 0), (8, 1, 1)],
    "cheetah": [(8, 1, 0), (8, 1, 1), (16, 1, 0), (16, 1, 1)],
    "quickstart": [(32, 1, 0), (32, 2, 0), (32, 1, 1), (32, 2, 1), (16, 1, 0), (16, 2, 1)],
}
ITERATIONS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"default: all of {', '.join(SETTINGS)}")
    parser.add_argument("--smoke", action="store_true", help="one configuration of each, one iteration")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    if wrong := set(options.cases) - set(SETTINGS):
        parser.error(f"unknown case {', '.join(sorted(wrong))}; choose from {', '.join(SETTINGS)}")

    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    found: dict[str, Any] = {}
    for case in options.cases or SETTINGS:
        settings, iterations = (SETTINGS[case][:1], 1) if options.smoke else (SETTINGS[case], ITERATIONS)
        found |= {f"{case}_{name}": value for name, value in compare(case, settings, iterations).items()}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


def compare(case: str, settings: list[Setting], iterations: int) -> dict[str, Any]:
    """Predict and run the `settings` of a case."""
    from embodied_rl.planner import events, placement
    from embodied_rl.planner.plan import costs_table
    from embodied_rl.planner.profile import profile

    config = CASES[case]()
    profiled = profile(config, beside=True)
    print(f"{case}: {costs_table(profiled)}\n{'':4}environments groups staleness predicted measured  error")
    errors, measured = {}, {}
    for envs, groups, staleness in settings:
        work = replace(profiled.work, rows=envs, learned=None)
        cpu = placement.Placement(range(0), range(0), range(0), groups, staleness)
        each = placement.seconds(work, cpu)
        expected, *_ = events.simulate(work.decisions, cpu, each, profiled.cores, profiled.variation, iterations=20)
        seconds = run(config, envs, groups, staleness, iterations)
        measured[envs, groups, staleness] = seconds
        error = errors[f"{envs}_{groups}_{staleness}"] = round(seconds / expected - 1, 3)
        print(f"{'':4}{envs:12} {groups:6} {staleness:9} {expected:7.3f} s {seconds:6.3f} s {error:+6.1%}", flush=True)
    pick = profiled.plans(staleness=1)[0].placement
    whole = {setting: seconds for setting, seconds in measured.items() if setting[0] == config.simulator.num_envs}
    picked = whole.get((config.simulator.num_envs, pick.groups, pick.staleness))
    loss = round(picked / min(whole.values()) - 1, 3) if picked else None  # not measured in a smoke run
    print(f"{'':4}picks groups {pick.groups}, staleness {pick.staleness}; loss {loss}")
    worst = max(map(abs, errors.values()))
    return {"errors": errors, "worst_error": worst, "within_15_percent": worst <= 0.15, "pick_loss": loss}


def run(config: Any, envs: int, groups: int, staleness: int, iterations: int) -> float:
    """Median seconds of an iteration."""
    import torch

    from embodied_rl.pipeline.env_groups import build_simulator, rollout_worker
    from embodied_rl.pipeline.tickets import TicketCounter
    from embodied_rl.simulators.reset_schedule import RandomSchedule
    from embodied_rl.specs import connect
    from embodied_rl.training.on_policy import SegmentWorkflow

    simulated = replace(config.simulator, num_envs=envs)
    torch.manual_seed(0)
    with build_simulator(simulated, groups, RandomSchedule(0)) as simulator:
        seen, told = simulator.observation_spec, simulator.action_spec
        policy = config.policy.build(seen, told)
        algorithm = replace(config.algorithm, staleness=staleness).build(policy, 0)
        connection = connect(seen, told, policy.observation_spec, policy.action_spec)
        worker = rollout_worker(simulator, policy, connection, seed=0)
        decisions = config.training.decisions_per_iteration
        workflow = SegmentWorkflow(worker, algorithm, decisions, torch.Generator().manual_seed(0))
        workflow.restart(TicketCounter(0))
        for _ in range(1 if iterations == 1 else 2):  # until all memory has been touched
            workflow.iterate(border=False)
        lasted = []
        for _ in range(iterations):
            began = time.perf_counter()
            workflow.iterate(border=False)
            lasted.append(time.perf_counter() - began)
    return statistics.median(lasted)


def sleeping() -> Any:
    """As much of a run's configuration as a profile reads."""
    from pipeline_benchmarks.learned import Learner, Sleeping
    from pipeline_benchmarks.simulated import SimulatedConfig

    from embodied_rl.config import RunConfig, TrainingConfig

    @dataclass(frozen=True)
    class Simulator(SimulatedConfig):
        num_tasks: int = 1
        num_states: int = 0

    @dataclass(frozen=True)
    class Policy:
        def build(self, seen: Any, told: Any) -> Sleeping:
            return Sleeping(seen, told, 8e-3, 1.5e-3)

    class PerDecision(Learner):
        """Takes its seconds for every decision of a segment."""

        each = 1.25e-3

        def learn(self, trajectory: Any, generator: Any) -> dict[str, float]:
            self.seconds = self.each * trajectory.reward.shape[:2].numel()
            return super().learn(trajectory, generator)

    @dataclass(frozen=True)
    class Algorithm:
        staleness: int = 0

        def build(self, policy: Any, seed: int) -> PerDecision:
            return PerDecision(policy, self.staleness, 0.0)

    training = TrainingConfig(decisions_per_iteration=24)
    return RunConfig("sleeping", Simulator(16, 2, 2.5e-3), Policy(), Algorithm(), training=training)


def quickstart() -> Any:
    """Of PPO without the iterations that train the critic alone, and never ending an update early."""
    from embodied_rl.registry import recipes

    config = recipes.load("quickstart_ppo")()
    return replace(
        config,
        training=replace(config.training, decisions_per_iteration=16),
        algorithm=replace(config.algorithm, critic_warmup=0, target_kl=None),
    )


def cheetah() -> Any:
    """Of PPO without an end of its own."""
    from embodied_rl.registry import recipes

    config = recipes.load("half_cheetah_ppo")()
    return replace(config, training=replace(config.training, decisions_per_iteration=128))


CASES: dict[str, Callable[[], Any]] = {"sleeping": sleeping, "cheetah": cheetah, "quickstart": quickstart}


if __name__ == "__main__":
    main()

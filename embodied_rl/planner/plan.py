"""Plans for a recipe: on this machine as it is, or on one that is not here; and the best of them as a configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from embodied_rl.config import RunConfig
from embodied_rl.planner.costs import Cost, Memory
from embodied_rl.planner.profile import Profile, profile
from embodied_rl.planner.replanning import Replanning, describe, placed
from embodied_rl.planner.search import Machine, Plan, search
from embodied_rl.training import dry_run, memory

COPY = 20e9
"""Bytes per second between a device and its host, assumed for machines that are not here (PCIe 4.0 x 16)."""
BUSY = 0.5
"""Load per core from which on other work disturbs."""
SHOWN = 10
"""Plans in a table."""


def elsewhere(config: RunConfig, found: Profile, devices: int, limit: float, staleness: int) -> list[Plan]:
    """For `devices` devices of `limit` bytes each that are as fast as this machine's, a core for every process, the
    learner in one of its own."""
    needs = needed(config, found)
    costs = replace(found.work.costs, memory=needs, switch=needs.train / COPY, overlap=1.0)
    machine = Machine(devices, limit)
    return search(replace(found.work, costs=costs, inside=False), machine, found.groups, staleness, found.variation)


def needed(config: RunConfig, found: Profile) -> Memory:
    """Bytes to act and to learn, as a dry run finds them without having them. What simulators need is not known."""
    policy, inputs = memory.build_on_meta(config.policy, found.seen, found.told)
    assert config.algorithm is not None
    algorithm = config.algorithm.build(policy, config.seed)
    acting = memory.weights(policy)
    settings = config.algorithm
    part = min(settings.microbatch or found.work.batch, -(-found.work.batch // settings.minibatches))
    kept, _ = memory.activations(policy, inputs, part)
    return Memory(infer=acting, train=acting + memory.learning(dry_run.trained(algorithm)) + kept)


def choose(config: RunConfig) -> tuple[RunConfig, Replanning, str]:
    """`config` with the best plan for this machine, what that should bring, and what it is in words. It learns from
    older weights only as far as the configuration allows it to."""
    allowed = getattr(config.algorithm, "staleness", 0)
    found = profile(config, beside=allowed > 0)
    replanning = Replanning(found, allowed)
    plan = replanning.plan
    text = f"{describe(plan)}, {found.steps / plan.seconds:,.0f} env steps/s expected, as {plan.reason}{_busy(found)}"
    return placed(config, plan.placement), replanning, text


def costs_table(found: Profile) -> str:
    """The fitted costs, and what they were fitted to."""
    where = found.device.type if found.device.type != "cpu" else "CPU"
    lines = [f"costs, policy on the {where}, {found.cores} cores{_busy(found)}"]
    costs, whole = found.work.costs, found.samples[-1]
    rows = "environments per process" if found.work.processes else "environments"
    for name, text, unit in (
        ("simulate", "simulate a chunk", rows),
        ("infer", "decide", "environments"),
        ("record", "record a decision", "environments"),
        ("train", "learn from a batch", "decisions"),
    ):
        cost: Cost = getattr(costs, name)
        seen = ", ".join(
            f"{sample.batch if name == 'train' else sample.rows}: {1e3 * getattr(sample, name).seconds:.3g}"
            for sample in found.samples
        )
        line = f"{1e3 * cost.fixed:.3g} + {1e3 * cost.per_row:.3g} ms x {unit}"
        lines.append(f"  {text:20}{line:44} {cost.cores:4.0%} of a core  measured {seen} ms")
    lines.append(f"  {'hand weights over':20}{1e3 * costs.sync:.3g} ms")
    if costs.overlap > 1:
        lines.append(f"  collecting and learning at once: {costs.overlap:.2f} times longer than cores alone explain")
    lines.append(
        f"an iteration: {whole.rows} environments x {found.work.decisions} decisions, {found.steps:,.0f} steps"
    )
    return "\n".join(lines)


def _busy(found: Profile) -> str:
    """A caution where other work disturbed the measurement."""
    if found.load < BUSY * found.cores:
        return ""
    return f" (this machine was busy, load {found.load:.1f}: measured costs are higher than without)"


def plans_table(plans: Sequence[Plan], steps: float, devices: bool) -> str:
    """The best plans, best first; `devices` shows where their stages are."""
    head = ["", *(["placement", "simulate/infer/train on"] if devices else []), "env_groups", "staleness"]
    head += ["s/iteration", "env steps/s", "simulate", "decide", "learn", "limited by"]
    table = [head]
    for number, plan in enumerate(plans[:SHOWN], start=1):
        place, busy = plan.placement, plan.busy
        spans = "/".join(_span(each) for each in (place.simulate, place.infer, place.train))
        shares = [busy.get("simulate", 0.0), busy.get("infer", 0.0) + busy.get("record", 0.0), busy.get("train", 0.0)]
        table.append(
            [
                str(number),
                *([place.mode, spans] if devices else []),
                str(place.groups),
                str(place.staleness),
                f"{plan.seconds:.3g}",
                f"{steps / plan.seconds:,.0f}",
                *(f"{share:.0%}" for share in shares),
                plan.reason,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


def _span(devices: range) -> str:
    """Of device numbers."""
    if not devices:
        return "cores"
    return f"{devices[0]}-{devices[-1]}" if len(devices) > 1 else f"{devices[0]}"


def plan(config: RunConfig, devices: int | None = None, memory_gb: float | None = None) -> str:
    """What `embodied-rl plan` prints."""
    known = getattr(config.algorithm, "staleness", None)
    allowed = 0 if known is None else max(1, known)
    found = profile(config, beside=allowed > 0)
    if devices is None:
        head, plans = "plans for this machine", found.plans(allowed)
    else:
        plans = elsewhere(config, found, devices, memory_gb * 1e9 if memory_gb else math.inf, allowed)
        size = f" of {memory_gb:g} GB" if memory_gb else ""
        head = (
            f"plans for a machine that is not here: {devices} devices{size}, each as fast as what was measured here "
            f"({found.device.type}), {COPY / 1e9:.0f} GB/s to and from them"
        )
        if found.work.processes:
            head += f", and a core for each of {found.work.processes} simulator processes"
    best = plans[0].placement
    setting = f"--pipeline.env-groups {best.groups} --algorithm.staleness {best.staleness}"
    lines = [costs_table(found), "", head + ", best first", plans_table(plans, found.steps, devices is not None)]
    if devices is None:
        lines += ["", f"the first: embodied-rl train {config.recipe} {setting}"]
        if best.staleness:
            lines.append("(a staleness learns from older weights, which changes what is learned; env groups do not)")
    return "\n".join(lines)

"""A run without running it: its parts at real size, without weights and without a simulator, and what they cost."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from embodied_rl.algorithms.base import Algorithm, EpisodicAlgorithm, OfflineAlgorithm, OffPolicyAlgorithm
from embodied_rl.config import RunConfig
from embodied_rl.errors import UserError
from embodied_rl.policies.base import Inputs, Policy
from embodied_rl.registry import policies
from embodied_rl.simulators.libero.config import LiberoConfig
from embodied_rl.simulators.reset_schedule import RandomSchedule
from embodied_rl.specs import ActionSpec, ObservationSpec, connect
from embodied_rl.training import memory
from embodied_rl.training.recorded_specs import recorded

Row = tuple[str, str]


def dry_run(config: RunConfig) -> str:
    """What `config` will be, as a table of two columns. Raises the `UserError` that its start would, as far as neither
    the simulator nor the weights are needed to find it."""
    seen, told, source = specs(config.simulator)
    policy, inputs = memory.build_on_meta(config.policy, seen, told)
    conversions = connect(seen, told, policy.observation_spec, policy.action_spec).names
    rows: list[Row] = [
        ("simulator", f"{config.simulator.num_envs} environments of {_task(config.simulator)}; {source}"),
        ("conversions", ", ".join(conversions) or "none"),
        ("policy", f"predicts {policy.horizon} actions, executes {policy.chunk}; {_origin(config.policy)}"),
    ]
    learners = [each.build(policy, config.seed) for each in (config.imitation, config.algorithm) if each is not None]
    rows += parameters(policy, [each for learner in learners for each in trained(learner)])
    if config.algorithm is not None:
        rows += [*iteration(config, policy, learners[-1]), *costs(config, policy, inputs, learners[-1])]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def specs(simulator: Any) -> tuple[ObservationSpec, ActionSpec, str]:
    """What the simulator says of itself and how that is known: from the table, or from one environment started to
    ask."""
    found = recorded(simulator)
    if found is not None:
        return *found, "not started, specs as recorded"
    single = {f.name: 1 for f in fields(simulator) if f.name in ("num_envs", "workers")}
    with tempfile.TemporaryDirectory() as logs:
        config = replace(simulator, **single)
        with config.build(RandomSchedule(0, config.num_tasks), log_dir=Path(logs)) as started:
            return started.observation_spec, started.action_spec, "started for its specs"


def parameters(policy: Policy, learned: Iterable[Tensor]) -> Iterator[Row]:
    """How many, and how many of them are among the `learned`, by group."""
    ids = set(map(id, learned))
    for name, group in {"": list(policy.parameters()), **policy.parameter_groups()}.items():
        if group:
            total, moved = sum(each.numel() for each in group), sum(each.numel() for each in group if id(each) in ids)
            kinds = ", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in group}))
            yield f"  {name}" if name else "parameters", f"{total:,} ({kinds}), {moved:,} trained"


def trained(algorithm: Algorithm) -> list[Tensor]:
    """The parameters that its optimizers move."""
    optimizers = algorithm.optimizers().values()
    return [each for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]]


def iteration(config: RunConfig, policy: Policy, algorithm: Algorithm) -> Iterator[Row]:
    """How much is collected and learned in one iteration."""
    settings = algorithm_config(algorithm)
    if isinstance(algorithm, OfflineAlgorithm):
        yield "updates", f"{settings.steps:,} of {settings.batch_size:,} recorded decisions"
        return
    rows = decisions(config, policy, algorithm)
    if isinstance(algorithm, EpisodicAlgorithm):
        collected = f"{algorithm.groups_per_iteration} groups of {algorithm.group_size} episodes, at most {rows:,}"
    else:
        collected = f"{config.simulator.num_envs} x {config.training.decisions_per_iteration} = {rows:,}"
    steps, budget = rows * policy.chunk, config.training.env_steps
    yield "iteration", f"{collected} decisions, {steps:,} steps; {-(-budget // steps):,} or more for {budget:,} steps"
    if isinstance(algorithm, OffPolicyAlgorithm):
        yield "updates", f"{rows * settings.updates_per_decision:,.0f} of {settings.batch_size:,} decisions"
    else:
        count = min(settings.minibatches, rows)
        yield "updates", f"{settings.epochs} epochs of {count} minibatches of {-(-rows // count):,} decisions"


def decisions(config: RunConfig, policy: Policy, algorithm: Algorithm) -> int:
    """Of an iteration, at most. Raises `UserError` when they depend on a time limit that only the simulator knows."""
    if not isinstance(algorithm, EpisodicAlgorithm):
        return config.simulator.num_envs * config.training.decisions_per_iteration
    limit = config.simulator.max_steps or max(getattr(config.simulator, "limits", [0]))
    if not limit:
        raise UserError("how long an episode can be is not known before the simulator starts: set simulator.max_steps")
    return algorithm.groups_per_iteration * algorithm.group_size * -(-limit // policy.chunk)


def costs(config: RunConfig, policy: Policy, inputs: Inputs, algorithm: Algorithm) -> Iterator[Row]:
    """Memory of acting and of learning."""
    acting, learning = memory.weights(policy), memory.learning(trained(algorithm))
    critics = memory.size(each for module in algorithm.modules().values() for each in module.parameters())
    parts = {"weights": acting, "networks of the algorithm": critics, "gradients and Adam": learning}
    yield "to act", f"{gib(acting)} of weights"
    if not isinstance(algorithm, OffPolicyAlgorithm | OfflineAlgorithm):
        rows = decisions(config, policy, algorithm)
        settings = algorithm_config(algorithm)
        part = min(settings.microbatch or rows, -(-rows // min(settings.minibatches, rows)))
        kept, record = memory.activations(policy, inputs, part)
        yield "recorded", f"{gib(rows * record)} per iteration, {gib(record)} a decision"
        parts[f"activations of {part:,} decisions"] = kept
    listed = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    yield "to learn", f"{gib(sum(parts.values()))}: {listed}"


def algorithm_config(algorithm: Any) -> Any:
    """Every algorithm keeps its own."""
    return algorithm.config


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"


def _task(simulator: Any) -> str:
    for name in ("task", "suite", "tasks"):
        if value := getattr(simulator, name, None):
            return value if isinstance(value, str) else ", ".join(map(str, value))
    return type(simulator).__name__


def _origin(policy: Any) -> str:
    if checkpoint := getattr(policy, "checkpoint", ""):
        return f"weights from {checkpoint}"
    return "to be trained with --policy.checkpoint FOLDER" if getattr(policy, "published", False) else "random weights"


PUBLISHED = ("openvla", "openvla_oft", "pi0", "pi05", "gr00t")
"""Policies whose default sizes are published ones."""
LORA_RANK = 32


def published() -> str:
    """A table of the memory that the published policies need, in LIBERO: to act, and to learn apart from activations,
    which are those of one decision with gradient checkpointing."""
    seen, told, _ = specs(LiberoConfig())
    lines = [["", "parameters", "act, bfloat16", f"LoRA {LORA_RANK}", "full, float32", "a decision"]]
    for name in PUBLISHED:
        config = replace(policies.load(name)(), frozen=(), gradient_checkpointing=True)
        small, _ = memory.build_on_meta(replace(config, dtype="bfloat16"), seen, told)
        adapted, _ = memory.build_on_meta(replace(config, dtype="bfloat16", lora_rank=LORA_RANK), seen, told)
        full, inputs = memory.build_on_meta(replace(config, dtype="float32"), seen, told)
        kept, _ = memory.activations(full, inputs, 8)
        count = sum(parameter.numel() for parameter in full.parameters())
        lines.append(
            [name, f"{count:,}", *map(gib, [memory.weights(small), *map(_to_learn, (adapted, full)), kept // 8])]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _to_learn(policy: Policy) -> int:
    return memory.weights(policy) + memory.learning(each for each in policy.parameters() if each.requires_grad)

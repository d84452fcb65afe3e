"""The typed configuration of a run: dataclasses in, overrides from the command line, JSON out and back.

A component (simulator, policy, algorithm) is configured by a frozen dataclass that lives next to it and is registered
by name in `embodied_rl.registry`. Annotations are the schema: keys, types and defaults are checked against them, and
the docstring below a field is its help text.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from embodied_rl.errors import UserError, unknown
from embodied_rl.registry import Registry, algorithms, policies, simulators


@dataclass(frozen=True)
class DemonstrationsConfig:
    """Demonstrations that the policy is cloned from before reinforcement learning starts."""

    episodes: int | None = 24
    """Number of demonstrations to collect, or to take from `path`; none takes all of them."""
    noise: float = 0.05
    """Standard deviation of the Gaussian noise added to the demonstrator's actions, in normalised action units."""
    path: str | None = None
    """Read this HDF5 file, or folder of a LeRobotDataset v3, instead of collecting."""


@dataclass(frozen=True)
class CoTrainingConfig:
    """A second dataset, say of the real robot, imitated beside the demonstrations and beside the rewards."""

    path: str = ""
    """HDF5 file, or folder of a LeRobotDataset v3, of demonstrations of the same task through the same controller."""
    episodes: int | None = None
    """Take this many of them; none takes all."""
    share: float = 0.5
    """Of every batch of chunks that is cloned before reinforcement learning; the rest are of `demonstrations`."""
    beta: float = 0.1
    """Weight of its imitation loss in every update of the actor by reinforcement learning; 0 leaves it out."""
    batch_size: int = 64
    """Its chunks in such an update."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(f"cotraining: share must be between 0 and 1, not {self.share}")
        if self.beta < 0 or self.batch_size < 1:
            raise UserError(f"cotraining: needs beta >= 0 and batch_size >= 1, not {self.beta} and {self.batch_size}")


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluations at the start and at the end, on seeds that are used for nothing else."""

    episodes: int = 100
    """Number of episodes, one fixed seed each."""
    deterministic: bool = True
    """Act without exploration noise."""


@dataclass(frozen=True)
class TrainingConfig:
    """The reinforcement-learning loop."""

    env_steps: int = 100_000
    """Budget of environment steps."""
    decisions_per_iteration: int = 16
    """Decisions of every environment per iteration: the length of an on-policy segment."""
    retry_failed: float = 0.0
    """Share of the training episodes that start again where an earlier one failed."""
    statistics_episodes: int = 0
    """Episodes of the untrained policy that its states are normalised by, where no demonstrations say by what."""
    evaluate_every: int = 0
    """Iterations between development evaluations; 0 evaluates only at the ends."""
    development_episodes: int = 50
    """Episodes of a development evaluation (other seeds than the final one)."""
    checkpoint_every: int = 20
    """Iterations between checkpoints."""
    stop_at_success: float | None = None
    """End the run early when a development evaluation reaches this success rate."""
    converged_clone_steps: int = 0
    """Gradient steps of the cloned policy that the result is compared with; 0 leaves it out."""


@dataclass(frozen=True)
class PipelineConfig:
    """How simulation, inference and learning share their time; what is learned does not depend on it."""

    env_groups: int = 1
    """Groups of environments: while the policy decides for one, the others are stepped. 2 pays when deciding and
    stepping take about as long. For algorithms that collect segments or episodes; others already learn meanwhile."""
    executor: Literal["local", "ray"] = "local"
    """Where environments are stepped: by this process and its simulators, or by rollout workers on a Ray cluster, each
    with a replica of the policy. For algorithms that collect segments or episodes."""
    rollout_workers: int = 1
    """Rollout workers on Ray; each gets its share of the environments and of the simulator's processes."""
    rollout_cpus: float = 1.0
    """Processors that Ray sets aside for a rollout worker and its simulators; less than 1 shares them."""
    rollout_gpus: float = 0.0
    """GPUs likewise, where its replica then is."""
    elastic: bool = False
    """Begin with as many rollout workers as fit into the cluster, and add some when it grows, up to `rollout_workers`;
    otherwise there must be room for all."""
    ray_address: str | None = None
    """Of a Ray cluster that is running; none starts a private one on this machine, which ends with the run."""
    learners: int = 1
    """Processes that every minibatch is split over, for ppo and grpo; 1 learns in the run's own."""
    learner_process: bool = False
    """Learn in a process of its own also where there is one learner: with a staleness, what collects meanwhile has the
    interpreter to itself, at the price of another copy of the policy."""
    sharding: Literal["none", "fsdp2"] = "none"
    """"none": each learner holds all weights and optimizer states; "fsdp2": its part of them."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products of learning; weights, optimizer states and sums of gradients keep theirs."""

    def __post_init__(self) -> None:
        if self.rollout_workers < 1 or self.rollout_cpus <= 0 or self.rollout_gpus < 0:
            raise UserError(
                f"pipeline: needs rollout_workers >= 1, rollout_cpus > 0 and rollout_gpus >= 0, not "
                f"{self.rollout_workers}, {self.rollout_cpus:g} and {self.rollout_gpus:g}"
            )
        if self.executor == "local" and (self.rollout_workers > 1 or self.elastic or self.ray_address is not None):
            raise UserError(
                "pipeline: rollout_workers, elastic and ray_address are of the executor ray: set executor, too"
            )
        if self.env_groups < 1 or self.learners < 1:
            raise UserError(
                f"pipeline: env_groups and learners must be at least 1, not {self.env_groups} and {self.learners}"
            )
        if self.sharding != "none" and self.learners == 1:
            raise UserError(f"pipeline: sharding {self.sharding} splits weights over learners: set learners, too")

    @property
    def learner_ranks(self) -> int:
        """Processes that learn in place of the run's own."""
        return self.learners if self.learners > 1 or self.learner_process else 0


@dataclass(frozen=True)
class LoggingConfig:
    """Where metrics go besides `metrics.jsonl`."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases (needs the `wandb` extra)."""
    trace: bool = False
    """Write trace.json: who does what when, for https://ui.perfetto.dev or chrome://tracing."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run does."""

    recipe: str
    """Name of the recipe that made this configuration."""
    simulator: Any
    """Registered simulator."""
    policy: Any
    """Registered policy."""
    algorithm: Any | None
    """Registered algorithm; none for a run that only clones."""
    imitation: Any | None = None
    """Registered algorithm that clones the demonstrations; none starts from the policy as built."""
    demonstrations: DemonstrationsConfig | None = None
    """Demonstrations to clone; none for a run without them."""
    cotraining: CoTrainingConfig | None = None
    """A second dataset to imitate; none for a run without one."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: int = 0
    """Seed of everything random in the run."""


COMPONENTS: dict[str, Registry] = {
    "simulator": simulators,
    "policy": policies,
    "algorithm": algorithms,
    "imitation": algorithms,
}
"""Which registry the component fields of `RunConfig` are looked up in."""

OPTIONAL = ("algorithm", "imitation")
"""The components that a run can do without."""

DATASETS = {"demonstrations": DemonstrationsConfig, "cotraining": CoTrainingConfig}
"""The parts of a configuration that a run can do without; giving one of their settings adds them."""


class Setting(NamedTuple):
    """One overridable field."""

    key: str
    """Dotted, e.g. "algorithm.learning_rate"."""
    value: Any
    """A component's value is its registered name."""
    type: str
    doc: str


def describe(config: RunConfig) -> list[Setting]:
    """All settings of `config`, flat, in the order of their definition."""
    return list(_settings(config, ""))


def spell(value: Any) -> str:
    """A setting's value as it is typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(spell, value))
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def override(config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """Apply `--dotted.key value` or `--dotted.key=value`; dashes and underscores are the same in keys.

    `--simulator NAME` (policy, algorithm, imitation) swaps the component for the registered one with its defaults;
    swaps come first, wherever they stand. A boolean without a value is true, `none` clears an optional field, a tuple
    is written 256,256. Raises `UserError` for an unknown key or a value of the wrong type.
    """
    pairs = list(_pairs(arguments))
    swaps = [(key, value) for key, value in pairs if key in COMPONENTS]
    for key, value in swaps + [pair for pair in pairs if pair[0] not in COMPONENTS]:
        config = _set(config, key, value)
    return config


def to_dict(config: RunConfig) -> dict[str, Any]:
    """JSON-ready; a component becomes {"name": its registered name, **its fields}."""
    plain = _plain(config)
    for key, registry in COMPONENTS.items():
        component = getattr(config, key)
        if component is not None:
            plain[key] = {"name": registry.name_of(type(component)), **plain[key]}
    return plain


def from_dict(values: Any) -> RunConfig:
    """The inverse of `to_dict`; raises `UserError` for unknown or missing keys and wrong types."""
    values = dict(_mapping(values, ""))
    for key, registry in COMPONENTS.items():
        if values.get(key) is not None:
            component = dict(_mapping(values[key], key))
            if not isinstance(component.get("name"), str):
                raise UserError(f"{_flag(key)}: 'name' of the {registry.kind} is missing")
            values[key] = _build(registry.load(component.pop("name")), component, key)
        elif key not in OPTIONAL or key not in values:
            raise UserError(f"the configuration has no {_flag(key)}")
    return _build(RunConfig, values, "")


def component_to_dict(component: Any) -> dict[str, Any]:
    """JSON-ready, for a process that knows no registered names."""
    kind = type(component)
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": _plain(component)}


def component_from_dict(values: dict[str, Any]) -> Any:
    """The inverse of `component_to_dict`; raises `UserError` for a class that cannot be imported."""
    module, _, name = values["class"].partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{values['class']} cannot be imported by other processes: {error}") from error
    return _build(kind, values["fields"], "")


def load(path: Path) -> RunConfig:
    """Read a configuration written as JSON; raises `UserError` when it cannot be read."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable configuration: {error}") from error
    return from_dict(values)


def _set(config: RunConfig, key: str, text: str | None) -> RunConfig:
    if key in COMPONENTS:
        if text is None:
            raise UserError(f"{_flag(key)} needs a name: {', '.join(COMPONENTS[key].names())}")
        off = key in OPTIONAL and text.lower() == "none"
        return replace(config, **{key: None if off else _default(COMPONENTS[key], text)})
    head, _, rest = key.partition(".")
    if rest and head in OPTIONAL and getattr(config, head) is None:
        raise UserError(f"{_flag(key)}: this run has no {head}; add {_flag(head)} NAME")
    if rest and head in DATASETS and getattr(config, head) is None:
        config = replace(config, **{head: DATASETS[head]()})
    if key in DATASETS and text and text.lower() == "none":
        return replace(config, **{key: None})
    known = {setting.key for setting in describe(config)} - DATASETS.keys()
    if key not in known:
        raise unknown("setting", _flag(key), {_flag(k) for k in known})
    return _assign(config, key.split("."), text, key)


def _assign(owner: Any, path: list[str], text: str | None, key: str) -> Any:
    name, *rest = path
    if rest:
        value = _assign(getattr(owner, name), rest, text, key)
    else:
        annotation = _hints(type(owner))[name]
        if text is None and not _accepts_bool(annotation):
            raise UserError(f"{_flag(key)} needs a value: {_type_name(annotation)}")
        value = _parse("true" if text is None else text, annotation, key)
    return _construct(lambda: replace(owner, **{name: value}), key)


def _default(registry: Registry, name: str) -> Any:
    cls = registry.load(name)
    required = [f.name for f in fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    if required:
        raise UserError(f"{registry.kind} '{name}' has no default for {', '.join(required)}: it needs a recipe")
    return cls()


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    waiting = list(arguments)
    while waiting:
        key, equals, value = waiting.pop(0).partition("=")
        if not key.startswith("--") or key == "--":
            raise UserError(f"unexpected argument '{key}': settings are given as --dotted.key value")
        if not equals and waiting and not waiting[0].startswith("--"):
            equals, value = "=", waiting.pop(0)
        yield key[2:].replace("-", "_"), value if equals else None


def _settings(owner: Any, prefix: str) -> Iterator[Setting]:
    docs, hints = field_docs(type(owner)), _hints(type(owner))
    for f in fields(owner):
        key, value = prefix + f.name, getattr(owner, f.name)
        if isinstance(owner, RunConfig) and f.name in COMPONENTS:
            name = None if value is None else COMPONENTS[f.name].name_of(type(value))
            yield Setting(key, name, " | ".join(COMPONENTS[f.name].names()), docs.get(f.name, ""))
        elif not is_dataclass(value) and not (isinstance(owner, RunConfig) and f.name == "recipe"):
            yield Setting(key, value, _type_name(hints[f.name]), docs.get(f.name, ""))
        if is_dataclass(value):
            yield from _settings(value, key + ".")


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring right below each field of a dataclass, on one line; inherited fields included."""
    docs: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if is_dataclass(base)]):
        try:
            body = typing.cast(ast.ClassDef, ast.parse(inspect.cleandoc(inspect.getsource(base))).body[0]).body
        except (OSError, SyntaxError):  # a class made at run time has no source, hence no documentation
            continue
        for statement, below in itertools.pairwise(body):
            match statement, below:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[name] = " ".join(doc.split())
    return docs


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _build(cls: type, values: Any, prefix: str) -> Any:
    """An instance of `cls` from a JSON object, every key present and known."""
    values, names = _mapping(values, prefix), [f.name for f in fields(cls)]
    dot = prefix + "." if prefix else ""
    for key in values:
        if key not in names:
            raise unknown("setting", _flag(dot + str(key)), [_flag(dot + name) for name in names])
    for name in names:
        if name not in values:
            raise UserError(f"the configuration has no {_flag(dot + name)}")
    hints = _hints(cls)
    built = {name: _check(values[name], hints[name], dot + name) for name in names}
    return _construct(lambda: cls(**built), prefix)


def _construct(make: Callable[[], Any], key: str) -> Any:
    try:
        return make()
    except ValueError as error:  # a component's own __post_init__ check
        raise UserError(f"{_flag(key)}: {error}") from error


def _mapping(values: Any, key: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{_flag(key) if key else 'the configuration'} must be an object, not {values!r}")
    return values


def _check(value: Any, annotation: Any, key: str) -> Any:
    """`value`, as read from JSON, in the type of `annotation`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if annotation is float and type(value) in (int, float) and not math.isnan(value):
        return float(value)
    if annotation in (int, bool, str, types.NoneType) and type(value) is annotation:
        return value
    if is_dataclass(annotation) and isinstance(value, dict):
        return _build(typing.cast(type, annotation), value, key)
    if origin is Literal and any(value == option and type(value) is type(option) for option in args):
        return value
    if origin in (typing.Union, types.UnionType):
        for option in args:
            if not is_dataclass(option) or value is None:
                try:
                    return _check(value, option, key)
                except UserError:
                    continue
            elif isinstance(value, dict):
                return _check(value, option, key)
    if origin is tuple and isinstance(value, list | tuple):
        items = args[:1] * len(value) if args[1:] == (...,) else args
        if len(items) == len(value):
            return tuple(_check(v, item, key) for v, item in zip(value, items, strict=True))
    if origin is dict and isinstance(value, dict):
        return {k: _check(v, args[1], key) for k, v in value.items()}
    raise UserError(f"{_flag(key)} expects {_type_name(annotation)}, not {value!r}")


def _parse(text: str, annotation: Any, key: str) -> Any:
    """`text`, as typed on the command line, in the type of `annotation`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    wrong = UserError(f"{_flag(key)} expects {_type_name(annotation)}, not {text!r}")
    try:
        if annotation is types.NoneType and text.lower() in ("none", "null"):
            return None
        if annotation is bool:
            return {"true": True, "false": False}[text.lower()]
        if annotation in (int, float):
            return _check(annotation(text), annotation, key)
        if annotation is str:
            return text
        if origin is Literal:
            return next(option for option in args if str(option).lower() == text.lower())
        if origin is tuple:
            parts = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
            items = args[:1] * len(parts) if args[1:] == (...,) else args
            return tuple(_parse(part, item, key) for part, item in zip(parts, items, strict=True))
        if origin is dict or annotation is Any:
            return _check(json.loads(text), annotation, key)
    except (ValueError, KeyError, StopIteration, UserError):
        raise wrong from None
    if origin in (typing.Union, types.UnionType):
        for option in sorted(args, key=lambda option: (option is not types.NoneType, option is str)):
            try:
                return _parse(text, option, key)
            except UserError:
                continue
    raise wrong


def _accepts_bool(annotation: Any) -> bool:
    return annotation is bool or bool in typing.get_args(annotation)


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is bool:
        return "true | false"
    if annotation is types.NoneType:
        return "none"
    if origin is Literal:
        return " | ".join(str(option) for option in args)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(option) for option in args)
    if origin is tuple:
        return ",".join("..." if item is ... else _type_name(item) for item in args)
    return getattr(annotation, "__name__", str(annotation))


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")

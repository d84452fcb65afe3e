import json
import shlex
import types
import typing
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rl import registry
from embodied_rl.config import (
    DemonstrationsConfig,
    EvaluationConfig,
    LoggingConfig,
    RunConfig,
    TrainingConfig,
    describe,
    from_dict,
    load,
    override,
    spell,
    to_dict,
)
from embodied_rl.errors import UserError


@dataclass(frozen=True)
class Critic:
    width: int = 64
    dropout: float = 0.0


@dataclass(frozen=True)
class ToySimulator:
    task: str = "Reach"
    """Which task."""
    num_envs: int = 4
    """How many environments
    run at once."""
    backend: Literal["cpu", "gpu"] = "cpu"
    image: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.num_envs < 1:
            raise ValueError("num_envs must be at least 1")


@dataclass(frozen=True)
class OtherSimulator:
    substeps: int = 5


@dataclass(frozen=True)
class ToyPolicy:
    hidden: tuple[int, ...] = (256, 256)
    noise: float | Literal["learned"] = 0.1


@dataclass(frozen=True)
class ToyAlgorithm:
    learning_rate: float = 3e-4
    normalise: bool = True
    critic: Critic = Critic()
    weights: dict[str, float] | None = None
    label: str | None = None


TOYS = {
    registry.simulators: {"toy_sim": ToySimulator, "other_sim": OtherSimulator},
    registry.policies: {"toy_policy": ToyPolicy},
    registry.algorithms: {"toy_algorithm": ToyAlgorithm},
}
for _registry, _components in TOYS.items():
    for _name, _component in _components.items():
        _registry.register(_name, f"{__name__}:{_component.__qualname__}")


def toy(**changes: Any) -> RunConfig:
    return replace(RunConfig("toy", ToySimulator(), ToyPolicy(), ToyAlgorithm()), **changes)


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Everything that a field annotated so may hold."""
    args = typing.get_args(annotation)
    match typing.get_origin(annotation):
        case typing.Literal:
            return st.sampled_from(args)
        case types.UnionType | typing.Union:
            return st.one_of(*map(values, args))
        case builtin if builtin is tuple:
            return st.lists(values(args[0]), max_size=4).map(tuple) if args[1] is ... else st.tuples(*map(values, args))
        case builtin if builtin is dict:
            return st.dictionaries(st.text(max_size=5), values(args[1]), max_size=3)
    if annotation is float:
        return st.floats(allow_nan=False)
    if annotation is int:
        return st.integers(1, 10**9)
    plain = {bool: st.booleans(), str: st.text(max_size=8), types.NoneType: st.none()}
    return plain[annotation] if annotation in plain else instances(annotation)


def instances(cls: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{f.name: values(hints[f.name]) for f in fields(cls)})


runs = st.builds(
    RunConfig,
    recipe=st.text(max_size=8),
    simulator=instances(ToySimulator) | instances(OtherSimulator),
    policy=instances(ToyPolicy),
    algorithm=st.none() | instances(ToyAlgorithm),
    imitation=st.none() | instances(ToyAlgorithm),
    demonstrations=st.none() | instances(DemonstrationsConfig),
    training=instances(TrainingConfig),
    evaluation=instances(EvaluationConfig),
    logging=instances(LoggingConfig),
    seed=st.integers(0, 2**31),
)


@settings(deadline=None, max_examples=40)
@given(runs)
def test_json_round_trip(config: RunConfig) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@settings(deadline=None, max_examples=40)
@given(runs)
def test_every_setting_can_be_typed_back(config: RunConfig) -> None:
    base = toy(simulator=type(config.simulator)(), imitation=config.imitation and ToyAlgorithm())
    base = replace(base, algorithm=config.algorithm and ToyAlgorithm())
    base = replace(base, demonstrations=config.demonstrations and DemonstrationsConfig(), recipe=config.recipe)
    arguments = []
    for key, value, *_ in describe(config):
        if isinstance(value, str) and value.lower() in ("none", "null"):
            continue  # an optional text spelled "none" cannot be typed: it means None
        arguments.append(f"--{key.replace('_', '-')}={spell(value)}")
    assert override(base, arguments) == config


def test_override_types() -> None:
    config = override(
        toy(),
        shlex.split(
            "--algorithm.learning-rate 1e-4 --simulator.num_envs=8 --simulator.backend gpu --policy.hidden 32,64,32 "
            "--policy.noise learned --algorithm.critic.width 128 --logging.wandb --evaluation.deterministic false "
            "--training.stop-at-success .9 --simulator.image 64,48 --seed 7 --demonstrations.episodes 3 "
            """--algorithm.weights='{"flow":2}'"""
        ),
    )
    assert config.algorithm == ToyAlgorithm(1e-4, critic=Critic(width=128), weights={"flow": 2.0})
    assert config.simulator == ToySimulator(num_envs=8, backend="gpu", image=(64, 48))
    assert config.policy == ToyPolicy((32, 64, 32), "learned")
    assert config.logging == LoggingConfig(wandb=True)
    assert config.evaluation == EvaluationConfig(deterministic=False)
    assert config.training == TrainingConfig(stop_at_success=0.9)
    assert config.demonstrations == DemonstrationsConfig(episodes=3)
    assert config.seed == 7
    assert override(config, ["--simulator.image", "none"]).simulator.image is None


def test_component_swap_comes_first_and_takes_defaults() -> None:
    config = override(toy(), ["--simulator.substeps", "9", "--simulator", "other_sim"])
    assert config.simulator == OtherSimulator(substeps=9)
    with_clone = override(toy(), ["--imitation=toy_algorithm", "--imitation.learning-rate=1"])
    assert with_clone.imitation == ToyAlgorithm(learning_rate=1.0)
    assert override(with_clone, ["--imitation", "none", "--algorithm=none"]) == toy(algorithm=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithm.learnin-rate", "1"], "did you mean --algorithm.learning-rate"),
        (["--learning_rate", "1"], "--algorithm.learning-rate"),
        (["--simulator.num-envs", "many"], "--simulator.num-envs expects int, not 'many'"),
        (["--simulator.num-envs", "2.5"], "expects int, not '2.5'"),
        (["--simulator.num-envs"], "--simulator.num-envs needs a value: int"),
        (["--simulator.num-envs", "0"], "num_envs must be at least 1"),
        (["--algorithm.learning-rate", "nan"], "expects float"),
        (["--algorithm.normalise", "yes"], "expects true | false, not 'yes'"),
        (["--simulator.backend", "tpu"], "expects cpu | gpu, not 'tpu'"),
        (["--simulator.image", "64,64,3"], "expects int,int | none"),
        (["--policy.hidden", "12,wide"], "expects int,..., not '12,wide'"),
        (["--simulator", "toy_sin"], "unknown simulator 'toy_sin': did you mean toy_sim"),
        (["--simulator"], "needs a name"),
        (["--imitation.learning-rate", "1"], "add --imitation NAME"),
        (["--training", "3"], "unknown setting '--training'"),
        (["--demonstrations", "3"], "unknown setting '--demonstrations'"),
        (["--recipe", "other"], "unknown setting '--recipe'"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_override_errors_name_the_remedy(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        override(toy(), arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("algorithm", "gamma"), 0.9, "unknown setting '--algorithm.gamma'"),
        (("budget",), 1, "unknown setting '--budget'"),
        (("simulator", "name"), "toy_sin", "did you mean toy_sim"),
        (("simulator", "num_envs"), True, "--simulator.num-envs expects int, not True"),
        (("simulator", "num_envs"), 2.0, "--simulator.num-envs expects int"),
        (("simulator", "num_envs"), 0, "num_envs must be at least 1"),
        (("simulator",), None, "no --simulator"),
        (("simulator",), "toy_sim", "--simulator must be an object"),
        (("algorithm", "critic", "width"), "wide", "--algorithm.critic.width expects int"),
        (("training",), [], "--training expects"),
        (("demonstrations",), {"episodes": 3}, "no --demonstrations.noise"),
    ],
)
def test_from_dict_is_strict(path: tuple[str, ...], value: Any, message: str) -> None:
    plain = to_dict(toy())
    *parents, last = path
    owner = plain
    for parent in parents:
        owner = owner[parent]
    owner[last] = value
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        from_dict(plain)


@pytest.mark.parametrize(
    "path", [("seed",), ("policy",), ("imitation",), ("policy", "hidden"), ("policy", "name"), ("logging",)]
)
def test_from_dict_misses_nothing(path: tuple[str, ...]) -> None:
    plain = to_dict(toy())
    owner = plain
    for parent in path[:-1]:
        owner = owner[parent]
    del owner[path[-1]]
    with pytest.raises(UserError):
        from_dict(plain)


def test_load_refuses_what_is_not_a_configuration(tmp_path) -> None:
    with pytest.raises(UserError, match="not a readable configuration"):
        load(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="not a readable configuration"):
        load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(toy())))
    assert load(tmp_path / "config.json") == toy()


def test_describe_documents_fields() -> None:
    settings = {setting.key: setting for setting in describe(toy())}
    assert settings["simulator"].value == "toy_sim"
    assert settings["simulator.num_envs"][1:] == (4, "int", "How many environments run at once.")
    assert settings["training.env_steps"].value == 100_000
    assert settings["algorithm.critic.width"].value == 64
    assert settings["evaluation.deterministic"].type == "true | false"
    assert "recipe" not in settings

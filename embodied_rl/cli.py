"""The command line: `embodied-rl train | evaluate | collect | plan | scale | report | doctor | list | install`.

Everything heavy is imported by the command that needs it, so that help and `list` answer at once.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from embodied_rl import registry
from embodied_rl.errors import LearnerDied, SimulatorDied, UserError, unknown

SETTINGS = """settings:
  Any field of the configuration can be given as --dotted.key value, for example --algorithm.learning-rate 1e-4,
  --simulator.num-envs 8, --policy.hidden 256,256 or --logging.tensorboard false. --simulator NAME (--policy,
  --algorithm, --imitation) exchanges a component. `embodied-rl train RECIPE --settings` shows all of them.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 2 for what the user can fix, 130 for Ctrl-C."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (SimulatorDied, LearnerDied) as error:  # carries what the process printed, more than our traceback
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    parser, commands = _parsers()
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise unknown("command", argv[0], commands)
    settings: list[str] = []
    if argv and argv[0] in ("train", "evaluate", "collect", "plan"):
        argv, settings = _split(argv, commands[argv[0]])
    arguments = parser.parse_args(argv)
    if "function" not in arguments:
        parser.print_help()
        return 0
    arguments.settings_given = settings
    arguments.function(arguments)
    return 0


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    description = "Improve vision-language-action policies with reinforcement learning in robot simulators."
    parser = _Parser(prog="embodied-rl", description=description, allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    sub = parser.add_subparsers(metavar="COMMAND")
    commands: dict[str, argparse.ArgumentParser] = {}

    def command(name: str, function: Callable[[Any], None], text: str, **more: Any) -> argparse.ArgumentParser:
        commands[name] = sub.add_parser(name, help=text, description=text, allow_abbrev=False, **more)
        commands[name].set_defaults(function=function)
        return commands[name]

    shown: dict[str, Any] = {"epilog": SETTINGS, "formatter_class": argparse.RawDescriptionHelpFormatter}
    train = command("train", _train, "Run a recipe and write a run folder with its report.", **shown)
    train.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="default: quickstart; see `embodied-rl list recipes`"
    )
    train.add_argument("--seed", type=int, help="seed of everything random in the run")
    train.add_argument("--out", type=Path, metavar="DIR", help="run folder; default: runs/RECIPE-seedS-TIME")
    train.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR from its last checkpoint")
    train.add_argument(
        "--placement", choices=("auto",), help="auto: measure the stages first, and take the best plan for this machine"
    )
    train.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    train.add_argument("--dry-run", action="store_true", help="show sizes, memory and amounts of the run, and exit")
    train.add_argument("--settings", action="store_true", help="show all settings with their values, and exit")

    evaluate = command("evaluate", _evaluate, "Evaluate the trained policy of a run.", **shown)
    evaluate.add_argument("run", type=Path, metavar="RUN_DIR")
    evaluate.add_argument("--episodes", type=_positive, help="default: as configured")
    evaluate.add_argument("--seed", type=int, default=0, help="0 (default): the run's own test episodes; else others")
    evaluate.add_argument("--stochastic", action="store_true", help="act with exploration noise")
    evaluate.add_argument(
        "--without", choices=("images", "instruction"), help="black images, or the next task's instruction"
    )

    collect = command("collect", _collect, "Write scripted demonstrations to an HDF5 file.", **shown)
    collect.add_argument("recipe", nargs="?", metavar="RECIPE", help="whose task; default: quickstart")
    collect.add_argument("--out", type=Path, required=True, metavar="FILE", help="ends in .h5")
    collect.add_argument("--episodes", type=_positive, required=True)
    collect.add_argument("--seed", type=int, help="seed of the episodes and of the noise")

    plan = command("plan", _plan, "Measure the stages of a recipe and rank the ways to run it.", **shown)
    plan.add_argument("recipe", metavar="RECIPE", help="of an algorithm that collects, then learns: ppo, grpo...")
    plan.add_argument("--seed", type=int, help="seed of everything random in the measurement")
    plan.add_argument("--devices", type=_positive, metavar="N", help="plan for N devices that are not here")
    plan.add_argument("--memory", type=_positive, metavar="GB", help="of each of them; default: enough")

    scale = command("scale", _scale, "Give a run that trains another number of processes.")
    scale.add_argument("run", type=Path, metavar="RUN_DIR")
    scale.add_argument("--rollout-workers", type=_positive, metavar="N", help="on Ray; default: as they are")
    scale.add_argument("--learners", type=_positive, metavar="N", help="processes that learn; default: as they are")
    scale.add_argument("--wait", type=_positive, metavar="SECONDS", default=60, help="for what comes of it; default 60")

    report = command("report", _report, "Write report.html of a run again.")
    report.add_argument("run", type=Path, metavar="RUN_DIR")

    command("doctor", _doctor, "Say what this machine can run, and how to fix the rest.")

    install = command("install", _install, "Make the Python environment of a simulator that cannot share this one.")
    install.add_argument("project", metavar="NAME", help="one of ours, e.g. isaaclab, or a folder with uv.lock")

    listing = command("list", _list, "List what is registered.")
    listing.add_argument("kind", nargs="?", metavar="|".join(KINDS), help="default: all")
    listing.add_argument("--tasks", action="store_true", help="also the tasks of every simulator")
    listing.add_argument("--memory", action="store_true", help="also what the published policies need to act and learn")
    return parser, commands


class _Version(argparse.Action):
    def __call__(self, *_: Any) -> None:
        from importlib.metadata import version

        print(f"embodied-rl {version('embodied-rl')}")
        sys.exit(0)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expects a positive int, not '{text}'")
    return int(text)


def _split(argv: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """`argv` without the settings, and the settings: every option that `parser` does not know, with its value."""
    own: list[str] = []
    settings: list[str] = []
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        known = word.partition("=")[0] in parser._option_string_actions
        (own if known or not word.startswith("--") else settings).append(word)
        if not known and word.startswith("--") and "=" not in word and waiting and not waiting[0].startswith("--"):
            settings.append(waiting.pop(0))
    return own, settings


def _config(arguments: Any) -> Any:
    """The recipe's configuration with the settings of the command line."""
    from embodied_rl.config import RunConfig, override

    config = registry.recipes.load(arguments.recipe or "quickstart")()
    if not isinstance(config, RunConfig):
        raise UserError(f"recipe '{arguments.recipe}' returned {type(config).__name__}, not a RunConfig")
    return override(config, _settings(arguments))


def _settings(arguments: Any) -> list[str]:
    settings = list(arguments.settings_given)
    if arguments.seed is not None:
        settings.append(f"--seed={arguments.seed}")
    return settings + ["--logging.wandb=true"] * getattr(arguments, "wandb", False)


def _train(arguments: Any) -> None:
    if arguments.resume:
        if arguments.recipe or arguments.out:
            raise UserError("--resume takes recipe and folder from the run: leave out RECIPE and --out")
        from embodied_rl.config import load, override

        out, config = arguments.resume, override(load(arguments.resume / "config.json"), _settings(arguments))
    else:
        config = _config(arguments)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        out = arguments.out or Path("runs") / f"{config.recipe}-seed{config.seed}-{stamp}"
    if arguments.settings:
        return _show(config)
    if arguments.dry_run:
        from embodied_rl.training.dry_run import dry_run

        return print(dry_run(config))
    _require_weights(config.policy)
    if not arguments.resume:
        _check_fresh(out)
    more = {}
    if arguments.placement:
        from embodied_rl.planner.plan import choose

        config, more["prediction"], why = choose(config)
        print(why, flush=True)
    from embodied_rl.training.run import train

    try:
        result = train(config, out, resume=bool(arguments.resume), **more)
    except KeyboardInterrupt:
        print(f"\ngo on with: embodied-rl train --resume {out}", file=sys.stderr)
        raise
    for evaluation in result["evaluations"]:
        print(_sentence(evaluation))
    print(f"report: {out / 'report.html'}")


def _require_weights(policy: Any) -> None:
    if getattr(policy, "published", False) and not policy.checkpoint:
        name = registry.policies.name_of(type(policy))
        raise UserError(
            f"{name} has random weights, and at its published size reinforcement learning starts from trained ones: "
            f"give --policy.checkpoint FOLDER, or --dry-run to see what the run would cost"
        )


def _check_fresh(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give another --out")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: give another --out, or go on with it by --resume {out}")


def _show(config: Any) -> None:
    from embodied_rl.config import describe, spell

    for key, value, kind, doc in describe(config):
        print(f"--{key.replace('_', '-')} {spell(value)}  ({kind})" + (f"\n    {doc}" if doc else ""))


def _evaluate(arguments: Any) -> None:
    if not (arguments.run / "config.json").is_file():
        raise UserError(f"{arguments.run} is not a run folder: it has no config.json")
    from embodied_rl.config import load

    configured = load(arguments.run / "config.json").evaluation
    from embodied_rl.training.evaluation import evaluate_run

    episodes = arguments.episodes or configured.episodes
    deterministic = configured.deterministic and not arguments.stochastic
    settings = arguments.settings_given
    result = evaluate_run(arguments.run, episodes, arguments.seed, deterministic, arguments.without, settings)
    print(_sentence(result))


def _sentence(evaluation: dict[str, Any]) -> str:
    name, n = evaluation["name"].replace("_", " "), evaluation["episodes"]
    rest = f"return {evaluation['mean_return']:.2f}, length {evaluation['mean_length']:.1f}"
    if evaluation["success"] is None:
        return f"{name}: {n} episodes, {rest}"
    interval = f"95 % interval {evaluation['low']:.1%} to {evaluation['high']:.1%}"
    return f"{name}: success {evaluation['success']:.1%} ({evaluation['successes']} of {n}, {interval}), {rest}"


def _collect(arguments: Any) -> None:
    if arguments.out.suffix != ".h5":
        raise UserError(f"--out is the file to write and ends in .h5, not {arguments.out}")
    config = _config(arguments)
    from embodied_rl.training.demonstrations import collect

    written = collect(config, arguments.out, arguments.episodes)
    print(f"{written['path']}: {written['episodes']} episodes, {written['steps']} steps")


def _plan(arguments: Any) -> None:
    if arguments.memory and not arguments.devices:
        raise UserError("--memory is that of devices which are not here: add --devices N")
    config = _config(arguments)
    from embodied_rl.planner.plan import plan

    print(plan(config, arguments.devices, arguments.memory))


def _scale(arguments: Any) -> None:
    from embodied_rl.training.scale_request import ask

    request = ask(arguments.run, arguments.rollout_workers, arguments.learners)
    print(request.wait(arguments.wait) or f"no answer yet: it will be in {request.path.with_suffix('.txt')}")


def _report(arguments: Any) -> None:
    from embodied_rl.training.report import write_report

    print(write_report(arguments.run))


def _doctor(_: Any) -> None:
    from embodied_rl import doctor

    doctor.main()


def _install(arguments: Any) -> None:
    from embodied_rl.simulators import interpreters

    print(f"{arguments.project}: {interpreters.install(arguments.project)}")


KINDS = {
    "simulators": registry.simulators,
    "policies": registry.policies,
    "algorithms": registry.algorithms,
    "recipes": registry.recipes,
}


def _list(arguments: Any) -> None:
    if arguments.kind is not None and arguments.kind not in KINDS:
        raise unknown("kind", arguments.kind, KINDS)
    for kind in [arguments.kind] if arguments.kind else KINDS:
        names = KINDS[kind].names()
        print(f"{kind}:")
        width = max(map(len, names), default=0)
        for name in names:
            print(f"  {name:{width}}  {_summary(KINDS[kind].target(name))}".rstrip())
            if kind == "simulators" and arguments.tasks:
                _show_tasks(name)
        if kind == "policies" and arguments.memory:
            from embodied_rl.training.dry_run import published

            print(published())


def _show_tasks(simulator: str) -> None:
    for task in registry.tasks(simulator):
        cameras = "cameras ?" if task.cameras is None else f"cameras {', '.join(task.cameras) or 'none'}"
        facts = [
            f"action {_known(task.action_dim)}",
            cameras,
            f"{_known(task.max_steps)} steps",
            f"reward {task.reward}",
        ]
        print(f"    {task.name}: {task.instruction} | {' | '.join(facts)}")
        if task.missing:
            print(f"        missing: {task.missing}")


def _known(value: int | None) -> str:
    return "?" if value is None else str(value)


def _summary(target: str) -> str:
    """The first line of the docstring of "module:object", read from the source without importing it."""
    module, _, attribute = target.partition(":")
    if module in sys.modules:  # perhaps the running script, which cannot be found by its name, __main__
        path = Path(getattr(sys.modules[module], "__file__", None) or "")
    else:
        top, *rest = module.split(".")
        spec = importlib.util.find_spec(top)
        if spec is None:
            return "(not installed)"
        folder = spec.submodule_search_locations
        path = Path(folder[0]).joinpath(*rest) if folder else Path(spec.origin or "").with_suffix("")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        return ""
    return _summaries(path).get(attribute, "")


@functools.cache
def _summaries(path: Path) -> dict[str, str]:
    """First lines of the docstrings of a source file's classes and functions, by name."""
    return {
        node.name: (ast.get_docstring(node) or "").partition("\n")[0]
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }


if __name__ == "__main__":
    sys.exit(main())

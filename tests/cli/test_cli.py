import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from embodied_rl import registry
from embodied_rl.cli import main
from embodied_rl.config import RunConfig, to_dict
from embodied_rl.errors import SimulatorDied

EVALUATION = {
    "name": "final",
    "episodes": 100,
    "successes": 93,
    "success": 0.93,
    "low": 0.863,
    "high": 0.966,
    "mean_return": 12.3,
    "mean_length": 31.0,
}


def toy() -> RunConfig:
    """A recipe of the built-in components with their defaults."""
    return RunConfig(
        "cli_toy",
        registry.simulators.load("maniskill")(),
        registry.policies.load("gaussian_mlp")(),
        registry.algorithms.load("ppo")(),
    )


def not_a_recipe() -> str:
    return "hello"


for _recipe in (toy, not_a_recipe):
    registry.recipes.register(f"cli_{_recipe.__name__}", f"{__name__}:{_recipe.__qualname__}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The pipeline replaced by functions that note what they were called with."""
    made: list[tuple[Any, ...]] = []

    def fake(module: str, name: str, result: Any) -> None:
        def call(*arguments: Any, **more: Any) -> Any:
            made.append((*arguments, *more.values()))
            return result

        stand_in = types.ModuleType(module)
        setattr(stand_in, name, call)
        monkeypatch.setitem(sys.modules, f"embodied_rl.training.{module}", stand_in)

    fake("run", "train", {"evaluations": [EVALUATION]})
    fake("evaluation", "evaluate_run", {**EVALUATION, "success": None})
    fake("demonstrations", "collect", {"path": "demos.h5", "episodes": 3, "steps": 60})
    return made


def test_train_hands_over_the_configuration(calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--algorithm.learning-rate 1e-5 cli_toy --seed 7 --simulator.num-envs=8 --wandb --logging.tensorboard"
    assert main(["train", *arguments.split(), "false", "--out", str(tmp_path / "run")]) == 0
    ((config, out, resume),) = calls
    assert (out, resume) == (tmp_path / "run", False)
    assert (config.algorithm.learning_rate, config.simulator.num_envs, config.seed) == (1e-5, 8, 7)
    assert (config.logging.wandb, config.logging.tensorboard) == (True, False)
    printed = capsys.readouterr().out
    assert "final: success 93.0% (93 of 100, 95 % interval 86.3% to 96.6%), return 12.30, length 31.0" in printed
    assert f"report: {tmp_path / 'run' / 'report.html'}" in printed


def test_default_run_folder_names_recipe_and_seed(calls) -> None:
    assert main(["train", "cli_toy", "--seed=3"]) == 0
    assert calls[0][1].parent == Path("runs")
    assert calls[0][1].name.startswith("cli_toy-seed3-2")


def test_resume_reads_the_configuration_of_the_run(calls, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_dict(toy())))
    assert main(["train", "--resume", str(tmp_path), "--training.env-steps", "5"]) == 0
    config, out, resume = calls[0]
    assert (config.recipe, config.training.env_steps, out, resume) == ("cli_toy", 5, tmp_path, True)


def test_evaluate_collect(calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_dict(toy())))
    assert main(["evaluate", str(tmp_path), "--episodes", "9", "--seed", "4", "--stochastic"]) == 0
    assert calls.pop() == (tmp_path, 9, 4, False, None, [])
    assert main(["evaluate", str(tmp_path), "--without", "images", "--simulator.num-envs", "2"]) == 0
    assert calls.pop() == (tmp_path, 100, 0, True, "images", ["--simulator.num-envs", "2"])
    assert main(["collect", "cli_toy", "--out", "demos.h5", "--episodes", "3", "--simulator.num-envs", "2"]) == 0
    config, path, episodes = calls.pop()
    assert (config.simulator.num_envs, path, episodes) == (2, Path("demos.h5"), 3)
    printed = capsys.readouterr().out
    assert "final: 100 episodes, return 12.30" in printed and "demos.h5: 3 episodes, 60 steps" in printed


def test_settings_are_shown_with_their_help(calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "cli_toy", "--settings", "--training.env-steps", "12"]) == 0
    printed = capsys.readouterr().out
    assert "--training.env-steps 12  (int)\n    Budget of environment steps." in printed
    assert "--evaluation.deterministic true  (true | false)" in printed
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "unknown command 'trian': did you mean train or plan?"),
        ("train cli_toi", "unknown recipe 'cli_toi': did you mean cli_toy"),
        ("train cli_not_a_recipe", "returned str, not a RunConfig"),
        ("train cli_toy --algorithm.learning-rte 1", "did you mean --algorithm.learning-rate"),
        ("train cli_toy --sed 1", "did you mean --seed"),
        ("train cli_toy --simulator.num-envs many", "--simulator.num-envs expects int, not 'many'"),
        ("train cli_toy --simulator mujocow", "unknown simulator 'mujocow'"),
        ("train cli_toy extra", "unrecognized arguments: extra; see embodied-rl --help"),
        ("train cli_toy --seed x", "--seed: invalid int value: 'x'"),
        ("train cli_toy --out {full}", "is not empty: give another --out, or go on with it by --resume"),
        ("train cli_toy --out {full}/file", "is a file"),
        ("train cli_toy --resume {full}", "leave out RECIPE and --out"),
        ("train --resume {full}", "config.json is not a readable configuration"),
        ("evaluate {full}", "is not a run folder"),
        ("evaluate {full} --episodes 0", "expects a positive int, not '0'"),
        ("evaluate", "RUN_DIR; see embodied-rl evaluate --help"),
        ("collect --episodes 3", "--out"),
        ("collect --episodes 3 --out demos.json", "ends in .h5"),
        ("report {full}", "run folder"),
        ("list robots", "unknown kind 'robots'"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(
    calls, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    (tmp_path / "file").write_text("")
    assert main(arguments.format(full=tmp_path).split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and calls == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_other_failures_keep_their_meaning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    def fail(error: BaseException):
        stand_in: Any = types.ModuleType("run")
        stand_in.train = lambda *_, **__: (_ for _ in ()).throw(error)
        monkeypatch.setitem(sys.modules, "embodied_rl.training.run", stand_in)
        return main(["train", "cli_toy", "--out", str(tmp_path / "run")])

    assert fail(SimulatorDied("worker 1 died 3 times:\nSegmentation fault")) == 1
    assert capsys.readouterr().err == "error: worker 1 died 3 times:\nSegmentation fault\n"
    assert fail(KeyboardInterrupt()) == 130
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


INTERRUPTED = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
run = types.ModuleType("run")
def train(*_, **__):
    print("training", flush=True)
    time.sleep(60)
run.train = train
sys.modules["embodied_rl.training.run"] = run
from embodied_rl.cli import main
sys.exit(main(["train", "--out", sys.argv[1]]))
"""


def test_ctrl_c_exits_130(tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == "training\n"
            os.kill(child.pid, signal.SIGINT)
            _, error = child.communicate(timeout=20)
        finally:
            child.kill()
    assert child.returncode == 130
    assert "Traceback" not in error and error.endswith("interrupted\n")


QUICK = """
import sys, time
began = time.process_time()
from embodied_rl.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
heavy = {"torch", "rich", "h5py", "mani_skill", "gymnasium"} & set(sys.modules)
assert not heavy, heavy
assert time.process_time() - began < 0.3, time.process_time() - began
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["list"], ["--version"], ["trian"]])
def test_answers_at_once_without_heavy_imports(arguments: list[str]) -> None:
    began = time.monotonic()
    child = subprocess.run([sys.executable, "-c", QUICK, *arguments], capture_output=True, text=True, timeout=30)
    assert child.returncode == 0, child.stderr
    assert time.monotonic() - began < 10


def test_list_shows_what_the_running_script_registers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text('class Mine:\n    """What mine does.\n\n    And more."""\n')
    script = types.ModuleType("__main__")  # has no __spec__, as a script that was started by its path
    script.__file__ = str(tmp_path / "mine.py")
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.setattr(registry.policies, "_targets", {"mine": "__main__:Mine", "absent": "__main__:Absent"})
    assert main(["list", "policies"]) == 0
    assert capsys.readouterr().out.splitlines() == ["policies:", "  absent", "  mine    What mine does."]


def test_list_names_and_describes_without_importing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for kind in ("simulators:", "policies:", "algorithms:", "recipes:"):
        assert kind in printed
    assert main(["list", "recipes"]) == 0
    printed = capsys.readouterr().out
    assert "quickstart" in printed and "PickCube-v1" in printed and "simulators:" not in printed


SIMULATOR = """
class Config:
    'Arms that reach.'

def tasks():
    from embodied_rl.simulators.base import Listing

    return [
        Listing("Reach", "reach the mark", ("wrist", "base"), 7, 50, "sparse"),
        Listing("Push", "push it", None, None, None, "dense", missing="the cube: run `get cube`"),
    ]
"""


def test_list_tasks_asks_the_simulators_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    (tmp_path / "some_simulator.py").write_text(SIMULATOR)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry.simulators, "_targets", {"some": "some_simulator:Config", "gone": "no_such:Config"})
    assert main(["list", "simulators"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["  gone  (not installed)", "  some  Arms that reach."]
    monkeypatch.delitem(registry.simulators._targets, "gone")
    assert main(["list", "simulators", "--tasks"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "    Reach: reach the mark | action 7 | cameras wrist, base | 50 steps | reward sparse",
        "    Push: push it | action ? | cameras ? | ? steps | reward dense",
        "        missing: the cube: run `get cube`",
    ]

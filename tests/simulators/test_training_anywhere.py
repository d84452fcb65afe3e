"""One command trains on any simulator, whichever Python it lives in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embodied_rl import registry
from embodied_rl.cli import main

SETTINGS = {
    "gymnasium": ["--simulator.task", "FetchReachDense-v4"],
    "libero": ["--simulator.tasks", "0,2", "--simulator.observation", "rgb", "--simulator.image-size", "64"],
    "maniskill": ["--simulator.task", "StackCube-v1", "--simulator.reward", "dense"],
    "metaworld": ["--simulator.tasks", "reach-v3,drawer-close-v3"],
    "isaaclab": ["--simulator.task", "Isaac-Cartpole-Direct"],
    "mjlab": ["--simulator.task", "Mjlab-Cartpole-Balance"],
}
OWN_PYTHON = ("isaaclab", "mjlab")
TINY = {
    "simulator.num-envs": "4",
    "simulator.max-steps": "6",
    "training.env-steps": "48",
    "training.decisions-per-iteration": "6",
    "evaluation.episodes": "4",
    "policy.chunk": "2",
    "policy.hidden": "16",
    "logging.tensorboard": "false",
}


def test_every_simulator_is_here() -> None:
    targets = {name: registry.simulators.target(name) for name in registry.simulators.names()}
    assert SETTINGS.keys() == {name for name, target in targets.items() if target.startswith("embodied_rl.")}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in OWN_PYTHON else name for name in SETTINGS]
)
def test_one_command_trains_on(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny = [word for key, value in TINY.items() for word in (f"--{key}", value)]
    arguments = ["train", "ppo", "--simulator", name, *SETTINGS[name], *tiny, "--out", str(tmp_path / "run")]
    assert main(arguments) == 0, capfd.readouterr().err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["env_steps"] >= 48 and result["deaths"] == 0 and result["iterations"] >= 1
    assert [each["name"] for each in result["evaluations"]] == ["initial", "final"]
    assert all(each["episodes"] == 4 for each in result["evaluations"])

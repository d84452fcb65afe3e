"""A third-party package adds a simulator, a policy, an algorithm and a recipe without touching this repository."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

Python = Callable[..., str]

NAMES = """
import json, sys
from embodied_rl import registry
kinds = {"simulators": "line", "policies": "linear", "algorithms": "reinforce", "recipes": "line"}
targets = {kind: getattr(registry, kind).target(name) for kind, name in kinds.items()}
assert all(name in getattr(registry, kind).names() for kind, name in kinds.items())
print(json.dumps([targets, [name for name in sys.modules if name.startswith(("toy_robotics", "torch"))]]))
"""


def test_its_names_are_listed_without_importing_it(plugin: Path, site: Path, tmp_path: Path, python: Python) -> None:
    targets, imported = json.loads(python(NAMES, plugin, site, cwd=tmp_path))
    assert targets == {
        "simulators": "toy_robotics.simulator:LineConfig",
        "policies": "toy_robotics.policy:LinearConfig",
        "algorithms": "toy_robotics.algorithm:ReinforceConfig",
        "recipes": "toy_robotics.recipes:line",
    }
    assert imported == []


CHECKS = """
from embodied_rl import policies, registry, simulators
from embodied_rl.simulators.reset_schedule import RandomSchedule

with registry.simulators.load("line")().build(RandomSchedule(0)) as simulator:
    simulators.check(simulator)
    policy = registry.policies.load("linear")().build(simulator.observation_spec, simulator.action_spec)
policies.check(policy)
print("checked")
"""


def test_its_parts_pass_the_contract_checks(plugin: Path, site: Path, tmp_path: Path, python: Python) -> None:
    assert python(CHECKS, plugin, site, cwd=tmp_path) == "checked\n"


TRAIN = """
import sys
from embodied_rl.cli import main
sys.exit(main(["train", "line", "--seed", "1", "--out", "run"]))
"""


def test_its_recipe_trains(plugin: Path, site: Path, tmp_path: Path, python: Python) -> None:
    python(TRAIN, plugin, site, cwd=tmp_path)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["evaluation_episodes"] == 20
    assert result["final_success"] > result["initial_success"] + 0.4

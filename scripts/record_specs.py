"""Write assets/simulator_specs.json: what simulators that recipes use say of themselves, so that `train --dry-run` need
not start them.

Every one is started once, with its assets and renderer. To be run again when a recipe uses another, or a simulator
changes: `python scripts/record_specs.py [NAME]` records all, or those of one simulator.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from embodied_rl import registry
from embodied_rl.simulators.reset_schedule import RandomSchedule
from embodied_rl.training.recorded_specs import TABLE

RECORDED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("libero", {"observation": "rgb"}, {"tasks": (0,)}),
    ("maniskill", {"task": "PickCube-v1", "control_mode": "pd_ee_delta_pos", "observation": "state"}, {}),
    ("maniskill", {"task": "PickCube-v1", "control_mode": "pd_ee_delta_pos", "observation": "state+rgb"}, {}),
    ("maniskill", {"task": "PickCube-v1", "control_mode": "pd_ee_delta_pose", "observation": "rgb"}, {}),
    (
        "isaaclab",
        {"task": "IsaacContrib-Stack-Cube-Franka-IK-Rel-Visuomotor", "observation": "rgb", "state": None},
        {"reward": "staged"},
    ),
]
"""(simulator, the settings that its specs depend on, others that it needs to start)."""


def record(name: str, settings: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """One entry of the table."""
    config = replace(registry.simulators.load(name)(), **settings, **others, num_envs=1, workers=1)
    with tempfile.TemporaryDirectory() as logs, config.build(RandomSchedule(0), log_dir=Path(logs)) as simulator:
        specs = {"observation": asdict(simulator.observation_spec), "action": asdict(simulator.action_spec)}
    return {"simulator": name, "settings": settings} | specs


def main(only: str | None = None) -> None:
    """Record all, or those of the simulator `only`; the others stay."""
    kept = [entry for entry in (json.loads(TABLE.read_text()) if only else []) if entry["simulator"] != only]
    made = [record(name, *settings) for name, *settings in RECORDED if only in (None, name)]
    lines = ",\n".join(json.dumps(entry) for entry in sorted(kept + made, key=json.dumps))
    TABLE.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

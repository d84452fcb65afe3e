"""What simulators say of themselves, recorded (`scripts/record_specs.py`), for those who ask before one is started."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import embodied_rl
from embodied_rl.registry import simulators
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec

TABLE = Path(embodied_rl.__file__).parent / "assets" / "simulator_specs.json"
"""[{"simulator": name, "settings": {field: value}, "observation", "action"}]: the specs of every configuration of that
simulator with these settings, whatever its others, but for its `image_size`."""


def recorded(config: Any) -> tuple[ObservationSpec, ActionSpec] | None:
    """The specs of the simulator that `config` would start; None when they were not recorded."""
    name = simulators.name_of(type(config))
    for entry in json.loads(TABLE.read_text()):
        if entry["simulator"] == name and all(
            _plain(getattr(config, field)) == value for field, value in entry["settings"].items()
        ):
            observation, action = read(entry)
            if size := getattr(config, "image_size", None):
                cameras = {name: replace(view, height=size, width=size) for name, view in observation.cameras.items()}
                observation = replace(observation, cameras=cameras)
            return observation, action
    return None


def read(entry: dict[str, Any]) -> tuple[ObservationSpec, ActionSpec]:
    """The specs of an entry of the table."""
    seen = {name: _plain(value, tuple) for name, value in entry["observation"].items()}
    seen["cameras"] = {name: CameraSpec(**view) for name, view in entry["observation"]["cameras"].items()}
    return ObservationSpec(**seen), ActionSpec(
        **{name: _plain(value, tuple) for name, value in entry["action"].items()}
    )


def _plain(value: Any, kind: type = list) -> Any:
    return kind(value) if isinstance(value, list | tuple) else value

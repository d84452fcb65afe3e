"""Where checkpoints keep the statistics of their data: openpi in assets/, LeRobot beside its processors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from embodied_rl.errors import UserError, unknown
from embodied_rl.policies.normalization import read_statistics
from embodied_rl.policies.pretrained import read_json

LEROBOT_MODES = {"MEAN_STD": "lerobot_mean_std", "QUANTILES": "lerobot_quantile", "MIN_MAX": "lerobot_min_max"}


@dataclass(frozen=True)
class Found:
    """Statistics of one quantity."""

    convention: str
    statistics: dict[str, Any]
    source: str
    """The file, for messages."""

    def first(self, size: int) -> dict[str, Any]:
        """Those of the first `size` dimensions. Some checkpoints hold zeros for the padding, too; raises `UserError`
        when more than that would be left out."""
        spread = self.statistics.get("std")
        if isinstance(spread, list) and any(spread[size:]):
            raise UserError(f"{self.source} describes {len(spread)} dimensions, the simulator has {size}")
        return {name: x[:size] if isinstance(x, list) else x for name, x in self.statistics.items()}


def find_statistics(folder: Path, asset: str | None, adaptive: bool) -> dict[str, Found]:
    """{"state", "actions"} of the checkpoint in `folder`. Raises `UserError` when there are none or too many."""
    if (folder / "policy_preprocessor.json").is_file():
        return _lerobot(folder)
    assets = folder / "assets"
    files = {str(file.parent.relative_to(assets)): file for file in sorted(assets.rglob("norm_stats.json"))}
    if asset is None and len(files) != 1:
        fix = f"choose one with --policy.asset: {', '.join(files)}" if files else "copy the checkpoint's assets/ there"
        raise UserError(f"{folder} holds {len(files)} norm_stats.json under assets/; {fix}")
    name = next(iter(files)) if asset is None else asset
    if name not in files:
        raise unknown(f"asset of {folder}", name, files)
    file = files[name]
    convention = "openpi_quantile" if adaptive else "openpi_mean_std"
    return {
        what: Found(convention, read_statistics(file, "norm_stats", what), str(file)) for what in ("state", "actions")
    }


def _lerobot(folder: Path) -> dict[str, Found]:
    path = folder / "policy_preprocessor.json"
    steps = [s for s in read_json(path).get("steps", ()) if s.get("registry_name") == "normalizer_processor"]
    if len(steps) != 1 or not isinstance(steps[0].get("state_file"), str):
        raise UserError(f"{path} has no normalizer_processor with a state_file; export the policy with its statistics")
    file, modes = folder / steps[0]["state_file"], steps[0].get("config", {}).get("norm_map", {})
    try:
        flat = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy it again") from error
    found = {}
    for name, key, kind in (("state", "observation.state.", "STATE"), ("actions", "action.", "ACTION")):
        if modes.get(kind) not in LEROBOT_MODES:
            raise UserError(
                f"{path}: normalisation {modes.get(kind)} of {kind} is not one of {', '.join(LEROBOT_MODES)}"
            )
        statistics = {k.removeprefix(key): v.tolist() for k, v in flat.items() if k.startswith(key)}
        found[name] = Found(LEROBOT_MODES[modes[kind]], statistics, f"{file}, {key.rstrip('.')}")
    return found

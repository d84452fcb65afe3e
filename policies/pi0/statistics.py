"""Where checkpoints keep the statistics of their data: openpi in assets/, LeRobot beside its processors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from embodied_rl.errors import UserError
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
    if asset is not None:
        files = [assets / asset / "norm_stats.json"]
    else:
        files = sorted(assets.rglob("norm_stats.json"))
    if len(files) != 1:
        names = ", ".join(str(file.parent.relative_to(assets)) for file in files)
        fix = f"choose one with --policy.asset: {names}" if files else "copy the checkpoint's assets/ there"
        raise UserError(f"{folder} holds {len(files)} norm_stats.json under assets/; {fix}")
    convention = "openpi_quantile" if adaptive else "openpi_mean_std"
    return {
        name: Found(convention, read_statistics(files[0], "norm_stats", name), str(files[0]))
        for name in ("state", "actions")
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

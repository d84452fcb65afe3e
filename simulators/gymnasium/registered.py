"""What is registered with Gymnasium, and what it would need to run."""

from __future__ import annotations

import importlib
import re
from importlib.util import find_spec
from typing import Any

from embodied_rl.errors import UserError, unknown
from embodied_rl.simulators.base import Listing

PROVIDERS = ("gymnasium_robotics",)
"""Packages that register environments when they are imported."""

_NEEDS = {
    "gymnasium.envs.box2d": ("Box2D", 'pip install "gymnasium[box2d]"'),
    "gymnasium.envs.mujoco": ("mujoco", 'pip install "gymnasium[mujoco]"'),
    "gymnasium.envs.phys2d": ("jax", 'pip install "gymnasium[jax]"'),
    "gymnasium.envs.tabular": ("jax", 'pip install "gymnasium[jax]"'),
}
"""{where an environment is defined: (the module that it imports, how to get that)}."""


def spec(task: str) -> Any:
    """The `EnvSpec` of `task`; raises `UserError` for an id that nobody registers."""
    import gymnasium

    module, _, name = task.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"Gymnasium task '{task}': module '{module}' cannot be imported: {error}") from error
    if name not in gymnasium.registry:
        import_providers()
    if name not in gymnasium.registry:
        raise unknown("Gymnasium task", name, gymnasium.registry)
    return gymnasium.registry[name]


def import_providers() -> None:
    """Have everything registered that is installed."""
    for name in filter(find_spec, PROVIDERS):
        importlib.import_module(name)


def listings() -> list[Listing]:
    """Every environment that runs alone; what its spaces are is known only once it is built."""
    import gymnasium

    import_providers()
    specs = [spec for _, spec in sorted(gymnasium.registry.items()) if _runs_alone(spec.entry_point)]
    return [
        Listing(each.id, instruction(each.id), None, None, each.max_episode_steps, "its own", missing(each))
        for each in specs
    ]


def _runs_alone(entry: Any) -> bool:
    """Not those that come only as vector environments, nor functions of Gymnasium's own, which keep an old name and
    raise."""
    return isinstance(entry, str) or (
        entry is not None and not getattr(entry, "__module__", "").startswith("gymnasium.envs")
    )


def missing(spec: Any) -> str:
    """The package that an environment lacks, as far as that shows without building it."""
    if not isinstance(spec.entry_point, str):
        return ""
    module, _, name = spec.entry_point.partition(":")
    if name.startswith("MujocoPy") or re.search(r"_v[23]$", module):
        return f"mujoco_py is not installed, nor maintained: use a later version of {spec.id}"
    for place, (needed, remedy) in _NEEDS.items():
        if module.startswith(place) and not find_spec(needed):
            return f"{needed} is not installed: {remedy}"
    package = module.partition(".")[0]
    return "" if find_spec(package) else f"{package} is not installed: pip install {package}"


def instruction(task: str) -> str:
    """Plain words for an id: "FetchReachDense-v4" gives "fetch reach dense"."""
    name = re.sub(r"-v\d+$", "", task.rpartition("/")[2])
    return " ".join(re.findall(r"[A-Z]?[a-z]+(?:\d+\w)?|[A-Z]+(?![a-z])|\d+", name)).lower() or name

"""Whether recorded demonstrations are of what a run's simulator shows and takes."""

from __future__ import annotations

from typing import Any

from embodied_rl.errors import UserError
from embodied_rl.types import Observation


def require_fit(simulator: Any, seen: Observation, action_dim: int) -> None:
    """Demonstrations that saw `seen` must show what `simulator` shows and do what it takes; raises `UserError`."""
    spec = simulator.observation_spec
    again = "record them with the same task and observation mode"
    if seen.state.shape[1] != spec.state:
        raise UserError(
            f"demonstrations hold states of {seen.state.shape[1]} numbers, the simulator's {spec.state}: {again}"
        )
    if action_dim != simulator.action_spec.dim:
        raise UserError(
            f"demonstrations hold actions of {action_dim} numbers, the simulator takes "
            f"{simulator.action_spec.dim}: {again}"
        )
    if missing := sorted(spec.cameras.keys() - seen.images.keys()):
        raise UserError(f"demonstrations hold no images of {', '.join(missing)}: {again}")
    for name, camera in spec.cameras.items():
        height, width = seen.images[name].shape[1:3]
        if (height, width) != (camera.height, camera.width):
            raise UserError(
                f"demonstrations hold images of {name} of {height} x {width}, the simulator's are "
                f"{camera.height} x {camera.width}: {again}"
            )
    if seen.task.max() >= len(simulator.tasks):
        raise UserError(f"demonstrations are of more tasks than this run's {len(simulator.tasks)}: {again}")

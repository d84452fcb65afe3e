"""What every policy that sees asks of an observation's images."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from embodied_rl.errors import UserError
from embodied_rl.types import Observation


def require_images(observation: Observation, cameras: Iterable[str]) -> None:
    """Raise `UserError` naming the camera whose images are missing or not uint8 [B,H,W,3]."""
    for name in cameras:
        if name not in observation.images:
            has = ", ".join(observation.images) or "none"
            raise UserError(f"the observation has no image.{name}, which the policy sees; it has {has}")
        image = np.asarray(observation.images[name])
        if image.dtype != np.uint8 or image.ndim != 4 or image.shape[-1] != 3:
            raise UserError(
                f"image.{name} is {image.dtype} {list(image.shape)}, the policy takes uint8 [B,H,W,3] from 0 to 255: "
                f"convert it in the simulator's adapter"
            )

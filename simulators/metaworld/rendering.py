"""Images of MetaWorld, one renderer per task and process.

A renderer holds an OpenGL context with the meshes and textures of its model. Models of one task differ only in where
things are, which comes from the data, so that all environments of a process share the renderer of a task. MuJoCo's
`Renderer` makes its own context current before it draws; gymnasium's does not, and environments that draw in turn get
each other's images (Metaworld#448, Gymnasium#736).
"""

from __future__ import annotations

from typing import Any

import numpy as np

CAMERA = "corner2"


_renderers: dict[tuple[str, int], Any] = {}


def image(name: str, model: Any, data: Any, size: int) -> np.ndarray:
    """uint8 [size,size,3] of task `name` as `data` stands."""
    import mujoco

    renderer = _renderers.get((name, size))
    if renderer is None:
        renderer = _renderers[name, size] = mujoco.Renderer(model, size, size)
    renderer.update_scene(data, CAMERA)
    # The camera hangs upside down.
    return renderer.render()[::-1, ::-1].copy()


def close() -> None:
    """Release all renderers of this process; those still needed come back when they are."""
    while _renderers:
        _renderers.popitem()[1].close()

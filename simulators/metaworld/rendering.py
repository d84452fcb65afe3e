"""Images of MetaWorld: each task's meshes and textures are kept once per process.

Models of one task differ only in where things are, which comes from the data, so that all environments of a process
draw with the same. Gymnasium's renderers, which MetaWorld uses, do not make their context current and get each other's
images when several draw in turn (Metaworld#448, Gymnasium#736).
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from embodied_rl.simulators import mujoco_gl

CAMERA = "corner2"

_uploads: dict[tuple[str, int, bool], tuple[Any, Any]] = {}
"""{(task, image size, plain): (its meshes and textures in OpenGL, the scene to fill)}."""


def image(name: str, model: Any, data: Any, size: int, plain: bool) -> np.ndarray:
    """uint8 [size,size,3] of task `name` as `data` stands; `plain` has no shadows, reflections or antialiasing."""
    mujoco: Any = importlib.import_module("mujoco")
    mujoco_gl.make_current()
    if (name, size, plain) not in _uploads:
        offscreen = model.vis.global_
        offscreen.offwidth, offscreen.offheight = max(offscreen.offwidth, size), max(offscreen.offheight, size)
        samples = model.vis.quality.offsamples
        if plain:
            model.vis.quality.offsamples = 0
        context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        model.vis.quality.offsamples = samples
        scene = mujoco.MjvScene(model, maxgeom=1000)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            scene.flags[flag] = not plain
        _uploads[name, size, plain] = context, scene
    context, scene = _uploads[name, size, plain]
    view, everything = mujoco.MjvCamera(), mujoco.mjtCatBit.mjCAT_ALL
    view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera(CAMERA).id
    mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), mujoco.MjvPerturb(), view, everything, scene)
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
    viewport, pixels = mujoco.MjrRect(0, 0, size, size), np.empty((size, size, 3), np.uint8)
    mujoco.mjr_render(viewport, scene, context)
    mujoco.mjr_readPixels(pixels, None, viewport, context)
    # OpenGL's first row is at the bottom and the camera hangs upside down: what remains is to exchange left and right.
    return np.ascontiguousarray(pixels[:, ::-1])


def forget_uploads() -> None:
    """Give the memory back; what is still needed is made again."""
    while _uploads:
        mujoco_gl.make_current()
        _uploads.popitem()[1][0].free()


mujoco_gl.before_end(forget_uploads)

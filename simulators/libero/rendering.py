"""Images of LIBERO's scenes."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import numpy as np

from embodied_rl.simulators import mujoco_gl
from embodied_rl.simulators.libero import installed

_UNSEEN = 5
"""A group of shapes that LIBERO leaves empty."""


_uploads: weakref.WeakValueDictionary[bytes, Upload] = weakref.WeakValueDictionary()


def _free() -> None:
    for upload in list(_uploads.values()):
        upload.free()


mujoco_gl.before_end(_free)


class Upload:
    """Meshes and textures in OpenGL; tasks whose scenes hold the same ones share it."""

    def __init__(self, model: Any) -> None:
        self.context: Any = None
        mujoco = installed.mujoco()
        mujoco_gl.make_current()
        self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)

    @classmethod
    def of(cls, model: Any) -> Upload:
        """The upload of what `model` shows."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(dir(model)):
            if name.startswith(("mesh_", "tex_", "hfield_", "skin_", "mat_tex")):
                digest.update(np.ascontiguousarray(getattr(model, name)).tobytes())
        digest.update(np.array([model.vis.global_.offwidth, model.vis.global_.offheight]).tobytes())
        upload = _uploads.get(digest.digest()) or cls(model)
        _uploads[digest.digest()] = upload
        return upload

    def free(self) -> None:
        """Give the memory back; the scenes that share it can no longer be rendered."""
        if self.context is not None:
            mujoco_gl.make_current()
            self.context.free()
            self.context = None

    def __del__(self) -> None:
        self.free()


class Renderer:
    """The cameras of one scene.

    Most of the time of an image goes into triangles, and a third of a scene's lie outside of what a camera sees, the
    arm's pedestal first of all. Shapes whose bounding sphere is outside are not drawn, which changes no pixel.
    """

    def __init__(self, model: Any, cameras: tuple[str, ...], size: int, reflections: bool) -> None:
        """Square images of `size` pixels. Without `reflections` the stove does not mirror, in half the time."""
        mujoco = installed.mujoco()
        self._mujoco, self._model, self._size = mujoco, model, size
        offscreen = model.vis.global_
        offscreen.offwidth, offscreen.offheight = max(offscreen.offwidth, size), max(offscreen.offheight, size)
        self._upload = Upload.of(model)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = reflections
        self._option, self._perturbation = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._option.geomgroup[0] = 0  # collision shapes
        self._option.geomgroup[_UNSEEN] = 0
        self._views = {name: mujoco.MjvCamera() for name in cameras}
        for name, view in self._views.items():
            view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera(name).id
        self._groups = model.geom_group.copy()
        self._mirrors = _mirrors(mujoco, model) if reflections else []
        self._thickness = np.where(model.geom_type == mujoco.mjtGeom.mjGEOM_BOX, model.geom_size[:, 2], 0.0)

    def render(self, data: Any) -> dict[str, np.ndarray]:
        """{camera: uint8 [size,size,3]}, turned by 180 degrees against how OpenGL stores images, as in the field's
        datasets. The kinematics of `data` must be up to date."""
        mujoco, context = self._mujoco, self._upload.context
        mujoco_gl.make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
        viewport = mujoco.MjrRect(0, 0, self._size, self._size)
        images = {}
        for name, view in self._views.items():
            everything = mujoco.mjtCatBit.mjCAT_ALL
            self._model.geom_group[self._unseen(data, view.fixedcamid)] = _UNSEEN
            mujoco.mjv_updateScene(self._model, data, self._option, self._perturbation, view, everything, self._scene)
            self._model.geom_group[:] = self._groups
            mujoco.mjr_render(viewport, self._scene, context)
            image = np.empty((self._size, self._size, 3), np.uint8)
            mujoco.mjr_readPixels(image, None, viewport, context)
            images[name] = np.ascontiguousarray(image[::-1, ::-1])
        return images

    def _unseen(self, data: Any, camera: int) -> np.ndarray:
        """bool [ngeom]: shapes outside of the view, and of what mirrors inside of it show."""
        model = self._model
        where, axes = data.cam_xpos[camera], data.cam_xmat[camera].reshape(3, 3)
        half = np.radians(model.cam_fovy[camera]) / 2  # also to the sides: images are square
        sine, cosine = np.sin(half), np.cos(half)
        radius = model.geom_rbound + 0.001

        def outside(centres: np.ndarray) -> np.ndarray:
            right, up, back = ((centres - where) @ axes).T
            aside = np.maximum(np.abs(right), np.abs(up)) * cosine + back * sine
            return np.maximum(aside, back) > radius

        centres = data.geom_xpos
        unseen = outside(centres) & (model.geom_rbound > 0)  # planes have no bounds
        for mirror in self._mirrors:
            if not unseen[mirror]:
                normal = data.geom_xmat[mirror].reshape(3, 3)[:, 2]
                height = (centres - centres[mirror]) @ normal - self._thickness[mirror]
                unseen &= outside(centres - 2 * height[:, None] * normal)
        return unseen


def _mirrors(mujoco: Any, model: Any) -> list[int]:
    """Shapes that reflect: planes and boxes, on their upper face."""
    flat = (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX)
    reflectance = np.append(model.mat_reflectance, 0)[model.geom_matid]
    return [i for i in range(model.ngeom) if model.geom_type[i] in flat and reflectance[i] > 0]

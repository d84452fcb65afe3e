"""State observations on a machine without any Vulkan device.

ManiSkill's tasks construct SAPIEN render materials and visual shapes even with `render_backend="none"`, and SAPIEN
refuses to make a material without a Vulkan device. Nothing of it reaches the physics, so it is replaced by objects that
accept everything and do nothing.
"""

from __future__ import annotations

import sys
from typing import Any

_installed = False


class _Material:
    """Stands in for `sapien.render.RenderMaterial`."""

    def __init__(self, *_: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("set_"):
            return lambda *_, **__: None
        raise AttributeError(name)


def installed() -> bool:
    """Whether this process can no longer render."""
    return _installed


def install() -> None:
    """Replace every render material and visual shape of this process. Imports ManiSkill; may be called twice."""
    global _installed
    if _installed:
        return
    import mani_skill.envs  # noqa: F401 - so that every module that holds the name is loaded
    import sapien.render
    from sapien.wrapper.actor_builder import ActorBuilder

    material = sapien.render.RenderMaterial
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("sapien", "mani_skill"):
            for attribute, value in list(vars(module).items()):
                if value is material:
                    setattr(module, attribute, _Material)
    for name in dir(ActorBuilder):
        if name.startswith("add_") and "visual" in name:
            setattr(ActorBuilder, name, lambda self, *_, **__: self)
    _installed = True


def can_render() -> bool:
    """Whether a Vulkan device exists that SAPIEN accepts."""
    if _installed:
        return False
    import sapien.render

    try:
        sapien.render.RenderMaterial()
    except RuntimeError:
        return False
    return True

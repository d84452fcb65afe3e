"""Observations of simulators with the manager API of Isaac Lab (Isaac Lab, mjlab): groups of torch tensors.

A simulator of that family gives {group: tensor or nested mapping of terms}, each tensor [N,...] and often a view of a
buffer that its next step overwrites. `Layout` says once, from a first observation, which terms make up the state, the
privileged numbers and the cameras, and from then on copies rows of them into the arrays of `observe()`. `replaced` puts
rows of one observation into another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embodied_rl.errors import UserError, unknown
from embodied_rl.specs import CameraSpec

_COLOURS = (3, 4)
"""RGB, or RGB and an alpha that is dropped."""


@dataclass(frozen=True)
class Layout:
    """Where the arrays of `BatchedEnvironment.observe` come from; terms by their full name, "group.term"."""

    state: tuple[str, ...]
    """Terms whose numbers, flattened and joined in this order, are the state."""
    state_names: tuple[str, ...]
    """A name for each of these numbers, e.g. "policy.joint_pos.3"."""
    privileged: tuple[str, ...]
    """Terms that only the critic sees, joined alike."""
    privileged_size: int
    images: Mapping[str, str]
    """{camera: term}; a camera has the last part of its term's name."""
    cameras: Mapping[str, CameraSpec]

    @staticmethod
    def of(
        groups: Mapping[str, Any],
        state: Sequence[str],
        privileged: Sequence[str] = (),
        images: Sequence[str] = (),
    ) -> Layout:
        """The layout of observations like `groups`. A name means a term, or all terms of a group in their order; terms
        that are `images` belong to no vector. Raises `UserError` for unknown names and images that are not RGB."""
        terms = dict(_terms(groups))
        pictures = _select(terms, images)
        vectors = {name: term for name, term in terms.items() if name not in pictures}
        chosen, hidden = _select(vectors, state), _select(vectors, privileged)
        return Layout(
            state=chosen,
            state_names=tuple(f"{name}.{i}" for name in chosen for i in range(_size(terms[name]))),
            privileged=hidden,
            privileged_size=sum(_size(terms[name]) for name in hidden),
            images={name.rpartition(".")[2]: name for name in pictures},
            cameras={name.rpartition(".")[2]: _camera(name, terms[name]) for name in pictures},
        )

    def spec_fields(self) -> dict[str, Any]:
        """Arguments of `ObservationSpec`."""
        return {
            "state": len(self.state_names),
            "state_names": self.state_names,
            "cameras": self.cameras,
            "privileged": self.privileged_size,
        }

    def arrays(self, groups: Mapping[str, Any], rows: np.ndarray) -> dict[str, np.ndarray]:
        """`rows` (int64 [M]) of `groups` in the keys of `observe()`: contiguous copies that share no memory with it."""
        terms = dict(_terms(groups))
        arrays = {"state": _vector(terms, self.state, rows)}
        if self.privileged:
            arrays["privileged"] = _vector(terms, self.privileged, rows)
        for camera, name in self.images.items():
            arrays[f"image.{camera}"] = _image(_rows(terms[name], rows))
        return arrays


def replaced(groups: Mapping[str, Any], fresh: Mapping[str, Any], rows: Any) -> dict[str, Any]:
    """A copy of `groups` with `rows` (int64 tensor [M]) of `fresh`; shares no memory with either."""
    merged: dict[str, Any] = {}
    for name, value in groups.items():
        if isinstance(value, Mapping):
            merged[name] = replaced(value, fresh[name], rows)
        else:
            merged[name] = value.clone()
            merged[name][rows] = fresh[name][rows]
    return merged


def _terms(groups: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("group.term", tensor) of nested groups, in their order."""
    for name, value in groups.items():
        if isinstance(value, Mapping):
            yield from _terms(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _select(terms: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """The terms that `names` mean, each once."""
    chosen: list[str] = []
    for name in names:
        meant = [term for term in terms if term == name or term.startswith(f"{name}.")]
        if not meant:
            raise unknown("observation group or term", name, {*terms, *(term.partition(".")[0] for term in terms)})
        chosen += meant
    return tuple(dict.fromkeys(chosen))


def _size(term: Any) -> int:
    return math.prod(term.shape[1:])


def _rows(term: Any, rows: np.ndarray) -> Any:
    """A copy of `rows` of a tensor."""
    import torch

    return term[torch.from_numpy(rows).to(term.device)]


def _vector(terms: Mapping[str, Any], names: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """float32 [M,S]."""
    import torch

    parts = [_rows(terms[name], rows).reshape(len(rows), -1).to(torch.float32) for name in names]
    return torch.cat(parts, dim=1).cpu().numpy() if parts else np.zeros((len(rows), 0), np.float32)


def _image(image: Any) -> np.ndarray:
    """uint8 [M,H,W,3] of a term [M,...]. Floats are k/255 where they come from bytes, and rounding gives k back."""
    import torch

    if _channels_first(image):
        image = image.permute(0, 2, 3, 1)
    image = image[..., :3]
    if image.is_floating_point():
        image = (image * 255).round().clamp(0, 255).to(torch.uint8)
    return image.contiguous().cpu().numpy()


def _camera(name: str, term: Any) -> CameraSpec:
    import torch

    shape = tuple(term.shape)
    colours = len(shape) == 4 and (shape[3] in _COLOURS or shape[1] in _COLOURS)
    if not colours or not (term.dtype == torch.uint8 or term.is_floating_point()):
        raise UserError(
            f"observation term '{name}' is {term.dtype} {list(shape)}; a camera gives RGB, uint8 or float in [0, 1]"
        )
    height, width = shape[2:] if _channels_first(term) else shape[1:3]
    return CameraSpec(height, width)


def _channels_first(image: Any) -> bool:
    return image.shape[3] not in _COLOURS

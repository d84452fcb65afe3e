"""Euler angles, rotation matrices and quaternions in numpy; see `fast.py` for why the numbers are ManiSkill's."""

from __future__ import annotations

from typing import Any

import numpy as np

from embodied_rl.simulators.maniskill.fast_math import plain, standardize
from embodied_rl.simulators.maniskill.patch import Patch, same

_AXES = {"X": (1, 2), "Y": (2, 0), "Z": (0, 1)}
"""The plane in which each axis turns: cosines on its diagonal, -sine above it in this order, +sine below."""


def axis_rotation(axis: str, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotation matrices [N,3,3] about one axis."""
    out = np.zeros((len(cos), 3, 3), np.float32)
    a, b = _AXES[axis]
    fixed = 3 - a - b
    out[:, fixed, fixed] = 1
    out[:, a, a] = out[:, b, b] = cos
    out[:, a, b], out[:, b, a] = -sin, sin
    return out


def quaternion(m: np.ndarray) -> np.ndarray:
    """Quaternions wxyz [N,4] of rotation matrices [N,3,3]: of four formulas for each, the best conditioned one. The
    square root is torch's, which may come from a vector library that does not round correctly."""
    import torch

    one, diagonal = np.float32(1), (m[:, 0, 0], m[:, 1, 1], m[:, 2, 2])
    x, y, z = diagonal
    squares = np.stack([one + x + y + z, one + x - y - z, one - x + y - z, one - x - y + z], axis=1)
    root = np.zeros_like(squares)
    positive = squares > 0
    root[positive] = torch.sqrt(torch.from_numpy(squares[positive])).numpy()
    best = root.argmax(axis=1)
    minus = m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]
    plus = m[:, 1, 0] + m[:, 0, 1], m[:, 0, 2] + m[:, 2, 0], m[:, 1, 2] + m[:, 2, 1]
    own = (root * root).T
    by = np.stack([
        np.stack([own[0], minus[0], minus[1], minus[2]], axis=1),
        np.stack([minus[0], own[1], plus[0], plus[1]], axis=1),
        np.stack([minus[1], plus[0], own[2], plus[2]], axis=1),
        np.stack([minus[2], plus[1], plus[2], own[3]], axis=1),
    ])  # fmt: skip
    rows = np.arange(len(m))
    scale = np.float32(2) * np.maximum(root[rows, best], np.float32(0.1))
    return standardize(by[best, rows] / scale[:, None])


def patches() -> list[Patch]:
    """`euler_angles_to_matrix` and `matrix_to_quaternion` wherever they were imported to."""
    import torch
    from mani_skill.utils.geometry import rotation_conversions as module

    to_matrix, to_quaternion = module.euler_angles_to_matrix, module.matrix_to_quaternion

    def euler_angles_to_matrix(euler_angles: Any, convention: str) -> Any:
        valid = len(convention) == 3 and set(convention) <= set(_AXES) and convention[1] not in convention[::2]
        if not valid or euler_angles.dim() != 2 or euler_angles.shape[1] != 3 or not plain(euler_angles):
            return to_matrix(euler_angles, convention)
        # Sines and cosines of one angle at a time, as ManiSkill takes them: their rounding is torch's own affair.
        first, second, third = (
            torch.from_numpy(axis_rotation(axis, torch.cos(angle).numpy(), torch.sin(angle).numpy()))
            for axis, angle in zip(convention, torch.unbind(euler_angles, -1), strict=True)
        )
        return torch.matmul(torch.matmul(first, second), third)

    def matrix_to_quaternion(matrix: Any) -> Any:
        if matrix.dim() != 3 or matrix.shape[1:] != (3, 3) or not plain(matrix):
            return to_quaternion(matrix)
        return torch.from_numpy(quaternion(matrix.numpy()))

    angles = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) * 3
    angles[0] = 0
    angles[1:20, :2] = 0
    angles[20:40, 1:] = 0
    batches = [angles, *(angles[i : i + 1] for i in range(100))]

    def check_euler() -> bool:
        return all(same(euler_angles_to_matrix(a, c), to_matrix(a, c)) for a in batches for c in ("XYZ", "ZYX", "ZXZ"))

    def check_quaternion() -> bool:
        third = torch.tensor([[[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]])  # a third of a turn: four equal roots
        matrices = [third, third.mT.contiguous(), *(to_matrix(a, "XYZ") for a in batches)]
        return all(same(matrix_to_quaternion(m), to_quaternion(m)) for m in matrices)

    return [
        Patch(module, "euler_angles_to_matrix", euler_angles_to_matrix, check_euler),
        Patch(module, "matrix_to_quaternion", matrix_to_quaternion, check_quaternion),
    ]

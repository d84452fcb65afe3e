"""Quaternions and poses in numpy; see `fast.py` for why the numbers are ManiSkill's.

A patched `Pose` keeps, beside its tensor, a numpy view of the same memory, and makes the tensor only when somebody asks
for it: most poses are intermediate results.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from embodied_rl.simulators.maniskill.patch import Patch, same

_INDEX = np.array([[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]])
_SIGN = np.array([[1, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]], np.float32)
_CONJUGATE = np.array([1, -1, -1, -1], np.float32)
# The nine entries of a rotation matrix as products of components (r, i, j, k), read off a row of all 16 products.
_FIRST = np.array([10, 6, 7, 6, 5, 11, 7, 11, 5])  # jj ij ik | ij ii jk | ik jk ii
_SECOND = np.array([15, 12, 8, 12, 15, 4, 8, 4, 10])  # kk kr jr | kr kk ir | jr ir jj
_MATRIX_SIGN = np.array([1, -1, 1, 1, 1, -1, -1, 1, 1], np.float32)
_ONE, _TWO = np.float32(1), np.float32(2)


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The Hamilton product of quaternions wxyz [...,4], summed in the order a_w, a_x, a_y, a_z as ManiSkill does
    (x - y and x + (-y) are the same float)."""
    terms = a[..., :, None] * (b.take(_INDEX, axis=-1) * _SIGN)
    return terms[..., 0, :] + terms[..., 1, :] + terms[..., 2, :] + terms[..., 3, :]


def standardize(q: np.ndarray) -> np.ndarray:
    """The representative with a non-negative real part."""
    if q.shape == (1, 4):
        return -q if q[0, 0] < 0 else q
    return np.where(q[..., 0:1] < 0, -q, q)


def rotate(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Points [...,3] turned by quaternions [...,4]."""
    point = np.zeros((*p.shape[:-1], 4), np.float32)
    point[..., 1:] = p
    return multiply(multiply(q, point), q * _CONJUGATE)[..., 1:]


def compose(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Poses [N,7] (position, quaternion) a * b; both products with a's quaternion are done at once."""
    q = a[:, 3:]
    right = np.zeros((len(b), 2, 4), np.float32)
    right[:, 0] = b[:, 3:]
    right[:, 1, 1:] = b[:, :3]
    products = multiply(q[:, None, :], right)
    out = np.empty((len(products), 7), np.float32)
    out[:, :3] = a[:, :3] + multiply(products[:, 1], q * _CONJUGATE)[:, 1:]
    out[:, 3:] = standardize(products[:, 0])
    return out


def invert(a: np.ndarray) -> np.ndarray:
    """The inverse poses [N,7]."""
    out = a.copy()
    out[:, 4:] = -out[:, 4:]
    out[:, :3] = rotate(out[:, 3:], -a[:, :3])
    return out


def matrix(q: np.ndarray, square_sum: np.ndarray) -> np.ndarray:
    """Rotation matrices [N,3,3] of quaternions [N,4]; `square_sum` [N] is torch's own sum of their squares, and the
    division is torch's, by reciprocal."""
    products = (q[:, :, None] * q[:, None, :]).reshape(-1, 16)
    s = ((_ONE / square_sum) * _TWO)[:, None]
    out = s * (products.take(_FIRST, axis=1) + products.take(_SECOND, axis=1) * _MATRIX_SIGN)
    out[:, ::4] = _ONE - out[:, ::4]
    return out.reshape(-1, 3, 3)


def plain(tensor: Any) -> bool:
    """Whether a tensor is float32 on the CPU outside any graph: then numpy may share its memory."""
    import torch

    return tensor.dtype is torch.float32 and not tensor.requires_grad and tensor.device.type == "cpu"


def array(pose: Any) -> np.ndarray | None:
    """The memory of a `Pose` [N,7]; None when numpy cannot share it."""
    fields = pose.__dict__
    found = fields.get("_array")
    if found is None:
        tensor = fields["raw_pose"]
        if tensor.dim() != 2 or not plain(tensor):
            return None
        found = fields["_array"] = tensor.numpy()
    return found


def pose(raw: np.ndarray) -> Any:
    """A `Pose` on the memory `raw` float32 [N,7]."""
    from mani_skill.utils.structs.pose import Pose

    made = Pose.__new__(Pose)
    made.__dict__["_array"] = raw
    return made


def to_sapien(row: Any) -> Any:
    """The `sapien.Pose` of one row [7]."""
    import sapien

    return sapien.Pose(row[:3], row[3:])


def from_sapien(*poses: Any) -> np.ndarray:
    """float32 [N,7] of `sapien.Pose`s (their state is the tuple of position and quaternion)."""
    return np.array([p.__getstate__() for p in poses], np.float32)


def _on_cpu(device: Any) -> bool:
    return device is None or getattr(device, "type", device) == "cpu"


def patches() -> list[Patch]:
    """Quaternion functions wherever they were imported to, and the methods of `Pose`."""
    return [*_functions(), *_methods()]


def _functions() -> list[Patch]:
    import torch
    from mani_skill.utils.geometry import rotation_conversions as module

    raw_multiply, product = module.quaternion_raw_multiply, module.quaternion_multiply
    apply, to_matrix = module.quaternion_apply, module.quaternion_to_matrix

    def quaternion_raw_multiply(a: Any, b: Any) -> Any:
        if not (plain(a) and plain(b)):
            return raw_multiply(a, b)
        return torch.from_numpy(multiply(a.numpy(), b.numpy()))

    def quaternion_multiply(a: Any, b: Any) -> Any:
        if not (plain(a) and plain(b)):
            return product(a, b)
        return torch.from_numpy(standardize(multiply(a.numpy(), b.numpy())))

    def quaternion_apply(quaternion: Any, point: Any) -> Any:
        if not (plain(quaternion) and plain(point)) or point.size(-1) != 3:
            return apply(quaternion, point)
        return torch.from_numpy(rotate(quaternion.numpy(), point.numpy()))

    def quaternion_to_matrix(quaternions: Any) -> Any:
        if not plain(quaternions) or quaternions.dim() != 2:
            return to_matrix(quaternions)
        return torch.from_numpy(matrix(quaternions.numpy(), (quaternions * quaternions).sum(-1).numpy()))

    q, r, p = (torch.randn(200, n, generator=torch.Generator().manual_seed(n)) for n in (4, 4, 3))

    def agree(new: Any, old: Any, *inputs: Any) -> bool:
        rows = (slice(None), *(slice(i, i + 1) for i in range(50)))
        return all(same(new(*(x[at] for x in inputs)), old(*(x[at] for x in inputs))) for at in rows)

    return [
        Patch(module, "quaternion_raw_multiply", quaternion_raw_multiply,
              lambda: agree(quaternion_raw_multiply, raw_multiply, q, r.flip(0))),
        Patch(module, "quaternion_multiply", quaternion_multiply,
              lambda: agree(quaternion_multiply, product, q, r.flip(0))),
        Patch(module, "quaternion_apply", quaternion_apply, lambda: agree(quaternion_apply, apply, q, p)),
        Patch(module, "quaternion_to_matrix", quaternion_to_matrix,
              lambda: agree(quaternion_to_matrix, to_matrix, q)),
    ]  # fmt: skip


def _methods() -> list[Patch]:
    import sapien
    import torch
    from mani_skill.utils.geometry.rotation_conversions import quaternion_to_matrix as to_matrix
    from mani_skill.utils.structs.pose import Pose

    original = {name: vars(Pose)[name] for name in ("p", "q", "sp", "inv", "__mul__", "to_transformation_matrix")}
    create_original = Pose.create.__func__

    def get_raw(self: Any) -> Any:
        fields = self.__dict__
        tensor = fields.get("raw_pose")
        if tensor is None:
            tensor = fields["raw_pose"] = torch.from_numpy(fields["_array"])
        return tensor

    def set_raw(self: Any, tensor: Any) -> None:
        self.__dict__.pop("_array", None)
        self.__dict__["raw_pose"] = tensor

    def get_p(self: Any) -> Any:
        a = array(self)
        return original["p"].fget(self) if a is None else torch.from_numpy(a[:, :3])

    def get_q(self: Any) -> Any:
        a = array(self)
        return original["q"].fget(self) if a is None else torch.from_numpy(a[:, 3:])

    def get_sp(self: Any) -> Any:
        a = array(self)
        return original["sp"].fget(self) if a is None or len(a) != 1 else to_sapien(a[0])

    def create(cls: type, source: Any, device: Any = None) -> Any:
        if cls is Pose and _on_cpu(device):
            if isinstance(source, Pose):
                made = Pose.__new__(Pose)
                made.__dict__.update(source.__dict__)
                return made
            if isinstance(source, sapien.Pose):
                return pose(from_sapien(source))
            if isinstance(source, list) and isinstance(source[0], sapien.Pose):
                return pose(from_sapien(*source))
            if isinstance(source, torch.Tensor) and source.dim() == 2 and source.shape[1] == 3 and plain(source):
                raw = np.zeros((len(source), 7), np.float32)
                raw[:, :3], raw[:, 3] = source.numpy(), 1
                return pose(raw)
        return create_original(cls, source, device)

    def mul(self: Any, other: Any) -> Any:
        a = array(self)
        b = from_sapien(other) if isinstance(other, sapien.Pose) else array(other)
        if a is None or b is None or (len(a) != len(b) and 1 not in (len(a), len(b))):
            return original["__mul__"](self, other)
        return pose(compose(a, b))

    def inv(self: Any) -> Any:
        a = array(self)
        return original["inv"](self) if a is None else pose(invert(a))

    def to_transformation_matrix(self: Any) -> Any:
        a = array(self)
        if a is None:
            return original["to_transformation_matrix"](self)
        q = torch.from_numpy(a[:, 3:])
        out = np.zeros((len(a), 4, 4), np.float32)
        out[:, :3, :3] = matrix(a[:, 3:], (q * q).sum(-1).numpy())
        out[:, :3, 3] = a[:, :3]
        out[:, 3, 3] = 1
        return torch.from_numpy(out)

    raw = torch.randn(100, 7, generator=torch.Generator().manual_seed(0))
    singles = [raw[i : i + 1] for i in range(50)]

    def check_mul() -> bool:
        pairs = zip(singles, reversed(singles), strict=True)
        return all(
            same(compose(x.numpy(), y.numpy()), original["__mul__"](Pose(x), Pose(y)).raw_pose) for x, y in pairs
        )

    def check_inv() -> bool:
        return all(same(invert(x.numpy()), original["inv"](Pose(x)).raw_pose) for x in [raw, *singles])

    def check_matrix() -> bool:
        squares = [(x, x[:, 3:]) for x in [raw, *singles]]
        return all(same(matrix(q.numpy(), (q * q).sum(-1).numpy()), to_matrix(q)) for _, q in squares)

    return [
        Patch(Pose, "raw_pose", property(get_raw, set_raw)),
        Patch(Pose, "p", property(get_p, original["p"].fset)),
        Patch(Pose, "q", property(get_q, original["q"].fset)),
        Patch(Pose, "sp", property(get_sp)),
        Patch(Pose, "create", classmethod(create)),
        Patch(Pose, "__mul__", mul, check_mul),
        Patch(Pose, "inv", inv, check_inv),
        Patch(Pose, "to_transformation_matrix", to_transformation_matrix, check_matrix),
    ]

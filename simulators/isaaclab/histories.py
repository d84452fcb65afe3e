"""Observation histories of single rows: Isaac Lab advances those of all rows whenever it computes an observation."""

# pyright: reportMissingImports=false, reportOptionalMemberAccess=false
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def advanced(env: Any, rows: Any) -> Iterator[None]:
    """Inside, observations are computed; afterwards only the histories of `rows` (int64 tensor [M]) have advanced."""
    before = [(buffer, buffer._buffer.clone(), buffer._num_pushes.clone()) for buffer in _buffers(env)]
    yield
    for buffer, data, pushes in before:
        axis = 1 if buffer._stack_dim_internal is None else 0  # of the batch
        data.movedim(axis, 0)[rows] = buffer._buffer.movedim(axis, 0)[rows]
        pushes[rows] = buffer._num_pushes[rows]
        buffer._buffer.copy_(data)
        buffer._num_pushes.copy_(pushes)


def _buffers(env: Any) -> list[Any]:
    """The ring buffers in use: of a manager's terms, or those a direct task stacks frames with."""
    from isaaclab.utils.buffers import CircularBuffer

    if hasattr(env, "observation_manager"):
        groups = env.observation_manager._group_obs_term_history_buffer.values()
        found = [buffer for group in groups for buffer in group.values()]
    else:
        found = [getattr(value, "_buffer", None) for value in vars(env).values()]
    return [buffer for buffer in found if isinstance(buffer, CircularBuffer) and buffer._buffer is not None]

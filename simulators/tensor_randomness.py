"""Isaac Lab and mjlab draw from global generators, jointly for all rows that need a number; here a row draws alone."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np


def seed_everything(*key: int) -> None:
    """Seed every global generator that their code draws from (Warp has none), by one number or several."""
    import torch

    seed = int(key[0]) if len(key) == 1 else int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - it is this one that tasks draw from
    torch.manual_seed(seed)  # of all devices


@contextlib.contextmanager
def apart(device: str) -> Iterator[None]:
    """What is drawn inside is not missing outside: steps draw on as if nothing had happened."""
    import torch

    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.startswith("cuda") else []):
        yield
    random.setstate(before[0])
    np.random.set_state(before[1])  # noqa: NPY002


def resample_by_seed(env: Any, seeds: np.ndarray) -> None:
    """Let the command terms (goals) of `env` draw new commands in the middle of an episode row by row, each from the
    seed of the row's episode, `seeds` int64 [N], and the number of its commands so far."""
    manager = getattr(env, "command_manager", None)
    for term in manager._terms.values() if manager else ():
        term._resample = _by_seed(term, term._resample, seeds, str(env.device))


def _by_seed(term: Any, resample: Any, seeds: np.ndarray, device: str) -> Any:
    def resample_rows(env_ids: Any) -> None:
        if isinstance(env_ids, slice):
            return resample(env_ids)  # all rows at once, when the environment is built
        for row in env_ids.split(1):
            count = int(term.command_counter[row])
            if count == 0:  # a reset, which has just seeded everything
                resample(row)
                continue
            with apart(device):
                seed_everything(int(seeds[int(row)]), count)
                resample(row)

    return resample_rows

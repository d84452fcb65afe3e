"""Tiny π₀ and π₀.₅ policies."""

import numpy as np
import pytest
import torch

from embodied_rl.policies.pi0.config import Pi0Config, Pi05Config, tiny
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec

SEEN = ObservationSpec(state=5, cameras={"agentview": CameraSpec(20, 30), "wrist": CameraSpec(32, 32)})
ACTION = ActionSpec((-1.0, -2.0, 0.0), (1.0, 2.0, 1.0), (0.0, 0.0, 0.0))


def configure(adaptive=False, **settings):
    kind = Pi05Config if adaptive else Pi0Config
    defaults = {
        "network": tiny(adaptive),
        "tokenizer": "bytes",
        "prompt_length": 96,
        "horizon": 4,
        "chunk": 2,
        "denoise_steps": 3,
        "value_hidden": (16,),
        "frozen": (),
    }
    return kind(**{**defaults, **settings})


def build(adaptive=False, **settings):
    """With every parameter away from its first value, so that nothing is the identity by chance."""
    torch.manual_seed(0)
    policy = configure(adaptive, **settings).build(SEEN, ACTION)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return policy


both = pytest.mark.parametrize("adaptive", [False, True], ids=["pi0", "pi05"])


def noise(rows=6):
    return RowNoise(1, np.arange(rows), np.zeros(rows, np.int64))

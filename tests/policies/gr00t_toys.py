"""Tiny GR00T policies."""

import numpy as np
import torch

from embodied_rl.policies.check import synthesise
from embodied_rl.policies.gr00t.config import Gr00tConfig
from embodied_rl.policies.gr00t.sizes import tiny
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec

SEEN = ObservationSpec(state=5, cameras={"agentview": CameraSpec(20, 30), "wrist": CameraSpec(32, 32)})
ACTION = ActionSpec((-1.0, -2.0, 0.0), (1.0, 2.0, 1.0), (0.0, 0.0, 0.0))
LENGTH = 220
"""Two images of 16 tokens, and the chat prompt in bytes."""
SETTINGS = {
    "network": tiny(),
    "tokenizer": "bytes",
    "prompt_length": LENGTH,
    "chunk": 2,
    "denoise_steps": 3,
    "value_hidden": (16,),
    "frozen": (),
}


def configure(**settings):
    return Gr00tConfig(**{**SETTINGS, "horizon": 4, **settings})


def build(**settings):
    """With every parameter away from its first value, so that nothing is the identity by chance."""
    torch.manual_seed(0)
    policy = configure(**settings).build(SEEN, ACTION)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return policy


def noise(rows=6):
    return RowNoise(1, np.arange(rows), np.zeros(rows, np.int64))


def observe(policy):
    return policy.prepare(synthesise(policy.observation_spec))

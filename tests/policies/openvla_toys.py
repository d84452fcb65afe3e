"""Tiny OpenVLA policies."""

from dataclasses import replace

import torch

from embodied_rl.policies.openvla.architecture import Architecture
from embodied_rl.policies.openvla.autoregressive import AutoregressivePolicy
from embodied_rl.policies.openvla.config import OpenVLAConfig, OpenVLAOFTConfig
from embodied_rl.policies.openvla.parallel import ParallelPolicy, RegressionPolicy
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec

VISION = {"depth": 2, "embed_dim": 16, "num_heads": 2}
TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 704,
    "pad_token_id": 640,
}
TINY = Architecture(vision_options=(VISION, VISION), image_size=28, text=TEXT, action_dim=3)
OBSERVATION = ObservationSpec(state=4, cameras={"agentview": CameraSpec(40, 32), "wrist": CameraSpec(28, 28)})
ACTION = ActionSpec((-1.0,) * 3, (1.0,) * 3, (0.0, 0.0, -1.0), gripper=2, gripper_open=-1)
SMALL = {"dtype": "float32", "prompt_length": 80, "empty_token": 300}


def autoregressive(**settings):
    torch.manual_seed(0)
    return AutoregressivePolicy(OpenVLAConfig(**SMALL | settings), TINY, None, OBSERVATION, ACTION)


def parallel(kind=ParallelPolicy, sizes=None, seen=OBSERVATION, **settings):
    torch.manual_seed(0)
    config = OpenVLAOFTConfig(**SMALL | {"horizon": 2} | settings)
    architecture = replace(TINY, horizon=2, **sizes or {})
    return kind(config, architecture, None, seen, ACTION)


def regression(**settings):
    sizes = {"regression": True, "film": True, "vision_lora_rank": 2, "proprio_dim": 4}
    return parallel(RegressionPolicy, sizes, cameras=("primary", "wrist"), **settings)

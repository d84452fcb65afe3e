"""The configurations of π₀ and π₀.₅: published sizes, a tiny one, and everything a run can choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from embodied_rl.errors import UserError, unknown
from embodied_rl.policies.flow_vla import FlowVLAConfig
from embodied_rl.policies.pi0.gemma import GemmaConfig
from embodied_rl.policies.pi0.network import NetworkConfig
from embodied_rl.policies.pi0.siglip import SiglipConfig
from embodied_rl.specs import ActionSpec, ObservationSpec

if TYPE_CHECKING:
    from embodied_rl.policies.pi0.policy import Pi0Policy
    from embodied_rl.policies.pi0.preprocessing import Tokenizer

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""The network's cameras, in the order of its prefix."""
GROUPS = ("vision", "language", "expert", "value")
"""Of parameters: SigLIP with its projector; Gemma; action expert with its projections and noise head; value head."""

SIGLIP_SO400M = SiglipConfig(width=1152, depth=27, heads=16, mlp=4304, patch=14, image=224)
GEMMA_2B = GemmaConfig(width=2048, depth=18, mlp=16384, heads=8, kv_heads=1, head_dim=256)
GEMMA_300M = GemmaConfig(width=1024, depth=18, mlp=4096, heads=8, kv_heads=1, head_dim=256)
PI0 = NetworkConfig(SIGLIP_SO400M, GEMMA_2B, GEMMA_300M, vocabulary=257_152, action_dim=32, adaptive=False)
PI05 = NetworkConfig(SIGLIP_SO400M, GEMMA_2B, GEMMA_300M, vocabulary=257_152, action_dim=32, adaptive=True)


def tiny(adaptive: bool) -> NetworkConfig:
    """A network of the same make with about 0.1 M parameters, for tests and first steps."""
    return NetworkConfig(
        SiglipConfig(width=32, depth=2, heads=4, mlp=64, patch=8, image=32),
        GemmaConfig(width=48, depth=2, mlp=96, heads=4, kv_heads=1, head_dim=16),
        GemmaConfig(width=32, depth=2, mlp=64, heads=4, kv_heads=1, head_dim=16),
        vocabulary=272,
        action_dim=32,
        adaptive=adaptive,
    )


@dataclass(frozen=True)
class Pi0Config(FlowVLAConfig):
    """π₀: the state is a token of the action expert. Checkpoints are in openpi's PyTorch layout or LeRobot's, the
    tokenizer is PaliGemma's."""

    asset: str | None = None
    """Which folder of the checkpoint's assets/ holds the statistics; none takes the only one."""
    network: NetworkConfig = PI0
    """Sizes; the published ones unless you train your own."""
    prompt_length: int = 48
    cameras: dict[str, str] = field(default_factory=dict)
    """{network's camera: simulator's camera} where the names do not tell; the network's are base_0_rgb,
    left_wrist_0_rgb and right_wrist_0_rgb."""
    relative_to_state: int = 0
    """The network's first n actions are relative to the first n numbers of the state that the chunk was predicted at,
    both in the simulator's units. 6 for checkpoints trained with openpi's extra_delta_transform=True, such as its
    pi0_libero; a checkpoint does not tell."""
    horizon: int = 50
    chunk: int = 10

    groups = GROUPS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relative_to_state < 0:
            raise UserError(f"{self.name}: needs relative_to_state >= 0, got {self.relative_to_state}")
        for camera in self.cameras:
            if camera not in CAMERAS:
                raise unknown("camera", camera, CAMERAS)

    @property
    def name(self) -> str:
        return "pi05" if self.network.adaptive else "pi0"

    @property
    def published(self) -> bool:
        """The sizes are published ones: trained from a checkpoint, not from random weights."""
        return self.network in (PI0, PI05)

    def build(
        self, observation_spec: ObservationSpec, action_spec: ActionSpec, tokenizer: Tokenizer | None = None
    ) -> Pi0Policy:
        """The policy for a simulator with these specs; `tokenizer` replaces the one of the folder. Raises `SpecError`
        when it cannot serve them and `UserError` when the checkpoint does not fit."""
        from embodied_rl.policies.pi0.policy import Pi0Policy

        return Pi0Policy(self, observation_spec, action_spec, tokenizer)


@dataclass(frozen=True)
class Pi05Config(Pi0Config):
    """π₀.₅: the state is written into the prompt, and the time conditions the action expert's norms."""

    network: NetworkConfig = PI05
    state_in_prompt: bool = True
    """False for checkpoints trained with openpi's discrete_state_input=False, such as its own for LIBERO: they know
    nothing of the state, and their prompt is π₀'s."""
    prompt_length: int = 200
    denoise_steps: int = 5

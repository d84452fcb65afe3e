"""The configurations of π₀ and π₀.₅: published sizes, a tiny one, and everything a run can choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from embodied_rl.errors import UserError, unknown
from embodied_rl.policies.flow import FlowSamplerConfig
from embodied_rl.policies.mlp import Activation
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
class Pi0Config:
    """π₀: the state is a token of the action expert. The sampler's fields are those of `FlowSamplerConfig`."""

    checkpoint: str = ""
    """Folder of a published or fine-tuned checkpoint, in openpi's PyTorch layout or LeRobot's; "" = random weights."""
    tokenizer: str = ""
    """Folder of PaliGemma's tokenizer; "" = the checkpoint's. "bytes" takes UTF-8 bytes for tokens."""
    asset: str | None = None
    """Which folder of the checkpoint's assets/ holds the statistics; none takes the only one."""
    network: NetworkConfig = PI0
    """Sizes; the published ones unless you train your own."""
    prompt_length: int = 48
    """Tokens that every prompt is padded to."""
    cameras: dict[str, str] = field(default_factory=dict)
    """{network's camera: simulator's camera} where the names do not tell; the network's are base_0_rgb,
    left_wrist_0_rgb and right_wrist_0_rgb."""
    state: tuple[str, ...] = ()
    """Names of the simulator's state that the policy sees, in its order; "hand" means all of "hand.0", "hand.1", ...;
    () = the whole state."""
    horizon: int = 50
    """H, predicted actions."""
    chunk: int = 10
    """K, executed actions."""
    denoise_steps: int = 4
    """N, steps from noise to action."""
    method: Literal["sde", "noise", "cps", "ode"] = "sde"
    """How a step becomes stochastic: Flow-SDE, learned Flow-Noise, Flow-CPS, or never."""
    noise_level: float = 0.5
    """Of "sde" and "cps"; "noise" learns its own."""
    joint: bool = False
    """Every step is stochastic and scored, not one step drawn per row."""
    joint_reduction: Literal["sum", "mean"] = "sum"
    """The chain's density is the "sum"; "mean" averages over its steps and the initial noise."""
    noise_std: tuple[float, float] = (0.08, 0.16)
    """Range of the learned deviation of method "noise", in network units."""
    noise_hidden: tuple[int, ...] = (128, 64)
    """Widths of the noise head, which reads the action expert's last hidden layer."""
    value_hidden: tuple[int, ...] = (1024, 512, 256)
    """Widths of the value head, which reads the mean of the vision-language model's output."""
    value_activation: Activation = "relu"
    value_trains_prefix: bool = False
    """The value's gradient reaches the vision-language model (where that is not frozen)."""
    frozen: tuple[str, ...] = ("vision", "language")
    """Groups that are not trained: vision, language, expert, value. While vision and language are, the prefix keeps
    nothing for a backward pass."""
    lora_rank: int = 0
    """Train adapters of this rank in the transformers of the other groups instead of their weights; 0 = the weights."""
    lora_alpha: float = 16.0
    """The adapters' scale is alpha / rank."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Of the weights: the checkpoint's own, or cast; with bfloat16, norms, the embedding of patches and the small
    projections stay float32, as in openpi. Sampled actions, scores and values are float32 always."""

    def __post_init__(self) -> None:
        if self.lora_rank < 0 or self.prompt_length < 1:
            raise UserError(f"{self.name}: needs lora_rank >= 0 and prompt_length >= 1")
        if not 1 <= self.chunk <= self.horizon:
            raise UserError(f"{self.name}: needs 1 <= chunk <= horizon, got {self.chunk} and {self.horizon}")
        if not 0 < self.noise_std[0] <= self.noise_std[1]:
            raise UserError(f"{self.name}: noise_std must be an ascending range above 0, not {self.noise_std}")
        for kind, given, known in (("camera", self.cameras, CAMERAS), ("parameter group", self.frozen, GROUPS)):
            for each in given:
                if each not in known:
                    raise unknown(kind, each, known)
        self.sampler()

    def sampler(self) -> FlowSamplerConfig:
        """The sampler's part."""
        return FlowSamplerConfig(self.denoise_steps, self.method, self.noise_level, self.joint, self.joint_reduction)

    @property
    def name(self) -> str:
        """As registered."""
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
    prompt_length: int = 200
    denoise_steps: int = 5

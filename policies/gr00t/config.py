"""The configuration of GR00T N1.5: everything a run can choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from embodied_rl.errors import UserError, unknown
from embodied_rl.policies.flow import FlowSamplerConfig
from embodied_rl.policies.gr00t.sizes import GR00T_N1_5, NetworkConfig
from embodied_rl.policies.mlp import Activation
from embodied_rl.specs import ActionSpec, ObservationSpec

if TYPE_CHECKING:
    from embodied_rl.policies.gr00t.policy import Gr00tPolicy
    from embodied_rl.policies.gr00t.preprocessing import Tokenizer

EMBODIMENTS = {"oxe_droid": 17, "gr1": 24, "agibot_genie1": 26, "new_embodiment": 31}
"""Which of the embodiments' weights each tag of the release uses."""
GROUPS = ("vision", "language", "heads", "value")
"""Of parameters: SigLIP with its projector; Qwen3; action head and noise head; value head."""


@dataclass(frozen=True)
class Gr00tConfig:
    """GR00T N1.5. The sampler's fields are those of `FlowSamplerConfig`."""

    checkpoint: str = ""
    """Folder of a published or fine-tuned checkpoint, in NVIDIA's layout; "" = random weights."""
    tokenizer: str = ""
    """Folder of the backbone's tokenizer (eagle2_hg_model in NVIDIA's code); "" = the checkpoint's. "bytes" takes UTF-8
    bytes for tokens."""
    embodiment: str = "new_embodiment"
    """Whose weights and statistics are used: oxe_droid, gr1, agibot_genie1 or new_embodiment."""
    state_keys: tuple[str, ...] = ()
    """The parts of the state in the data configuration's order; () = all, in that of the checkpoint's metadata.json."""
    action_keys: tuple[str, ...] = ()
    """The same of the action."""
    unit_gripper: bool = False
    """The checkpoint's gripper runs from 0 (closed) to 1 (open), whatever the simulator's does."""
    network: NetworkConfig = GR00T_N1_5
    """Sizes; the published ones unless you train your own."""
    cameras: tuple[str, ...] = ()
    """The simulator's cameras in the order of the prompt; () = all."""
    crop: float = 0.95
    """The middle part of an image's sides that is kept, as the published data configurations evaluate."""
    prompt_length: int = 570
    """Tokens that every prompt is padded to, images' tokens (256 each) included. The action head sees the padding, as
    in the reference: train and evaluate with the same length."""
    state: tuple[str, ...] = ()
    """Names of the simulator's state that the policy sees, in its order; "hand" means all of "hand.0", "hand.1", ...;
    () = the whole state."""
    horizon: int = 16
    """H, predicted actions."""
    chunk: int = 8
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
    """Widths of the noise head, which reads the DiT's output."""
    value_hidden: tuple[int, ...] = (1024, 512, 256)
    """Widths of the value head, which reads the mean of the backbone's features and the state."""
    value_activation: Activation = "relu"
    value_trains_prefix: bool = False
    """The value's gradient reaches the backbone (where that is not frozen)."""
    frozen: tuple[str, ...] = ("vision", "language")
    """Groups that are not trained: vision, language, heads, value. While vision and language are, the backbone keeps
    nothing for a backward pass."""
    lora_rank: int = 0
    """Train adapters of this rank in the transformers of the other groups instead of their weights; 0 = the weights."""
    lora_alpha: float = 16.0
    """The adapters' scale is alpha / rank."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Of the weights: the checkpoint's own, or cast. Sampled actions, scores and values are float32 always."""

    def __post_init__(self) -> None:
        if self.lora_rank < 0 or self.prompt_length < 1 or not 0 < self.crop <= 1:
            raise UserError("gr00t: needs lora_rank >= 0, prompt_length >= 1 and crop above 0, at most 1")
        longest = self.network.head.positions
        if not 1 <= self.chunk <= self.horizon <= longest:
            raise UserError(f"gr00t: needs 1 <= chunk <= horizon <= {longest}, got {self.chunk} and {self.horizon}")
        if not 0 < self.noise_std[0] <= self.noise_std[1]:
            raise UserError(f"gr00t: noise_std must be an ascending range above 0, not {self.noise_std}")
        if self.embodiment not in EMBODIMENTS:
            raise unknown("embodiment", self.embodiment, EMBODIMENTS)
        for group in self.frozen:
            if group not in GROUPS:
                raise unknown("parameter group", group, GROUPS)
        self.sampler()

    def sampler(self) -> FlowSamplerConfig:
        """The sampler's part."""
        return FlowSamplerConfig(self.denoise_steps, self.method, self.noise_level, self.joint, self.joint_reduction)

    @property
    def published(self) -> bool:
        """The sizes are published ones: trained from a checkpoint, not from random weights."""
        return self.network == GR00T_N1_5

    def build(
        self, observation_spec: ObservationSpec, action_spec: ActionSpec, tokenizer: Tokenizer | None = None
    ) -> Gr00tPolicy:
        """The policy for a simulator with these specs; `tokenizer` replaces the one of the folder. Raises `SpecError`
        when it cannot serve them and `UserError` when the checkpoint does not fit."""
        from embodied_rl.policies.gr00t.policy import Gr00tPolicy

        return Gr00tPolicy(self, observation_spec, action_spec, tokenizer)

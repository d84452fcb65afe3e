"""Configurations of the OpenVLA policies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from embodied_rl.errors import UserError, unknown
from embodied_rl.policies.openvla.architecture import SIZES, Architecture
from embodied_rl.policies.openvla.preprocessing import Resize
from embodied_rl.policies.openvla.prompts import Template, Tokenize
from embodied_rl.policies.openvla.tokens import Vocabulary
from embodied_rl.policies.vla import VLAConfig
from embodied_rl.specs import ActionSpec, ObservationSpec, pick_state

if TYPE_CHECKING:
    from embodied_rl.policies.openvla.checkpoint import Checkpoint
    from embodied_rl.policies.openvla.policy import OpenVLAPolicy

GROUPS = ("vision", "projector", "language", "heads", "value")
PUBLISHED = tuple(SIZES)


@dataclass(frozen=True)
class OpenVLAConfig(VLAConfig):
    """OpenVLA: one action per decision, its dimensions decoded one token after the other."""

    size: str = "openvla-7b"
    """Without a checkpoint: a name in `architecture.SIZES`."""
    unnorm_key: str | None = None
    """Dataset whose statistics scale the actions; none takes the only one."""
    cameras: tuple[str, ...] = ("primary",)
    """Views that the network sees, in order, by the simulator's names or others for the same view."""
    resize: Resize = "processor"
    """"processor": the checkpoint's own bicubic resizing. "lanczos", "jpeg_lanczos": TensorFlow's before it, the latter
    after a JPEG round trip, as the published evaluation in LIBERO has it."""
    center_crop: bool = False
    """See only the central 90 % of the image: for checkpoints fine-tuned with random crops."""
    prompt: Template = "openvla"
    """"openvla_v01" for the oldest checkpoints."""
    empty_token: int = 29871
    """The lone-space token that ends a prompt."""
    vocabulary: Vocabulary = "actions"
    """What a token is drawn from and scored over: the 256 action tokens, or all, as the published greedy decoding and
    SimpleVLA-RL's autoregressive log-probs have it. "actions" computes only these logits."""
    temperature: float = 1.0
    """Of drawing and scoring; a deterministic act takes the likeliest token."""
    top_k: int = 0
    """Draw from and score over the k likeliest tokens only; 0 = all."""
    value_head: bool = True
    """V from the hidden state at the prompt's last token; not needed without a critic (GRPO)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the network. Log-probs, entropies and values are float32 in either."""
    frozen: tuple[str, ...] = ()
    """Groups that are not trained: vision, projector, language, heads, value."""

    groups = GROUPS

    def __post_init__(self) -> None:
        if not self.checkpoint and self.size not in SIZES:
            raise unknown("OpenVLA size", self.size, SIZES)
        super().__post_init__()
        if not self.temperature > 0 or self.top_k < 0:
            raise UserError(
                f"{self.name}: needs temperature > 0 and top_k >= 0, got {self.temperature} and {self.top_k}"
            )
        if not self.cameras:
            raise UserError(f"{self.name} sees through at least one camera; name it in cameras")

    @property
    def name(self) -> str:
        return "openvla"

    @property
    def convention(self) -> str:
        """Of the statistics, a name in `normalization.CONVENTIONS`."""
        return "openvla"

    @property
    def executed(self) -> int:
        """K."""
        return 1

    @property
    def published(self) -> bool:
        """The sizes are published ones: trained from a checkpoint, not from random weights."""
        return bool(self.checkpoint) or self.size in PUBLISHED

    def build(
        self, observation_spec: ObservationSpec, action_spec: ActionSpec, tokenize: Tokenize | None = None
    ) -> OpenVLAPolicy:
        """The policy for a simulator with these specs; `tokenize` replaces the checkpoint's tokenizer. Raises
        `SpecError` when it cannot serve them and `UserError` when the checkpoint is not what it should be."""
        from embodied_rl.policies.openvla.autoregressive import AutoregressivePolicy

        checkpoint, architecture = self._source(observation_spec.state, action_spec.dim)
        if architecture.regression or architecture.film or architecture.proprio_dim or architecture.horizon > 1:
            raise UserError(f"{self.checkpoint or self.size} is OpenVLA-OFT: use policy openvla_oft")
        return AutoregressivePolicy(self, architecture, checkpoint, observation_spec, action_spec, tokenize)

    def _source(self, state: int, action: int) -> tuple[Checkpoint | None, Architecture]:
        """A network that comes from no folder takes as many states and actions as there are."""
        if not self.checkpoint:
            sizes = SIZES[self.size]
            return None, replace(sizes, action_dim=action, proprio_dim=state if sizes.proprio_dim else 0)
        from embodied_rl.policies.openvla.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(self.checkpoint, self.unnorm_key)
        return checkpoint, checkpoint.architecture


@dataclass(frozen=True)
class OpenVLAOFTConfig(OpenVLAConfig):
    """OpenVLA-OFT: a chunk of actions decoded at once, as tokens or by the L1 regression head that a checkpoint has.
    What a folder does not record has to be given: horizon, normalization, cameras, stop_token."""

    size: str = "openvla-oft-7b-discrete"
    """Without a checkpoint: a name in `architecture.SIZES`."""
    state: tuple[str, ...] = ()
    """Names of the simulator's state that a network with proprioception sees, in its order; "hand" means all of
    "hand.0", "hand.1", ...; () = the whole state."""
    horizon: int = 8
    """H, actions predicted at once: 8 in LIBERO, 25 in ALOHA."""
    chunk: int | None = None
    """K, executed actions; none = horizon."""
    normalization: Literal["bounds_q99", "bounds"] = "bounds_q99"
    """Statistics that scale actions and state: 1st and 99th percentile, or minimum and maximum (ALOHA)."""
    stop_token: bool = True
    """The sequence ends in a stop token, as OpenVLA-OFT and SimpleVLA-RL have it. RLinf's checkpoints were trained
    without: False. The wrong choice changes about every fourth action."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.executed <= self.horizon:
            raise UserError(f"openvla_oft: needs 1 <= chunk <= horizon, got {self.chunk} and {self.horizon}")

    @property
    def name(self) -> str:
        return "openvla_oft"

    @property
    def convention(self) -> str:
        return f"openvla_oft_{self.normalization}"

    @property
    def executed(self) -> int:
        return self.horizon if self.chunk is None else self.chunk

    def build(
        self, observation_spec: ObservationSpec, action_spec: ActionSpec, tokenize: Tokenize | None = None
    ) -> OpenVLAPolicy:
        from embodied_rl.policies.openvla.parallel import ParallelPolicy, RegressionPolicy

        seen = pick_state(observation_spec, self.state)
        checkpoint, architecture = self._source(seen.state, action_spec.dim)
        architecture = replace(architecture, horizon=self.horizon)
        kind = RegressionPolicy if architecture.regression else ParallelPolicy
        return kind(self, architecture, checkpoint, observation_spec, action_spec, tokenize)

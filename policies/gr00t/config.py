"""The configuration of GR00T N1.5: everything a run can choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from embodied_rl.errors import UserError, unknown
from embodied_rl.policies.flow_vla import FlowVLAConfig
from embodied_rl.policies.gr00t.sizes import GR00T_N1_5, NetworkConfig
from embodied_rl.specs import ActionSpec, ObservationSpec

if TYPE_CHECKING:
    from embodied_rl.policies.gr00t.policy import Gr00tPolicy
    from embodied_rl.policies.gr00t.preprocessing import Tokenizer

EMBODIMENTS = {"oxe_droid": 17, "gr1": 24, "agibot_genie1": 26, "new_embodiment": 31}
"""Which of the embodiments' weights each tag of the release uses."""
GROUPS = ("vision", "language", "heads", "value")
"""Of parameters: SigLIP with its projector; Qwen3; action head and noise head; value head."""


@dataclass(frozen=True)
class Gr00tConfig(FlowVLAConfig):
    """GR00T N1.5. Checkpoints are in NVIDIA's layout, the tokenizer is that of the backbone (eagle2_hg_model there)."""

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
    horizon: int = 16
    chunk: int = 8

    groups = GROUPS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.crop <= 1:
            raise UserError(f"gr00t: needs crop above 0, at most 1, not {self.crop}")
        if self.horizon > self.network.head.positions:
            raise UserError(f"gr00t: needs horizon <= {self.network.head.positions}, got {self.horizon}")
        if self.embodiment not in EMBODIMENTS:
            raise unknown("embodiment", self.embodiment, EMBODIMENTS)

    @property
    def name(self) -> str:
        return "gr00t"

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

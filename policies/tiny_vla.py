"""A small π₀ that a laptop trains: the code of the published sizes, a simulator's own cameras, a tokenizer that comes
along."""

from __future__ import annotations

import filecmp
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import embodied_rl
from embodied_rl.policies.mlp import Activation
from embodied_rl.policies.pi0.config import CAMERAS, Pi0Config
from embodied_rl.policies.pi0.gemma import GemmaConfig
from embodied_rl.policies.pi0.network import NetworkConfig
from embodied_rl.policies.pi0.siglip import SiglipConfig
from embodied_rl.specs import ActionSpec, ObservationSpec, pick_state

if TYPE_CHECKING:
    from embodied_rl.policies.pi0.policy import Pi0Policy
    from embodied_rl.policies.pi0.preprocessing import Tokenizer

TOKENIZER = Path(embodied_rl.__file__).parent / "assets" / "tokenizer"
"""Made by scripts/make_tokenizer.py."""
TINY = NetworkConfig(
    SiglipConfig(width=128, depth=2, heads=4, mlp=256, patch=16, image=64),
    GemmaConfig(width=128, depth=4, mlp=256, heads=4, kv_heads=1, head_dim=32),
    GemmaConfig(width=96, depth=4, mlp=256, heads=4, kv_heads=1, head_dim=32),
    vocabulary=1024,
    action_dim=1,
    adaptive=False,
)


@dataclass(frozen=True)
class TinyVLAConfig(Pi0Config):
    """π₀ with 1.6 M parameters, trained from nothing: all groups learn; the cameras are the simulator's first three."""

    network: NetworkConfig = TINY
    """Sizes; action_dim grows to what the simulator's state and actions need."""
    prompt_length: int = 24
    horizon: int = 8
    chunk: int = 4
    value_hidden: tuple[int, ...] = (256, 128)
    value_activation: Activation = "tanh"
    frozen: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "tiny_vla"

    def build(
        self, observation_spec: ObservationSpec, action_spec: ActionSpec, tokenizer: Tokenizer | None = None
    ) -> Pi0Policy:
        """As `Pi0Config.build`, for any simulator with a camera and continuous actions."""
        seen = pick_state(observation_spec, self.state)
        dim = max(self.network.action_dim, seen.state, action_spec.dim)
        fitted = replace(
            self,
            network=replace(self.network, action_dim=dim),
            cameras=self.cameras or dict(zip(CAMERAS, observation_spec.cameras, strict=False)),
            tokenizer=self.tokenizer or ("" if self.checkpoint else str(TOKENIZER)),
        )
        tokenizer = tokenizer or read_tokenizer(Path(fitted.tokenizer or fitted.checkpoint))
        policy = Pi0Config.build(fitted, observation_spec, action_spec, tokenizer)
        if not self.checkpoint:
            # π₀'s own start is a sixth of this: beside what the patches show it is lost, and places are learned late
            policy.network.vision.embeddings.position_embedding.weight.data.normal_(std=0.5)
        return policy


class Pieces:
    """A tokenizer.json with a token <bos>. transformers gives the same ids, after seconds of imports."""

    def __init__(self, file: Path) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self.bos_token_id = self._tokenizer.token_to_id("<bos>")

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`."""
        return self._tokenizer.decode(ids)


def read_tokenizer(folder: Path) -> Pieces | None:
    """Ours, when it is what `folder` holds; another one is left to transformers."""
    theirs, ours = folder / "tokenizer.json", TOKENIZER / "tokenizer.json"
    return Pieces(ours) if theirs.is_file() and filecmp.cmp(theirs, ours, shallow=False) else None

"""A policy that acts in tokens: every dimension of every action of the chunk is one of a few bins, all chosen at once
from the state, as OpenVLA-OFT's discrete head does from images (arXiv 2502.19645). Instead of actions the tokens may be
the frequencies of a chunk, as FAST's are (arXiv 2501.09747): then one token moves the whole chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from embodied_rl.errors import UserError
from embodied_rl.policies.base import Inputs
from embodied_rl.policies.mlp import ActionScale, Activation, StateNormaliser, mlp, state_spec
from embodied_rl.policies.openvla.tokens import TokenDistribution
from embodied_rl.policies.state_policy import StatePolicy
from embodied_rl.policies.value_head import ValueHead
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ActionSpec, ObservationSpec
from embodied_rl.types import ActionSample, Score


@dataclass(frozen=True)
class TokenMLPConfig:
    """The token policy of states."""

    state: tuple[str, ...] = ()
    """Names of the simulator's state that the policy sees, in its order; "hand" means all of "hand.0", "hand.1", ...;
    () = the whole state."""
    horizon: int = 4
    """H, predicted actions."""
    chunk: int = 4
    """K, executed actions."""
    bins: int = 33
    """Tokens of an action dimension, evenly from its lowest to its highest value; an odd number has the middle, too."""
    frequencies: int | None = None
    """The tokens are so many of the lowest frequencies (discrete cosine transform) of each dimension over the chunk,
    the first of which is its mean, and not the actions one by one; None = the actions."""
    temperature: float = 1.0
    """Logits are divided by it to draw and score tokens, not to imitate; above 0."""
    hidden: tuple[int, ...] = (256, 256, 256)
    """Widths of the logits' MLP."""
    activation: Activation = "silu"
    value_hidden: tuple[int, ...] = (256, 256)
    """Widths of the value head."""
    value_activation: Activation = "tanh"

    def __post_init__(self) -> None:
        if not 1 <= self.chunk <= self.horizon:
            raise UserError(f"token_mlp: needs 1 <= chunk <= horizon, got {self.chunk} and {self.horizon}")
        if self.frequencies is not None and not 1 <= self.frequencies <= self.chunk == self.horizon:
            raise UserError(
                f"token_mlp: needs 1 <= frequencies <= chunk = horizon, got {self.frequencies}, {self.chunk} and "
                f"{self.horizon}"
            )
        if self.bins < 2 or not self.temperature > 0:
            raise UserError(
                f"token_mlp: needs bins >= 2 and a temperature above 0, got {self.bins} and {self.temperature}"
            )

    def build(self, observation_spec: ObservationSpec, action_spec: ActionSpec) -> TokenMLP:
        """The policy for a simulator with these specs; raises `SpecError` when it cannot serve them."""
        return TokenMLP(self, observation_spec, action_spec)


class TokenMLP(StatePolicy):
    """softmax(MLP(normalised state) / temperature) over the bins of each action dimension, L = K*A terms, or F*A with F
    frequencies. The trace: "tokens" int64 [B,L], "temperature" [B]."""

    basis: Tensor | None
    """[F,K], the shapes over the chunk that are added up; None = single actions."""

    def __init__(self, config: TokenMLPConfig, observation_spec: ObservationSpec, action_spec: ActionSpec) -> None:
        super().__init__()
        self.observation_spec = state_spec("token_mlp", observation_spec, config.state)
        self.action_spec = action_spec
        self.horizon, self.chunk = config.horizon, config.chunk
        self.bins = config.bins
        self.distribution = TokenDistribution(first=0, temperature=config.temperature)
        basis = None if config.frequencies is None else cosines(config.horizon)[: config.frequencies]
        self.register_buffer("basis", basis, persistent=False)  # known from the config
        self._tokens = config.horizon if basis is None else len(basis)
        """Of each action dimension."""
        size, outputs = self.observation_spec.state, self._tokens * action_spec.dim * config.bins
        self.normaliser = StateNormaliser(size)
        self.action_scale = ActionScale(action_spec)
        self.network = mlp(size, config.hidden, config.activation, outputs)
        self.value_head = ValueHead(size, config.value_hidden, config.value_activation)

    @torch.no_grad()
    def act(self, inputs: Inputs, deterministic: bool = False, noise: RowNoise | None = None) -> ActionSample:
        """A deterministic sample takes the likeliest bin of each dimension."""
        logits = self._executed(inputs)
        if deterministic:
            return ActionSample(self.actions(self.distribution.likeliest(logits)), {})
        rows, terms = logits.shape[:2]
        drawn = torch.rand(rows, terms) if noise is None else torch.from_numpy(noise.uniform(terms))
        trace, log_prob = self.distribution.draw(logits, drawn.to(logits))
        return ActionSample(self.actions(trace["tokens"]), trace, log_prob)

    def evaluate_actions(self, inputs: Inputs, trace: dict[str, Tensor]) -> Score:
        log_prob, entropy = self.distribution.score(self._executed(inputs), trace)
        if self.basis is None:
            term_step = torch.arange(self.chunk).repeat_interleave(self.action_spec.dim)
        else:
            term_step = torch.full(log_prob.shape[1:], -1)  # each moves the whole chunk
        return Score(log_prob, entropy, term_step.to(log_prob.device))

    def value(self, inputs: Inputs) -> Tensor:
        return self.value_head(self.features(inputs))

    def imitation_loss(self, inputs: Inputs, actions: Tensor, valid: Tensor) -> Tensor:
        """[B], the mean cross entropy of the valid steps' tokens. For frequencies the last valid action is held until
        the end of the chunk."""
        actions = torch.where(valid[..., None], actions, 0.0)
        if self.basis is None:
            keep = valid.repeat_interleave(actions.shape[-1], 1)
        else:
            last = (valid.sum(1) - 1).clamp_min(0)
            actions = torch.where(valid[..., None], actions, actions[torch.arange(len(last)), last][:, None])
            keep = valid.any(1, keepdim=True)
        tokens = self.tokens(actions)
        loss = F.cross_entropy(self.logits(inputs).transpose(1, 2), tokens, reduction="none")
        keep = keep.expand_as(loss)
        return torch.where(keep, loss, 0.0).sum(1) / keep.sum(1).clamp_min(1)

    def logits(self, inputs: Inputs) -> Tensor:
        """[B,H*A,bins], or [B,F*A,bins]."""
        return self.network(self.features(inputs)).unflatten(1, (-1, self.bins))

    def tokens(self, actions: Tensor) -> Tensor:
        """The bins [B,*A] nearest to simulator actions [B,*,A], or [B,F*A] nearest to the frequencies of chunks."""
        x = self.action_scale.to_network(actions).clamp(-1, 1)
        if self.basis is not None:
            x = torch.einsum("fk,bka->bfa", self.basis / self._reach(), x)
        return ((x + 1) / 2 * (self.bins - 1)).round().long().flatten(1)

    def actions(self, tokens: Tensor) -> Tensor:
        """Simulator actions [B,*,A] of bins [B,*A], or of the F*A of chunks' frequencies."""
        x = (tokens.float() * (2 / (self.bins - 1)) - 1).unflatten(1, (-1, self.action_spec.dim))
        if self.basis is not None:
            x = torch.einsum("fk,bfa->bka", self.basis * self._reach(), x)
        return self.action_scale.to_simulator(x)

    def trace(self, actions: Tensor) -> dict[str, Tensor]:
        """What `evaluate_actions` scores `actions` [B,K,A] of any origin by."""
        tokens = self.tokens(actions)
        return {
            "tokens": tokens,
            "temperature": torch.full_like(tokens[:, 0], self.distribution.temperature, dtype=torch.float32),
        }

    def _executed(self, inputs: Inputs) -> Tensor:
        """Logits of the executed actions, [B,K*A,bins]; of frequencies all, [B,F*A,bins]."""
        return self.logits(inputs)[:, : min(self.chunk, self._tokens) * self.action_spec.dim]

    def _reach(self) -> Tensor:
        """[F,1], the largest value that a frequency of actions in [-1, 1] can have."""
        assert self.basis is not None
        return self.basis.abs().sum(1, keepdim=True)


def cosines(steps: int) -> Tensor:
    """[K,K], the orthonormal discrete cosine transform (DCT-II): row f is the shape of frequency f over K steps."""
    step = torch.arange(steps) + 0.5
    rows = torch.cos(math.pi / steps * torch.arange(steps)[:, None] * step)
    return rows / rows.norm(dim=1, keepdim=True)

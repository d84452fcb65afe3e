"""Acting in tokens: drawing, scoring and imitating them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from embodied_rl.policies.base import Inputs
from embodied_rl.policies.openvla.policy import OpenVLAPolicy
from embodied_rl.policies.openvla.tokens import ACTION_TOKENS, TokenDistribution, decode, encode
from embodied_rl.randomness import RowNoise
from embodied_rl.types import Score


class TokenPolicy(OpenVLAPolicy):
    """One token per action dimension and one log-prob term per token, L = K*A. The trace: "tokens" int64 [B,L],
    "temperature" [B], and with top_k "candidates" int32 [B,L,k]."""

    @property
    def distribution(self) -> TokenDistribution:
        """Of the config's vocabulary, temperature and top_k."""
        first = self.architecture.vocabulary - ACTION_TOKENS if self._actions_only else 0
        return TokenDistribution(first, self.config.temperature, self.config.top_k)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [...,C] over the config's vocabulary."""
        return self.network.logits(hidden, self._actions_only)

    def evaluate_actions(self, inputs: Inputs, trace: dict[str, Tensor]) -> Score:
        hidden = self.hidden(inputs, trace["tokens"])
        log_prob, entropy = self.distribution.score(self.logits(hidden), trace)
        step = torch.arange(self.chunk, device=log_prob.device).repeat_interleave(self.action_spec.dim)
        return Score(log_prob, entropy, step, value=self._value(hidden))

    def imitation_loss(self, inputs: Inputs, actions: Tensor, valid: Tensor) -> Tensor:
        """[B], the mean cross entropy of the valid steps' tokens over the config's vocabulary, at temperature 1."""
        tokens = self.tokens(torch.where(valid[..., None], actions, 0.0))
        logits = self.logits(self.hidden(inputs, tokens))
        loss = F.cross_entropy(logits.transpose(1, 2), tokens - self.distribution.first, reduction="none")
        weight = valid.repeat_interleave(actions.shape[-1], 1)
        return torch.where(weight, loss, 0.0).sum(1) / weight.sum(1).clamp_min(1)

    def tokens(self, actions: Tensor) -> Tensor:
        """Simulator actions [B,H,A] as token ids [B,H*A]."""
        return encode(self.action_normaliser.normalise(actions), self.architecture.vocabulary).flatten(1)

    def actions(self, tokens: Tensor) -> Tensor:
        """Token ids [B,K*A] as executable actions [B,K,A]."""
        normalised = decode(tokens, self.architecture.vocabulary)
        return self.to_simulator(normalised.unflatten(1, (-1, self.action_spec.dim)))

    def _uniform(self, rows: int, terms: int, noise: RowNoise | None) -> Tensor:
        if noise is None:
            return torch.rand(rows, terms, device=self.device)
        return torch.from_numpy(noise.uniform(terms)).to(self.device)

    @property
    def _actions_only(self) -> bool:
        return self.config.vocabulary == "actions"

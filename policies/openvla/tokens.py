"""Actions as tokens, and the distribution over them that is sampled and scored.

Action tokens are ids V - 256 .. V - 1, V being the tokenizer's vocabulary; a higher id is a lower action.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

ACTION_TOKENS = 256
EDGES = np.linspace(-1.0, 1.0, ACTION_TOKENS)
CENTRES = (EDGES[:-1] + EDGES[1:]) / 2
"""255 of them: ids V - 256 and V - 255 both mean the last."""

Vocabulary = Literal["actions", "all"]


def decode(tokens: Tensor, vocabulary: int) -> Tensor:
    """Normalised actions float64 in (-1, 1) of token ids; an id that is no action token means the nearest one."""
    index = (vocabulary - tokens - 1).clamp(0, len(CENTRES) - 1)
    return torch.from_numpy(CENTRES).to(tokens.device)[index]


def encode(actions: Tensor, vocabulary: int) -> Tensor:
    """Token ids int64 of normalised actions, which are clipped to [-1, 1]."""
    edges = torch.from_numpy(EDGES).to(actions.device)
    return vocabulary - torch.bucketize(actions.double().clamp(-1, 1), edges, right=True)


@dataclass(frozen=True)
class TokenDistribution:
    """softmax(logits / temperature) over the C tokens that the logits are of, or over the `top_k` likeliest of them.

    The trace keeps the temperature and which tokens the top k were, so that a score never depends on a setting that
    changed since, and a token that was drawn never loses its probability.
    """

    first: int
    """Token id of the first logit."""
    temperature: float = 1.0
    top_k: int = 0
    """0 = all."""

    def draw(self, logits: Tensor, uniform: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(trace, log-prob [B,L]) of tokens drawn from `logits` float32 [B,L,C] with `uniform` [B,L] in [0, 1)."""
        trace = {"temperature": torch.full_like(logits[:, 0, 0], self.temperature)}
        logits = logits / self.temperature
        if self.top_k:
            logits, kept = logits.topk(min(self.top_k, logits.shape[-1]))
            trace["candidates"] = kept.to(torch.int32)
            index = choose(logits, uniform)
            trace["tokens"] = kept.gather(-1, index[..., None])[..., 0] + self.first
        else:
            index = choose(logits, uniform)
            trace["tokens"] = index + self.first
        return trace, logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]

    def score(self, logits: Tensor, trace: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(log-prob, entropy), both float32 [B,L], of the trace's tokens; differentiable."""
        logits = logits / trace["temperature"][:, None, None]
        index = (trace["tokens"] - self.first)[..., None]
        if "candidates" in trace:
            kept = trace["candidates"].long()
            logits = logits.gather(-1, kept)
            index = (kept == index).to(torch.uint8).argmax(-1, keepdim=True)
        log_probs = logits.log_softmax(-1)
        return log_probs.gather(-1, index)[..., 0], -(log_probs.exp() * log_probs).sum(-1)

    def likeliest(self, logits: Tensor) -> Tensor:
        """Token ids [B,L]."""
        return logits.argmax(-1) + self.first


def choose(logits: Tensor, uniform: Tensor) -> Tensor:
    """Indices [...] drawn from softmax(`logits` [...,C]) by inverting its distribution function at `uniform` [...] in
    [0, 1): one number per token, whatever the size of the vocabulary."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    point = uniform.double()[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, point, right=True)[..., 0].clamp_max(logits.shape[-1] - 1)

"""OpenVLA: an action's dimensions are decoded one after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import StaticCache

from embodied_rl.policies.base import Inputs
from embodied_rl.policies.openvla.config import OpenVLAConfig
from embodied_rl.policies.openvla.token_policy import TokenPolicy
from embodied_rl.randomness import RowNoise
from embodied_rl.types import ActionSample


class AutoregressivePolicy(TokenPolicy):
    """H = K = 1. Acting fills a cache of keys and values token by token; scoring sees all tokens in one pass."""

    config_class = OpenVLAConfig

    @torch.no_grad()
    def act(self, inputs: Inputs, deterministic: bool = False, noise: RowNoise | None = None) -> ActionSample:
        network, distribution, terms = self.network, self.distribution, self.action_spec.dim
        embeddings, valid = self.prefix(inputs)
        rows, length = valid.shape
        valid = F.pad(valid, (0, terms - 1), value=True)
        cache = StaticCache(config=network.language_model.config, max_cache_len=valid.shape[1])
        uniform = self._uniform(rows, terms, None if deterministic else noise)
        tokens: list[Tensor] = []
        traces: list[dict[str, Tensor]] = []
        log_probs: list[Tensor] = []
        with network.caching():
            hidden = network.hidden(embeddings, valid, causal=True, read=slice(-1, None), cache=cache)
            value = self._value(hidden)
            while True:
                logits = self.logits(hidden)
                if deterministic:
                    tokens.append(distribution.likeliest(logits))
                else:
                    trace, log_prob = distribution.draw(logits, uniform[:, len(tokens), None])
                    tokens.append(trace["tokens"])
                    traces.append(trace)
                    log_probs.append(log_prob)
                if len(tokens) == terms:
                    break
                first = length + len(tokens) - 1
                hidden = network.hidden(network.embed(tokens[-1]), valid, causal=True, cache=cache, first=first)
        actions = self.actions(torch.cat(tokens, 1))
        if deterministic:
            return ActionSample(actions, {}, None, value)
        trace = {name: torch.cat([step[name] for step in traces], 1) for name in traces[0] if name != "temperature"}
        return ActionSample(actions, trace | {"temperature": traces[0]["temperature"]}, torch.cat(log_probs, 1), value)

    def hidden(self, inputs: Inputs, tokens: Tensor | None = None) -> Tensor:
        embeddings, valid = self.prefix(inputs)
        length = valid.shape[1]
        if tokens is not None:
            embeddings = torch.cat([embeddings, self.network.embed(tokens[:, :-1])], 1)
            valid = F.pad(valid, (0, embeddings.shape[1] - length), value=True)
        return self.network.hidden(embeddings, valid, causal=True, read=slice(length - 1, None))

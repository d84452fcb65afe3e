"""OpenVLA-OFT: all dimensions of all H actions are decoded at once, every position seeing every other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from embodied_rl.policies.base import Inputs
from embodied_rl.policies.openvla.config import OpenVLAOFTConfig
from embodied_rl.policies.openvla.network import STOP
from embodied_rl.policies.openvla.policy import OpenVLAPolicy
from embodied_rl.policies.openvla.token_policy import TokenPolicy
from embodied_rl.randomness import RowNoise
from embodied_rl.types import ActionSample, Score


def parallel_hidden(policy: OpenVLAPolicy, inputs: Inputs, count: int | None = None) -> Tensor:
    """[B,L,hidden], the first L = `count` (None: all) of H*A. Action positions hold zeros, and what belongs to one is
    read a position earlier, as trained; so the first is the prompt's last token, and nothing here depends on which
    actions are chosen."""
    assert isinstance(policy.config, OpenVLAOFTConfig)
    network, stop = policy.network, policy.config.stop_token
    embeddings, valid = policy.prefix(inputs, stop)
    rows, length, width = embeddings.shape
    terms = policy.horizon * policy.architecture.action_dim
    parts = [embeddings, embeddings.new_zeros(rows, terms, width)]
    if stop:
        parts.append(network.embed(torch.full((rows, 1), STOP, device=embeddings.device)))
    valid = F.pad(valid, (0, terms + stop), value=True)
    read = slice(length - 1, length - 1 + (terms if count is None else count))
    return network.hidden(torch.cat(parts, 1), valid, causal=False, read=read)


class ParallelPolicy(TokenPolicy):
    """Discrete tokens, one forward pass for a chunk. Only the K executed actions' tokens are drawn and scored."""

    @torch.no_grad()
    def act(self, inputs: Inputs, deterministic: bool = False, noise: RowNoise | None = None) -> ActionSample:
        terms = self.chunk * self.action_spec.dim
        hidden = parallel_hidden(self, inputs, terms)
        logits, distribution = self.logits(hidden), self.distribution
        if deterministic:
            return ActionSample(self.actions(distribution.likeliest(logits)), {}, None, self._value(hidden))
        trace, log_prob = distribution.draw(logits, self._uniform(len(hidden), terms, noise))
        return ActionSample(self.actions(trace["tokens"]), trace, log_prob, self._value(hidden))

    def hidden(self, inputs: Inputs, tokens: Tensor | None = None) -> Tensor:
        return parallel_hidden(self, inputs, 1 if tokens is None else tokens.shape[1])


class RegressionPolicy(OpenVLAPolicy):
    """The L1 head: deterministic, hence without log-probs. For imitation, and for off-policy methods by `sample`."""

    @torch.no_grad()
    def act(self, inputs: Inputs, deterministic: bool = False, noise: RowNoise | None = None) -> ActionSample:
        hidden = self.hidden(inputs)
        actions = self.to_simulator(self.network.action_head(hidden)[:, : self.chunk])
        return ActionSample(actions, {}, None, self._value(hidden))

    def evaluate_actions(self, inputs: Inputs, trace: dict[str, Tensor]) -> Score:
        raise TypeError("an L1 regression head gives actions no probability; use a checkpoint with discrete tokens")

    def hidden(self, inputs: Inputs, tokens: Tensor | None = None) -> Tensor:
        return parallel_hidden(self, inputs)

    def sample(self, inputs: Inputs) -> Tensor:
        """Actions [B,H,A], differentiable within the bounds; the gripper's is not rounded."""
        return self._bounded(self.action_normaliser.unnormalise(self.network.action_head(self.hidden(inputs))))

    def imitation_loss(self, inputs: Inputs, actions: Tensor, valid: Tensor) -> Tensor:
        """[B], the mean absolute error of the valid steps' normalised actions."""
        keep = valid[..., None]
        target = self.action_normaliser.normalise(torch.where(keep, actions, 0.0)).float()
        error = (self.network.action_head(self.hidden(inputs)).float() - target).abs()
        return torch.where(keep, error, 0.0).sum((1, 2)) / (valid.sum(1) * actions.shape[-1]).clamp_min(1)

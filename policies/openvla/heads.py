"""The small parts between and behind the two backbones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embodied_rl.policies.value_head import ValueHead


class Projector(nn.Module):
    """Patch features to the language model's width."""

    def __init__(self, vision: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision, 4 * vision)
        self.fc2 = nn.Linear(4 * vision, hidden)
        self.fc3 = nn.Linear(hidden, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """[...,vision] -> [...,hidden]."""
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))


class ProprioProjector(nn.Module):
    """The normalised state as one token."""

    def __init__(self, state: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(state, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, state: Tensor) -> Tensor:
        """[B,S] -> [B,hidden]."""
        return self.fc2(F.gelu(self.fc1(state)))


class ResidualBlock(nn.Module):
    """x + ReLU(Linear(LayerNorm(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class ResidualMLP(nn.Module):
    """Of the regression head; two residual blocks."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, hidden)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(hidden) for _ in range(2))
        self.layer_norm2 = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class RegressionHead(nn.Module):
    """Normalised actions from the hidden states of their A positions each."""

    def __init__(self, hidden: int, action_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.model = ResidualMLP(action_dim * hidden, hidden, action_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B,H*A,hidden] -> [B,H,A]."""
        return self.model(hidden.unflatten(1, (-1, self.action_dim)).flatten(2))


def token_value_head(hidden: int, layers: tuple[int, ...] = (512, 128)) -> ValueHead:
    """RLinf's (arXiv 2510.06710): GELU, Kaiming weights by fan-out, and a last layer without bias."""
    head = ValueHead(hidden, layers, "gelu")
    *body, last = (layer for layer in head.network if isinstance(layer, nn.Linear))
    for layer in body:
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    last.register_parameter("bias", None)
    return head

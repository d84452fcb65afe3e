"""The value head of a policy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from embodied_rl.policies.mlp import Activation, mlp


class ValueHead(nn.Module):
    """An MLP from a description of the observation [B,F] to V [B].

    A policy feeds it nothing that its own sampling touches (noise, denoise step), so that rollout and training see the
    same function. Hidden layers start with Kaiming weights, the last with N(0, `last_std`) and bias 0: values start
    near 0.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int] = (512, 256, 128),
        activation: Activation = "relu",
        last_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.network = mlp(inputs, hidden, activation, 1)
        *body, last = (layer for layer in self.network if isinstance(layer, nn.Linear))
        for layer in body:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="tanh" if activation == "tanh" else "relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(last.weight, std=last_std)
        nn.init.zeros_(last.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B,F] -> [B]."""
        return self.network(features)[:, 0]

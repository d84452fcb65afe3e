"""Sim-real co-training (arXiv 2602.12628): a policy that learns from rewards in a simulator goes on imitating a second
dataset, say of the robot it is meant for.

    loss of the actor = loss of the algorithm + beta * imitation loss on a batch of the second dataset

both differentiated before one step of the actor's optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.algorithms.imitation import mean_imitation_loss, take
from embodied_rl.algorithms.optimization import seed_policy_draws


class CoTraining:
    """The second dataset and its weight.

    Batch and noise of an update are functions of (seed, update), and torch's generators are left as they were: the
    algorithm draws the numbers that it draws without co-training, and nothing has to be saved to resume.
    """

    def __init__(self, policy: Any, data: dict[str, Any], beta: float, batch_size: int, seed: int) -> None:
        """`data`: chunks {"inputs", "actions" [M,H,A], "valid" bool [M,H]} on the policy's device."""
        self.policy = policy
        self.data = data
        self.beta = beta
        self.batch_size = batch_size
        self.seed = seed

    def losses(self, update: int, rows: int | None = None, rank: int = 0, ranks: int = 1) -> Iterator[Tensor]:
        """beta * mean imitation loss [] of the batch of `update`, in parts of at most `rows` rows that add up to it;
        nothing when beta is 0. Of `ranks` processes each gets every `ranks`-th part, whose noise does not depend on who
        has it, and all get equally many: who would have one less gets one that counts for nothing."""
        if not self.beta:
            return
        device = self.policy.device
        entropy = np.random.SeedSequence([self.seed, update]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0]))
        drawn = torch.randint(len(self.data["actions"]), (self.batch_size,), generator=generator).to(device)
        counted = self.data["valid"][drawn].any(1).sum().clamp(min=1)
        parts = drawn.split(rows or self.batch_size)

        def loss(index: Tensor) -> Tensor:
            part = take(self.data, index)
            mean = mean_imitation_loss(self.policy, part)
            return self.beta * mean * part["valid"].any(1).sum() / counted

        for number, index in enumerate(parts):
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                seed_policy_draws(generator, device)
                mine = loss(index) if number % ranks == rank else None
            if mine is not None:
                yield mine
        if 0 < len(parts) % ranks <= rank:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                nothing = 0.0 * loss(drawn[:1])
            yield nothing

    def loss(self, update: int) -> Tensor:
        """beta * mean imitation loss [] of the batch of `update`; 0 when beta is 0."""
        return sum(self.losses(update), torch.zeros((), device=self.policy.device))

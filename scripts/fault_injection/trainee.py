"""The command line `embodied-rl`, which besides writes down what every batch that it learns from consists of.

FAULTS_LEARNED names the file: a line per batch with its number, the version of the weights that collected it, a digest,
{ticket: decisions} and {ticket: length of the episode that ended}.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from embodied_rl import cli
from embodied_rl.algorithms.grpo import GRPO
from embodied_rl.algorithms.ppo import PPO


def main() -> int:
    path = Path(os.environ["FAULTS_LEARNED"])
    with path.open("a") as file:
        file.write("\n")  # ends a line that a kill cut off
    for algorithm in (PPO, GRPO):
        _observe(algorithm, path)
    return cli.main()


def _observe(algorithm: Any, path: Path) -> None:
    learn = algorithm.learn

    def observed(self: Any, batch: Any, generator: torch.Generator) -> Any:
        number = self.iterations
        metrics = learn(self, batch, generator)
        with path.open("a") as file:
            file.write(json.dumps(_content(batch) | {"number": number}) + "\n")
        return metrics

    algorithm.learn = observed


def _content(batch: Any) -> dict[str, Any]:
    digest = hashlib.sha256()
    for tensor in (batch.tickets, batch.reward, batch.log_prob, *batch.inputs.values()):
        digest.update(tensor.contiguous().numpy().tobytes())
    tickets = batch.tickets[batch.valid.any(-1)]  # of decisions that are learned from
    numbers, counts = tickets.unique(return_counts=True)
    return {
        "version": batch.version,
        "digest": digest.hexdigest(),
        "decisions": dict(zip(numbers.tolist(), counts.tolist(), strict=True)),
        "ended": {episode.ticket: episode.length for episode in batch.episodes},
    }


if __name__ == "__main__":
    sys.exit(main())

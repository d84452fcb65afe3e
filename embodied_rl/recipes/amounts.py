"""How published configurations count, in the words used here."""

from __future__ import annotations

from dataclasses import dataclass

from embodied_rl.config import TrainingConfig


@dataclass(frozen=True)
class Amounts:
    """An iteration of `envs` environments, each of which makes `steps` steps `epochs` times over, in chunks of `chunk`;
    an update takes `batch` decisions of it, `part` at a time (all where it is 0)."""

    envs: int
    epochs: int
    steps: int
    chunk: int
    batch: int
    part: int = 0

    @property
    def decisions(self) -> int:
        """Of an environment per iteration."""
        return self.epochs * -(-self.steps // self.chunk)

    @property
    def minibatches(self) -> int:
        """Per epoch of learning."""
        return max(1, self.envs * self.decisions // self.batch)

    @property
    def microbatch(self) -> int | None:
        """As algorithms call `part`."""
        return self.part or None

    def groups(self, size: int) -> int:
        """Groups of `size` episodes per iteration, when every environment runs one episode per epoch."""
        return self.envs * self.epochs // size

    def training(self, iterations: int = 500) -> TrainingConfig:
        """A budget of at least `iterations`."""
        return TrainingConfig(
            env_steps=iterations * self.envs * self.decisions * self.chunk,
            decisions_per_iteration=self.decisions,
            evaluate_every=20,
            development_episodes=50,
            checkpoint_every=20,
        )

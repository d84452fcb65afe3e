"""Your own VLA, improved by everything here: `PlainVLA` stands for a module that you have, the rest is what you write.

python scripts/add_your_own_policy.py train ppo --policy my_vla --simulator maniskill --simulator.observation rgb
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributions import Normal

from embodied_rl import cli, registry
from embodied_rl.policies.base import Policy
from embodied_rl.types import ActionSample, Score


class PlainVLA(nn.Module):
    """One image [B,3,H,W] in [0, 1], bytes of an instruction [B,T], a state [B,S] -> a description [B,128]."""

    def __init__(self, state: int) -> None:
        super().__init__()
        self.eye = nn.Sequential(nn.Conv2d(3, 16, 8, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.words = nn.EmbeddingBag(256, 32, padding_idx=0)
        self.join = nn.Sequential(nn.Linear(16 * 16 + 32 + state, 128), nn.ReLU())

    def forward(self, image, words, state):
        return self.join(torch.cat([self.eye(image), self.words(words), state], 1))


class MyVLA(Policy):
    """A Gaussian around the module's actions: K executed of K predicted, one log-prob term per number."""

    def __init__(self, config, observation_spec, action_spec) -> None:
        super().__init__()
        self.observation_spec, self.action_spec = observation_spec, action_spec  # what it needs: all there is
        self.camera = next(iter(observation_spec.cameras))
        self.horizon = self.chunk = config.chunk
        self.vla = PlainVLA(observation_spec.state)
        self.head = nn.Linear(128, config.chunk * action_spec.dim)
        self.log_std = nn.Parameter(torch.full((config.chunk, action_spec.dim), -1.0))
        self.value_head = nn.Linear(128, 1)

    def prepare(self, observation):  # once per decision, in the rollout; images stay uint8
        words = [list(text.encode()[:64].ljust(64, b"\0")) for text in observation.texts()]
        image, state = observation.images[self.camera], observation.state
        inputs = {"image": torch.tensor(image), "words": torch.tensor(words), "state": torch.tensor(state)}
        return {name: value.to(self.device) for name, value in inputs.items()}

    def features(self, inputs):
        return self.vla(inputs["image"].permute(0, 3, 1, 2) / 255, inputs["words"], inputs["state"])

    def distribution(self, inputs):
        return Normal(self.head(self.features(inputs)).unflatten(1, (self.chunk, -1)), self.log_std.exp())

    def executed(self, x):
        return x.clamp(x.new_tensor(self.action_spec.low), x.new_tensor(self.action_spec.high))

    @torch.no_grad()
    def act(self, inputs, deterministic=False, noise=None):
        normal, value = self.distribution(inputs), self.value(inputs)
        if deterministic:
            return ActionSample(self.executed(normal.mean), {}, None, value)
        mean = normal.mean  # the noise is the row's own, whatever its batch
        drawn = torch.randn_like(mean) if noise is None else torch.tensor(noise.normal(*mean.shape[1:])).to(mean)
        x = mean + normal.stddev * drawn  # scored as it was drawn, before it is clipped to the bounds
        return ActionSample(self.executed(x), {"x": x}, normal.log_prob(x).flatten(1), value)

    def evaluate_actions(self, inputs, trace):
        normal = self.distribution(inputs)
        step = torch.arange(self.chunk, device=self.device).repeat_interleave(self.action_spec.dim)
        return Score(normal.log_prob(trace["x"]).flatten(1), normal.entropy().flatten(1), step)

    def value(self, inputs):
        return self.value_head(self.features(inputs))[:, 0]

    def imitation_loss(self, inputs, actions, valid):  # per row; steps that are not valid do not count
        mean, keep = self.distribution(inputs).mean, valid[..., None]
        error = torch.where(keep, mean - torch.where(keep, actions, 0.0), 0.0)
        return error.square().sum((1, 2)) / (valid.sum(1) * self.action_spec.dim).clamp_min(1)


@dataclass(frozen=True)
class MyVLAConfig:
    chunk: int = 4
    """K = H, actions of a decision."""

    def build(self, observation_spec, action_spec) -> MyVLA:
        return MyVLA(self, observation_spec, action_spec)


registry.policies.register("my_vla", "add_your_own_policy:MyVLAConfig")

if __name__ == "__main__":
    raise SystemExit(cli.main())

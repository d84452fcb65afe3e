"""A run from Python: take a recipe, change what you like, train. Copy it to start an experiment of your own.

uv run python scripts/train.py
"""

from dataclasses import replace
from pathlib import Path

from embodied_rl.algorithms.flow_actor_critic import FlowActorCriticConfig
from embodied_rl.recipes.quickstart import quickstart
from embodied_rl.training.run import train

if __name__ == "__main__":
    config = replace(quickstart(), seed=1, algorithm=FlowActorCriticConfig(shaping=1.0, q_weight=0.1))
    result = train(config, Path("runs/my-experiment"))
    print(f"{result['initial_success']:.0%} -> {result['final_success']:.0%}")

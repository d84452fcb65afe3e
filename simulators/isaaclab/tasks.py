"""What can be said about Isaac Lab's tasks without importing Isaac Lab."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import embodied_rl
from embodied_rl.errors import UserError
from embodied_rl.simulators import interpreters
from embodied_rl.simulators.base import Listing

ASSETS = Path(embodied_rl.__file__).parent / "assets" / "isaaclab"
"""Our own scenes; they take the place of NVIDIA's asset server for the tasks in `SHIPPED`."""
ASSET_ROOT = "ISAACSIM_ASSET_ROOT"
"""The environment variable from which Isaac Lab learns where its assets are."""


@dataclass(frozen=True)
class Facts:
    """One task whose scene lies in `ASSETS`."""

    instruction: str
    action_dim: int
    max_steps: int
    rewards: tuple[str, ...]
    cameras: tuple[str, ...] = ()


_BALANCE, _REACH = "balance the pole on the cart", "move the hand to the goal pose"
_STACK = "put the red block on the blue block, then the green block on the red block"
_STACK_REWARDS, _STACK_CAMERAS = ("success", "staged"), ("wrist_cam", "table_cam")
SHIPPED = {
    "Isaac-Cartpole": Facts(_BALANCE, 1, 300, ("task",)),
    "Isaac-Cartpole-Camera": Facts(_BALANCE, 1, 300, ("task",), ("tiled_camera",)),
    "Isaac-Cartpole-Camera-Direct": Facts(_BALANCE, 1, 300, ("task",), ("tiled_camera",)),
    "Isaac-Cartpole-Direct": Facts(_BALANCE, 1, 300, ("task",)),
    "Isaac-Reach-Franka": Facts(_REACH, 7, 360, ("task", "success")),
    "Isaac-Reach-Franka-OSC": Facts(_REACH, 13, 360, ("task", "success")),
    "IsaacContrib-Stack-Cube-Franka": Facts(_STACK, 8, 600, _STACK_REWARDS),
    "IsaacContrib-Stack-Cube-Franka-IK-Abs": Facts(_STACK, 8, 600, _STACK_REWARDS),
    "IsaacContrib-Stack-Cube-Franka-IK-Rel": Facts(_STACK, 7, 600, _STACK_REWARDS),
    "IsaacContrib-Stack-Cube-Franka-IK-Rel-Visuomotor": Facts(_STACK, 7, 600, _STACK_REWARDS, _STACK_CAMERAS),
    "IsaacContrib-Stack-Cube-Franka-IK-Rel-Visuomotor-Cosmos": Facts(_STACK, 7, 600, _STACK_REWARDS, _STACK_CAMERAS),
}

PROPRIOCEPTION = re.compile(r"(last_)?actions?|joint_(pos|vel)(_rel)?|eef_(pos|quat)|gripper_pos")
"""Observation terms, by the names that Isaac Lab's tasks use, which a robot knows without looking."""


def instruction(task: str) -> str:
    """The task in words; Isaac Lab's carry no language, so others than ours are their id spelled out."""
    if task in SHIPPED:
        return SHIPPED[task].instruction
    words = re.sub(r"^Isaac(Contrib)?-|-v\d+$", "", task).replace("-", " ")
    return words.lower()


def quaternions(term: str, size: int) -> list[int]:
    """Where quaternions start in an observation term "group.name" of `size` numbers."""
    name = term.rpartition(".")[2]
    if (
        name == "object" and size == 39
    ):  # the stacking tasks: position and orientation of three blocks, then differences
        return [3, 10, 17]
    if ("quat" in name or "orientation" in name) and size % 4 == 0:
        return list(range(0, size, 4))
    if "pose" in name and size % 7 == 0:
        return list(range(3, size, 7))
    return []


def registered() -> list[str]:
    """Every id in the installed Isaac Lab, read from its sources, sorted; ours alone when it is not installed."""
    folders = interpreters.location("isaaclab").glob("lib/python*/site-packages/isaaclab_tasks")
    sources = [path for folder in folders for path in folder.rglob("__init__.py") if "test" not in path.parts]
    found = re.findall(r'\bid="(Isaac[\w-]+)"', "".join(path.read_text() for path in sources))
    return sorted({*SHIPPED, *found})


def listings() -> list[Listing]:
    """See `config.tasks`."""
    try:
        interpreters.interpreter("isaaclab")
        absent = ""
    except UserError as error:
        absent = str(error)
    no_assets = (
        "" if os.environ.get(ASSET_ROOT) else f"needs NVIDIA's assets: set {ASSET_ROOT} to their folder or server"
    )
    lines = []
    for task in registered():
        facts = SHIPPED.get(task)
        known = (facts.cameras, facts.action_dim, facts.max_steps) if facts else (None, None, None)
        rewards = ", ".join(facts.rewards) if facts else "task"
        lines.append(Listing(task, instruction(task), *known, rewards, absent or ("" if facts else no_assets)))
    return lines

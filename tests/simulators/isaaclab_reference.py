"""Run by Isaac Lab's own Python: what its own API does, and our adapter without worker processes, written to a file.

    <isaaclab's python> -P isaaclab_reference.py <folder of embodied_rl> <output.npz> <task> ...

Keys are "<task>|<what>". Tests import this module for the constants only.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

SEEDS = (3, 4, 5)
CHUNK = 4
CARTPOLE, REACH = "Isaac-Cartpole-Direct", "Isaac-Reach-Franka"
STACK = "IsaacContrib-Stack-Cube-Franka-IK-Rel"
LIMIT = {CARTPOLE: 30, REACH: 10, STACK: 10}
"""Steps per episode for our adapter; Isaac Lab's own environment keeps its longer limit."""
REWARD = {STACK: "staged"}


class Seeds:
    """A reset schedule whose tickets are seeds."""

    def state(self, ticket: int) -> Any:
        from embodied_rl.simulators.base import InitialState

        return InitialState(task=0, seed=ticket)


def actions(task: str) -> np.ndarray:
    """float32 [3,T,A]; the last row pushes one way only, which drives a cart off its rail."""
    steps = LIMIT[task] + CHUNK - LIMIT[task] % CHUNK
    dim = 1 if task == CARTPOLE else 7
    drawn = np.random.default_rng(1).uniform(-1, 1, (len(SEEDS), steps, dim)).astype(np.float32)
    drawn[2] = 1.0
    return drawn


def play(simulator: Any, task: str) -> dict[str, np.ndarray]:
    """All that chunks of `actions` do to episodes of `SEEDS`, and to those that follow them."""
    first = simulator.reset(tickets=np.array(SEEDS)).copy()
    record: dict[str, list[np.ndarray]] = {"state": [first.state[:, None]]}
    todo = actions(task)
    finals = np.zeros_like(first.state)
    for start in range(0, todo.shape[1], CHUNK):
        result = simulator.step(todo[:, start : start + CHUNK], "all", np.array(SEEDS) + 10 + start)
        steps = {"state": np.stack([each.state for each in result.intermediate], 1)}
        steps |= {name: getattr(result, name) for name in ("reward", "terminated", "truncated", "valid")}
        if result.success is not None:
            steps["success"] = result.success
        for name, array in steps.items():
            record.setdefault(name, []).append(array.copy())
        record.setdefault("next", []).append(result.observation.state[:, None].copy())
        if result.final_observation is not None:
            fresh = ~finals[result.final_rows].any(1)  # the first end of a row
            finals[result.final_rows[fresh]] = result.final_observation.state[fresh]
    return {name: np.concatenate(parts, 1) for name, parts in record.items()} | {"final": finals}


def numbers(observation: Any) -> np.ndarray:
    """The group `policy` of one environment as one vector; images are left out."""
    import torch

    policy = observation["policy"]
    terms = policy.values() if isinstance(policy, dict) else [policy]
    return torch.cat([term.reshape(1, -1) for term in terms], 1)[0].cpu().numpy().copy()


def isaac_lab(task: str) -> dict[str, np.ndarray]:
    """Isaac Lab's own environment, alone in its scene: for every seed the observations [T+1], rewards and ends [T] up
    to its first end. Nothing of our package is used."""
    import gymnasium
    import torch
    from isaaclab.app import launch_simulation
    from isaaclab_tasks.utils import parse_env_cfg

    cfg: Any = parse_env_cfg(task, device="cpu", num_envs=1, overrides=["physics=newton_mjwarp"])
    cfg.seed, cfg.compute_final_obs = 0, True
    if task != CARTPOLE:
        cfg.observations.policy.enable_corruption = False
    if task == REACH:
        cfg.commands.ee_pose.debug_vis = False
    if task == STACK:
        cfg.scene.replicate_physics = True
    shape = actions(task).shape[:2]
    record: dict[str, Any] = {name: np.zeros(shape, bool) for name in ("terminated", "truncated", "valid")}
    record["reward"] = np.zeros(shape, np.float32)
    states: list[list[np.ndarray]] = []
    with launch_simulation(cfg, {}):
        env = gymnasium.make(task, cfg=cfg).unwrapped
        env.reset()  # the first reset of a new environment loses the velocities that it draws
        for row, (seed, todo) in enumerate(zip(SEEDS, actions(task), strict=True)):
            states.append([numbers(env.reset(seed=seed)[0])])
            for k, action in enumerate(todo):
                observation, reward, terminated, truncated, extras = env.step(torch.from_numpy(action[None]))
                ended = bool(terminated) or bool(truncated)
                states[row].append(numbers(extras["final_obs"] if ended else observation))
                record["valid"][row, k] = True
                record["reward"][row, k] = float(reward)
                record["terminated"][row, k], record["truncated"][row, k] = bool(terminated), bool(truncated)
                if ended:
                    break
        env.close()
    record["state"] = np.zeros((shape[0], shape[1] + 1, len(states[0][0])), np.float32)
    for row, each in enumerate(states):
        record["state"][row, : len(each)] = each
    return record


def adapter(task: str) -> dict[str, np.ndarray]:
    """Our adapter in this process; for the reaching task also what its goals do."""
    from embodied_rl.simulators.chunk import BatchedSimulator
    from embodied_rl.simulators.isaaclab.environment import IsaacLabEnvironment

    environment = IsaacLabEnvironment(len(SEEDS), task, max_steps=LIMIT[task], reward=REWARD.get(task, "task"))
    with BatchedSimulator(environment, Seeds()) as simulator:
        record = play(simulator, task)
        if task == REACH:
            record |= goals(environment)
        if task == STACK:
            record |= stacked(environment)
    return record


def goals(environment: Any) -> dict[str, np.ndarray]:
    """ "later" [2,3,7]: the second goals of the episodes, and again with the rows exchanged. "reached": reward,
    terminated, truncated and success after the first row's goal was put where its hand is."""
    from isaaclab.utils.math import subtract_frame_transforms

    from embodied_rl.simulators.base import InitialState

    rows, env = np.arange(len(SEEDS)), environment.env
    term = env.command_manager.get_term("ee_pose")
    hold = np.zeros((len(SEEDS), 7), np.float32)
    later = []
    for order in (rows, rows[::-1]):
        environment.reset(rows, [InitialState(0, SEEDS[row]) for row in order])
        environment.step(hold)
        term.time_left[:] = 0.0
        environment.step(hold)
        later.append(environment.observe(rows)["state"][:, 18:25])
    data, body = env.scene["robot"].data, term.body_idx
    poses = (data.root_pos_w, data.root_quat_w, data.body_pos_w, data.body_quat_w)
    root, turn, hand, hand_turn = (each.torch for each in poses)
    position, orientation = subtract_frame_transforms(root, turn, hand[:, body], hand_turn[:, body])
    term.pose_command_b[0, :3], term.pose_command_b[0, 3:] = position[0], orientation[0]
    term._update_metrics()
    reached = environment.step(hold)
    return {"later": np.stack(later), "reached": np.array(reached, np.float32)}


def stacked(environment: Any) -> dict[str, np.ndarray]:
    """ "tower" [4,4,3]: reward, terminated, truncated, success of four steps after the first row's blocks were put on
    each other in the order asked for."""
    import torch

    from embodied_rl.simulators.base import InitialState

    rows, env = np.arange(len(SEEDS)), environment.env
    environment.reset(rows, [InitialState(0, seed) for seed in SEEDS])
    first = torch.tensor([0], dtype=torch.int32)
    for level, name in enumerate(("cube_1", "cube_2", "cube_3")):
        pose = torch.tensor([[0.45, 0.15, 0.0203 + 0.0406 * level, 0.0, 0.0, 0.0, 1.0]])
        env.scene[name].write_root_pose_to_sim_index(root_pose=pose, env_ids=first)
        env.scene[name].write_root_velocity_to_sim_index(root_velocity=torch.zeros(1, 6), env_ids=first)
    opened = np.zeros((len(SEEDS), 7), np.float32)
    opened[:, 6] = 1.0
    return {"tower": np.array([environment.step(opened) for _ in range(4)], np.float32)}


def refusals() -> dict[str, np.ndarray]:
    """The one-line errors of what cannot be built, by name."""
    from embodied_rl.errors import UserError
    from embodied_rl.simulators.isaaclab.environment import IsaacLabEnvironment

    wrong: dict[str, dict[str, Any]] = {
        "unknown": {"task": "Isaac-Reach-Frank"},
        "preset": {"task": "IsaacContrib-Lift-Cube-Franka"},
        "camera": {"task": CARTPOLE, "observation": "rgb"},
        "cuda": {"task": CARTPOLE, "device": "cuda:0"},
        "assets": {"task": "Isaac-Ant-Direct"},
        "reward": {"task": CARTPOLE, "reward": "success"},
    }
    texts = {}
    for name, kwargs in wrong.items():
        try:
            IsaacLabEnvironment(1, **kwargs)
        except UserError as error:
            texts[f"refused|{name}"] = np.array(str(error))
    return texts


def main(folder: str, output: str, *tasks: str) -> None:
    # As a simulator worker does: nothing of the folder around `embodied_rl` is importable.
    spec: Any = importlib.util.spec_from_file_location(
        "embodied_rl", f"{folder}/__init__.py", submodule_search_locations=[folder]
    )
    sys.modules["embodied_rl"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["embodied_rl"])
    os.environ["ISAACSIM_ASSET_ROOT"] = str(Path(folder) / "assets" / "isaaclab")
    record: dict[str, np.ndarray] = {}
    for task in tasks:
        record |= {f"{task}|isaac {name}": array for name, array in isaac_lab(task).items()}
        record |= {f"{task}|{name}": array for name, array in adapter(task).items()}
    if CARTPOLE in tasks:
        record |= refusals()
    np.savez(output, **record)
    sys.stdout.flush()
    os._exit(0)  # simulators are known to crash in their exit handlers


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What mjlab's own interface does, and what our adapter does without worker processes; runs in mjlab's Python.

    python mjlab_reference.py <order.json> <result.npz>

The order: parts (functions to run), task, seeds (one episode each), actions [T,A] (the same in all), kwargs (of our
adapter).
"""

# pyright: reportMissingImports=false
import json
import os
import sys

import numpy as np

os.environ["MUJOCO_GL"] = "disable"


def facts():
    """The registry, and what configurations tell without building anything."""
    from mjlab.tasks.registry import list_tasks, load_env_cfg

    table = {}
    for name in list_tasks():
        cfg = load_env_cfg(name)
        camera = cfg.observations.get("camera")
        table[name] = {
            "max_steps": round(cfg.episode_length_s / (cfg.sim.mujoco.timestep * cfg.decimation)),
            "cameras": [term for term in (camera.terms if camera else ()) if term.endswith("_rgb")],
            "has_success": any(hasattr(command, "success_threshold") for command in cfg.commands.values()),
        }
    return table


def own(order):
    """The episodes that mjlab itself plays, one environment alone, with its defaults but for the noise and for what is
    randomized at start-up, here at every reset: {group: [R,T+1,...], reward, terminated, truncated: [R,T]}."""
    import torch
    from mjlab.envs import ManagerBasedRlEnv
    from mjlab.tasks.registry import load_env_cfg

    cfg = load_env_cfg(order["task"])
    cfg.scene.num_envs = 1
    for group in cfg.observations.values():
        group.enable_corruption = False
    for event in cfg.events.values():
        event.mode = "reset" if event.mode == "startup" else event.mode
    env = ManagerBasedRlEnv(cfg, device="cpu")
    recorded = {}

    def record(**values):
        for name, value in values.items():
            recorded.setdefault(f"own.{name}", []).append(value[0].numpy().copy())

    for seed in order["seeds"]:
        record(**env.reset(seed=seed)[0])
        for action in np.array(order["actions"], np.float32):
            seen, reward, terminated, truncated, _ = env.step(torch.from_numpy(action[None]))
            record(**seen, reward=reward, terminated=terminated, truncated=truncated)
    env.close()
    return {
        name: np.stack(values).reshape(len(order["seeds"]), -1, *values[0].shape) for name, values in recorded.items()
    }


def unhosted(order):
    """The chunk of `actions` in rows with `seeds`, by our adapter in this process."""
    from embodied_rl.simulators.base import InitialState
    from embodied_rl.simulators.chunk import BatchedSimulator
    from embodied_rl.simulators.mjlab.environment import MjlabEnvironment
    from embodied_rl.simulators.reset_schedule import FixedSchedule

    seeds = order["seeds"]
    schedule = FixedSchedule([InitialState(0, seed) for seed in seeds])
    environment = MjlabEnvironment(num_envs=len(seeds), **order["kwargs"])
    with BatchedSimulator(environment, schedule) as simulator:
        first = simulator.reset(tickets=np.arange(len(seeds))).copy()
        result = simulator.step(np.array([order["actions"]] * len(seeds), np.float32), "last", None)
        last = result.observation
        arrays = {"first": first.state, "last": last.state, "reward": result.reward, "truncated": result.truncated}
        if result.success is not None:
            arrays["success"] = result.success
        arrays |= {f"first.{name}": image for name, image in first.images.items()}
        arrays |= {f"last.{name}": image for name, image in last.images.items()}
    return {f"unhosted.{name}": np.array(array) for name, array in arrays.items()}


def at_the_goal(order):
    """What a step says after mjlab itself has put the cube of row 1 at its goal: success [N], reward [N]."""
    import torch

    from embodied_rl.simulators.base import InitialState
    from embodied_rl.simulators.mjlab.environment import MjlabEnvironment

    environment = MjlabEnvironment(num_envs=2, task=order["task"], reward="success")
    environment.reset(np.arange(2), [InitialState(0, 1), InitialState(0, 2)])
    goal = environment.env.command_manager.get_term("lift_height").target_pos[1:]
    upright = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    row = torch.tensor([1])
    environment.env.scene["cube"].write_root_link_pose_to_sim(torch.cat([goal, upright], dim=1), env_ids=row)
    reward, _, _, success = environment.step(np.zeros((2, 7), np.float32))
    environment.close()
    return {"goal.reward": reward, "goal.success": success}


def main(order_path, result_path):
    with open(order_path) as file:
        order = json.load(file)
    import mjlab.tasks  # noqa: F401

    parts = {"own": own, "unhosted": unhosted, "at_the_goal": at_the_goal}
    arrays = {"facts": np.array(json.dumps(facts()))}
    for name in order["parts"]:
        arrays |= parts[name](order)
    np.savez(result_path, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Write assets/maniskill_tasks.json: what `embodied-rl list simulators --tasks` says about ManiSkill3's tasks.

Every task is built once with its cameras (a Vulkan device is needed), in a process of its own because some crash; the
table lets the command answer at once. To be run again when the pinned version of mani-skill changes.

    python scripts/describe_maniskill_tasks.py
"""

from __future__ import annotations

import json
import multiprocessing
import re
from pathlib import Path
from typing import Any

from embodied_rl.errors import UserError
from embodied_rl.simulators.maniskill import environment, tasks

TABLE = Path(__file__).parents[1] / "assets" / "maniskill_tasks.json"


def describe(name: str) -> dict[str, Any]:
    """The registered facts of a task, and what building it tells: either cameras and action size, or why it fails."""
    registered = tasks._registry()[name]
    rewards = list(registered.cls.SUPPORTED_REWARD_MODES)
    facts: dict[str, Any] = {"max_steps": registered.max_episode_steps, "rewards": rewards}
    facts |= {"cameras": None, "action_dim": None, "problem": ""}
    try:
        try:
            env = make(name, "rgb", rewards)
            facts["cameras"] = list(env._sensor_configs)
        except NotImplementedError:  # no such observation
            env, facts["cameras"] = make(name, "state", rewards), []
        facts["action_dim"] = environment.action_spec(env).dim
    except Exception as error:  # whatever it is, it is what the user of this task would meet
        facts["problem"] = problem(error)
    return facts | {"assets": asset_paths(name, facts["problem"])}


def make(name: str, observation: str, rewards: list[str]) -> Any:
    return environment.make(name, None, observation, "none" if "none" in rewards else rewards[0], 128)


def asset_paths(name: str, problem: str) -> list[str]:
    """Where what the task lacks belongs, relative to ManiSkill's data folder: its registered assets, or those that the
    problem names."""
    from mani_skill import ASSET_DIR
    from mani_skill.utils.assets import DATA_SOURCES, expand_data_group_into_individual_data_source_ids
    from mani_skill.utils.assets.data import DATA_GROUPS

    named = re.findall(r"misses the file (\S+);", problem)
    if named or not problem:
        return named
    ids: list[str] = []
    for asset in tasks._registry()[name].asset_download_ids or [problem.split()[-1]]:
        ids += expand_data_group_into_individual_data_source_ids(asset) if asset in DATA_GROUPS else [asset]
    sources: list[Any] = [DATA_SOURCES[each] for each in ids if each in DATA_SOURCES]
    return sorted({str((source.output_dir / source.target_path).relative_to(str(ASSET_DIR))) for source in sources})


def problem(error: Exception) -> str:
    """One line, without this machine's paths."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return " ".join(re.sub(r"/\S*/\.maniskill/data/", "", text).split())


def main() -> None:
    names = tasks.names()  # imports ManiSkill, once for all the forked processes
    table: dict[str, Any] = {}
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for name in names:
            table[name] = pool.apply_async(describe, (name,)).get(timeout=120)
            print(name, table[name], flush=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(facts)}" for name, facts in table.items())
    TABLE.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()

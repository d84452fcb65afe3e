"""What ManiSkill registers: names, time limits, assets. Every missing asset is an error, never a question."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from embodied_rl.errors import UserError, unknown


def names() -> list[str]:
    """All registered task ids, sorted."""
    return sorted(_registry())


def _registry() -> dict[str, Any]:
    import mani_skill.envs  # noqa: F401 - importing registers
    from mani_skill.utils.registration import REGISTERED_ENVS

    return REGISTERED_ENVS


def check(task: str, reward: str, max_steps: int | None) -> int:
    """The time limit in force. Raises `UserError` for an unknown task, a reward it does not define, missing assets,
    or no time limit at all."""
    registry = _registry()
    if task not in registry:
        raise unknown("ManiSkill task", task, registry)
    supported = registry[task].cls.SUPPORTED_REWARD_MODES
    if reward not in supported:
        raise UserError(f"ManiSkill task '{task}' has no reward '{reward}'; it has: {', '.join(supported)}")
    missing = missing_assets(task)
    if missing:
        raise _missing(task, f"needs the assets {', '.join(missing)}", task)
    limit = max_steps or registry[task].max_episode_steps
    if limit is None:
        raise UserError(f"ManiSkill task '{task}' registers no time limit; set max_steps")
    return int(limit)


def missing_assets(task: str) -> list[str]:
    """The task's registered assets that are not on this machine. Some tasks forget to register their robot's: those
    show up only in `no_prompts`."""
    from mani_skill.utils import assets

    wanted: list[str] = []
    for name in _registry()[task].asset_download_ids or []:
        group = name in assets.DATA_GROUPS
        wanted += assets.expand_data_group_into_individual_data_source_ids(name) if group else [name]
    return [name for name in wanted if not assets.is_data_source_downloaded(name)]


@contextlib.contextmanager
def no_prompts(task: str) -> Iterator[None]:
    """Inside, an asset that ManiSkill does not find raises `UserError` with the download command; ManiSkill itself
    would wait for an answer on standard input, or exit."""
    from mani_skill.utils import download_asset

    def refuse(message: str) -> bool:
        robot = re.match(r"Robot (\S+)", message)
        raise _missing(task, "misses assets", robot[1] if robot else task)

    original = download_asset.prompt_yes_no
    download_asset.prompt_yes_no = refuse
    try:
        yield
    except SystemExit as error:
        raise _missing(task, "misses robot or scene files", task) from error
    except FileNotFoundError as error:
        raise _missing(task, f"misses the file {error.filename}", task) from error
    finally:
        download_asset.prompt_yes_no = original


def _missing(task: str, what: str, download: str) -> UserError:
    return UserError(f"ManiSkill task '{task}' {what}; run: python -m mani_skill.utils.download_asset {download}")

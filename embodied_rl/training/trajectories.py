"""Where things went in a few evaluation episodes, for the report's plot."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from embodied_rl.files import write_atomic
from embodied_rl.pipeline.rollout import RolloutWorker
from embodied_rl.pipeline.tickets import TicketList
from embodied_rl.specs import ObservationSpec

_POSITION = re.compile(r"(?:.*\.)?(\w+?)_(?:pose|pos|position)\.0$")


def position_columns(spec: ObservationSpec) -> dict[str, int]:
    """{thing: column of its x} for the absolute positions among `spec.state_names`: three numbers named
    "..._pose.0" or "..._pos.0" onwards. Differences ("tcp_to_obj_pos") are no positions of a thing."""
    found = {}
    for column, name in enumerate(spec.state_names):
        match = _POSITION.match(name)
        if match and "_to_" not in match[1]:
            found[match[1]] = column
    return found


def trajectories(worker: RolloutWorker, tickets: range) -> list[dict[str, Any]]:
    """Run the episodes `tickets`: {"ticket", "success", "positions": {thing: [[x,y,z], ...]}} of each; of none when the
    state does not tell where things are."""
    columns = position_columns(worker.simulator.observation_spec)
    if not columns:
        return []
    worker.restart(TicketList(tickets))
    paths: dict[int, list[np.ndarray]] = defaultdict(list)
    episodes: list[dict[str, Any]] = []
    while len(episodes) < len(tickets):
        worker.begin(deterministic=True, observe="all")
        decision = worker.finish()
        result = decision.result
        assert result.intermediate is not None
        for row in np.flatnonzero(result.lost):
            paths.pop(int(decision.tickets[row]), None)
        for step, after in enumerate(result.intermediate):
            for row in np.flatnonzero(result.valid[:, step]):
                paths[int(decision.tickets[row])].append(np.array(after.state[row]))
        for episode in result.episodes:
            states = np.stack(paths[episode.ticket])
            positions = {thing: states[:, at : at + 3].round(4).tolist() for thing, at in columns.items()}
            episodes.append({"ticket": episode.ticket, "success": episode.success_once, "positions": positions})
    return episodes


def write_trajectories(episodes: Iterable[dict[str, Any]], path: Path) -> None:
    """Write {"episodes": those, in the order of their tickets} to `path`; nothing when there are none."""
    found = sorted(episodes, key=lambda episode: episode["ticket"])
    if found:
        write_atomic(path, json.dumps({"episodes": found}))

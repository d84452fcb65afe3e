"""Whole episodes are held once, however they come."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pipeline_toys import in_groups, make_worker, same

from embodied_rl.pipeline.episodes import Episodes

BENCHMARK = Path(__file__).parents[2] / "scripts" / "benchmark_memory.py"


@pytest.mark.parametrize("bytes_together", [1, 200, 10**9])
def test_decisions_put_together_as_they_come_make_the_same_batch(
    bytes_together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_groups(3, 2) as simulator:
        expected = make_worker(simulator).collect_episodes(range(9), 0)
        monkeypatch.setattr(Episodes, "_LARGE", bytes_together)
        same(make_worker(simulator).collect_episodes(range(9), 0), expected)
    assert expected.tickets.tolist() == sorted(expected.tickets.tolist())
    assert [episode.ticket for episode in expected.episodes] == list(range(9))


def test_a_lost_episode_leaves_nothing_before_its_loss_and_keeps_what_follows() -> None:
    with in_groups(2) as simulator:
        first, second = (make_worker(simulator).collect_episodes(range(start, start + 2), 0) for start in (0, 2))
        again = make_worker(simulator).collect_episodes(range(2), 0)
    collected = Episodes()
    for part in (first, second):
        collected.add(part)
    collected.drop(np.array([1, 1]))
    collected.add(again)
    found = np.concatenate([part.tickets.numpy() for part in collected.parts])
    kept = np.concatenate([[ticket for ticket in first.tickets.tolist() if ticket != 1], second.tickets, again.tickets])
    assert found.tolist() == kept.tolist()


@pytest.mark.slow
def test_a_gigabyte_of_images_is_held_once(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    subprocess.run([sys.executable, str(BENCHMARK), "segment", "episodes", "--out", str(out)], timeout=900, check=True)
    found = json.loads(out.read_text())
    assert list(found) == ["segment", "segment_peak", "episodes", "episodes_peak"]
    assert all(0.9 < growth <= 1.3 for growth in found.values()), found

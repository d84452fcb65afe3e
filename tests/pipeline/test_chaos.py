"""What the chaos script finds wrong is wrong, and it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.append(str(SCRIPTS))
from fault_injection import bookkeeping  # type: ignore[import-not-found]  # noqa: E402


def batch(number: int, **decisions: int) -> dict[str, Any]:
    """Two tickets per batch; those of the batch end in it."""
    ended = {ticket: count for ticket, count in decisions.items() if not ticket.endswith("0")}
    return {"number": number, "digest": str(decisions), "decisions": decisions, "ended": ended}


BATCHES = [batch(0, t1=3, t0=1), batch(1, t2=2, t0=2), batch(2, t3=4)]


def wrong(folder: Path, batches: list[dict[str, Any]]) -> set[str]:
    """The checks that do not hold of a training of three iterations of four steps."""
    learned = folder / "learned.jsonl"
    learned.write_text("".join(json.dumps(each) + "\n" for each in batches))
    state = {"iteration": 3, "env_steps": 12, "workflow": {"version": 3}, "counters": {"iterations": 3}}
    training: Any = SimpleNamespace(
        learned=learned,
        setup=SimpleNamespace(iterations=3),
        state=lambda: state,
        rows=lambda: [{"iteration": number} for number in (1, 2, 3)],
    )
    found = bookkeeping.once(training, 0) | bookkeeping.steps(training, 0, 2)
    return {name for name, value in found.items() if value is False}


@pytest.fixture(autouse=True)
def four_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bookkeeping, "STEPS", 4)


def test_a_batch_that_is_learned_from_anew_after_a_death_counts_once(tmp_path: Path) -> None:
    assert not wrong(tmp_path, BATCHES)
    forgotten = batch(1, t9=7)
    assert not wrong(tmp_path, [BATCHES[0], forgotten, *BATCHES[1:]])


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        (lambda batches: batches[:2], {"every_batch_once", "no_batch_twice", "every_step_learned_from"}),
        (
            lambda batches: [*batches[:2], batches[1] | {"number": 2}],
            {"no_batch_twice", "no_episode_twice"},
        ),
        (lambda batches: [*batches, batch(3, t4=1)], {"every_batch_once", "no_batch_twice", "every_step_learned_from"}),
        (
            lambda batches: [*batches[:2], batches[2] | {"decisions": {"t3": 3}}],
            {"no_decision_lost", "every_step_learned_from"},
        ),
    ],
    ids=["lost", "twice", "one too many", "shortened"],
)
def test_what_is_lost_or_learned_from_twice_is_noticed(
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], noticed: set[str], tmp_path: Path
) -> None:
    assert noticed <= wrong(tmp_path, change(BATCHES))


@pytest.mark.slow
def test_a_run_survives_its_simulators_and_its_own_death(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "chaos.py"), "--minutes", "0.01", "--out", str(tmp_path / "out.json")]
    child = subprocess.run([*command, "--only", "local: simulator driver"], stdout=subprocess.PIPE, timeout=1500)
    result = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(child.stdout.splitlines()[-1]) == result
    assert set(result["by_kind"]) <= {"simulator", "driver"} and result["trainings"] == 1
    held = result["held"]
    assert all(value for name, value in held.items() if name != "dealt_with_in_time"), result

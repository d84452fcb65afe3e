import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embodied_rl.errors import UserError
from embodied_rl.training import charts
from embodied_rl.training.charts import Series
from embodied_rl.training.report import versions, write_report

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced and keeps what tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + "\n"

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def evaluation(name: str, successes: int | None, low: float = 0.0, high: float = 1.0) -> dict[str, Any]:
    return {
        "name": name,
        "episodes": 100,
        "successes": successes or 0,
        "success": None if successes is None else successes / 100,
        "low": low,
        "high": high,
        "mean_return": 3.456,
        "mean_length": 21.0,
    }


def result(**changes: Any) -> dict[str, Any]:
    evaluations = [evaluation("initial", 43, 0.337, 0.528), evaluation("final", 95), evaluation("converged_clone", 71)]
    return {
        "env_steps": 1900,
        "wall_seconds": 75.0,
        "evaluations": evaluations,
        "deaths": 2,
        "lost_episodes": 5,
        "phases": {"start simulators": 9.0, "reinforcement learning": 60.0},
        "versions": {"torch": "2.11.0"},
    } | changes


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = {
        "recipe": "<b>quick</b>",
        "seed": 3,
        "simulator": {"name": "gone", "task": "PickCube-v1"},
        "imitation": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = [
        {"iteration": i, "env_steps": 100 * i, "train/success": i / 20, "loss/critic": 1 / i, "time/rate": None}
        for i in range(1, 20)
    ]
    rows[9]["evaluation/success"] = 0.5
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "result.json").write_text(json.dumps(result()))
    return tmp_path


def test_the_report_says_what_happened_and_needs_no_network(run: Path) -> None:
    text = write_report(run).read_text()
    page = Page(text)
    for words in (
        "Reinforcement learning took success from 43 % to 95 %; cloning the same demonstrations until it converges "
        "gives 71 %.",
        "43 of 100 · 95 % interval 33.7 to 52.8 %",
        "1.9k env steps",
        "1:15 wall time",
        "2 worker deaths",
        "5 lost episodes",
        "PickCube-v1",
        "2.11.0",
        "reinforcement learning",
    ):
        assert words in page.text
    assert "<b>quick</b>" not in text and "<b>quick</b>" in page.text
    assert not re.search(r"https?://|@import|url\(", text)
    assert page.count("script") == page.count("link") == page.count("iframe") == 0
    assert "Rollout" not in page.text
    assert "prefers-color-scheme: dark" in text


def test_curves_hold_every_iteration(run: Path) -> None:
    page = Page(write_report(run).read_text())
    lines = [
        attributes["d"] for tag, attributes in page.tags if tag == "path" and "line" in (attributes["class"] or "")
    ]
    assert sum((d or "").count("L") == 18 for d in lines) >= 3  # success raw and smoothed, loss raw and smoothed
    assert "critic" in page.text and "time/rate" not in page.text


def test_a_run_that_has_not_ended_gets_what_there_is(run: Path) -> None:
    (run / "result.json").unlink()
    page = Page(write_report(run).read_text())
    assert "this run has not ended" in page.text and "1.9k env steps" in page.text
    (run / "metrics.jsonl").unlink()
    assert "this run has not ended" in Page(write_report(run).read_text()).text


def test_a_task_without_success_and_a_run_without_cloning(run: Path) -> None:
    (run / "result.json").write_text(json.dumps(result(evaluations=[evaluation("initial", None)])))
    page = Page(write_report(run).read_text())
    assert "3.46" in page.text and "Reinforcement learning took" not in page.text
    (run / "config.json").write_text(json.dumps({"recipe": "r", "seed": 0, "imitation": None}))
    assert "before RL" in Page(write_report(run).read_text()).text


def test_rollouts_are_drawn_when_recorded(run: Path) -> None:
    path = [[0.0, 0.0, 0.2], [0.1, 0.05, 0.02], [0.1, 0.1, 0.3]]
    episode = {"ticket": 1, "success": True, "positions": {"gripper": path, "cube": path[1:]}}
    (run / "rollout.json").write_text(json.dumps({"episodes": [episode, episode]}))
    (run / "rollout.png").write_bytes(b"\x89PNG")
    page = Page(write_report(run).read_text())
    assert "Rollouts of the trained policy (2 episodes)" in page.text
    assert "cube" in page.text
    thin = [attributes for tag, attributes in page.tags if tag == "path" and "thin" in (attributes["class"] or "")]
    assert len(thin) == 8
    assert ("img", {"alt": "rollout", "src": "data:image/png;base64,iVBORw=="}) in page.tags


def test_what_is_not_a_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        write_report(tmp_path)


def test_versions() -> None:
    found = versions()
    assert found["python"].startswith("3.") and found["torch"] and found["mani-skill"]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_few_even_and_inside(low: float, width: float, count: int) -> None:
    found = charts.ticks(low, low + width, count)
    assert 1 <= len(found) <= count + 1
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert all(abs(step - steps[0]) <= 1e-6 * max(1.0, abs(low)) for step in steps)
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in found)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=700), st.booleans())
def test_lines_stay_inside_their_chart(points: list[tuple[float, float]], smooth: bool) -> None:
    x, y = zip(*sorted(points), strict=True)
    drawing = charts.line_chart([Series("a", x, y, markers=True, smooth=smooth)], "a", width=330, height=210)
    coordinates = [
        tuple(map(float, pair.split())) for path in re.findall(r'd="M([^H"]*)"', drawing) for pair in path.split("L")
    ]
    assert 1 <= len(coordinates) <= 2 * charts.MAX_POINTS
    assert all(0 <= u <= 330 and 0 <= v <= 210 for u, v in coordinates)


def test_nothing_to_draw() -> None:
    assert charts.line_chart([Series("a", [], [])], "a") == ""
    assert charts.projection([], (0, 1)) == ""


def test_numbers_are_short() -> None:
    assert [charts.number(v) for v in (0, 950, 12000, 1.5e6, 0.035, 2e-5)] == [
        "0",
        "950",
        "12k",
        "1.5M",
        "0.035",
        "2e-05",
    ]

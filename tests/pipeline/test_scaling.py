"""Rollout workers and learner ranks come and go while a run trains, and the clock alone notices."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from learner_toys import SPECS
from ray_toys import on_ray
from training_toys import ReachConfig, metrics_of, on_policy

from embodied_rl.algorithms.ppo import PPO
from embodied_rl.cli import main
from embodied_rl.config import PipelineConfig, RunConfig, load, to_dict
from embodied_rl.errors import SimulatorDied, UserError
from embodied_rl.training import checkpoint
from embodied_rl.training.metrics import MetricLogger, read_metrics
from embodied_rl.training.run import train
from embodied_rl.training.scale_request import Request, ask, newest
from embodied_rl.training.scaling import Scaling


def test_the_newest_request_counts_and_every_one_is_answered(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        ask(tmp_path, learners=2)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="nothing is asked for"):
        ask(tmp_path)
    first, second = ask(tmp_path, rollout_workers=4), ask(tmp_path, 2, 3)
    assert newest(tmp_path) == second
    assert second.numbers() == {"rollout_workers": 2, "learners": 3}
    with pytest.raises(UserError, match="refused: a newer request took its place"):
        first.wait(0)
    assert second.wait(0.2) is None
    second.answer("done: it was easy")
    assert second.wait(0) == "done: it was easy" and newest(tmp_path) is None
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError, match="has ended"):
        ask(tmp_path, learners=2)


@pytest.mark.parametrize("text", ["", "[2]", "{}", '{"learners": 0}', '{"learners": true}', '{"workers": 2}'])
def test_a_request_that_makes_no_sense_is_said_to(text: str, tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text(text)
    with pytest.raises(UserError, match="must hold an object with some of rollout_workers, learners"):
        Request(tmp_path / "1.json").numbers()


def test_the_command_asks_and_tells_what_came_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", str(tmp_path), "--learners", "2"]) == 2
    (tmp_path / "config.json").write_text("{}")
    assert main(["scale", str(tmp_path), "--rollout-workers", "4", "--wait", "1"]) == 0
    assert "no answer yet: it will be in" in capsys.readouterr().out
    request = newest(tmp_path)
    assert request is not None and request.numbers() == {"rollout_workers": 4}


def test_a_run_goes_on_as_it_was_after_a_bad_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(on_policy(), tmp_path / "alone")
    asked = []

    def asking(self: MetricLogger, row: dict[str, Any], log: Any = MetricLogger.log) -> None:
        log(self, row)
        if row["iteration"] == 1:
            asked.append(ask(tmp_path / "asked", rollout_workers=4))
        if row["iteration"] == 3:
            asked.append(ask(tmp_path / "asked", learners=1))

    monkeypatch.setattr(MetricLogger, "log", asking)
    train(on_policy(), tmp_path / "asked")
    with pytest.raises(UserError, match="refused: pipeline: rollout_workers, elastic and ray_address are of the exec"):
        asked[0].wait(0)
    assert asked[1].wait(0) == "done: rollout workers: 1, learners: 1"
    assert rows(tmp_path / "alone") == rows(tmp_path / "asked")


@dataclass
class Workers:
    """In place of `RolloutActors`."""

    count: int
    room: int
    late: int = 1
    """How often somebody asks before they are there."""
    error: Exception | None = None
    done: list[Any] = field(default_factory=list)

    @property
    def rows(self) -> dict[int, slice]:
        return dict.fromkeys(range(self.count), slice(0, 1))

    def prepare(self, workers: int) -> bool:
        if self.error:
            raise self.error
        self.done.append(("prepare", workers))
        self.late -= 1
        return self.late < 0

    def scale(self, workers: int) -> None:
        self.count = workers
        self.done.append(("scale", workers))

    def forget(self) -> None:
        """Nothing was prepared."""


def scaling(out: Path, workers: Workers, **more: Any) -> Scaling:
    (out / "config.json").touch()
    made = Scaling(configured(PipelineConfig(executor="ray", rollout_workers=3, **more)), workers, out)
    config: Any = made.config
    made.begin(config.algorithm.build(config.policy.build(SPECS.observation, SPECS.action), 0))
    return made


def configured(pipeline: PipelineConfig) -> RunConfig:
    return replace(on_policy(), pipeline=pipeline)


def test_a_change_is_due_when_all_is_there_and_is_written_down(tmp_path: Path) -> None:
    workers = Workers(3, room=8)
    changing = scaling(tmp_path, workers)
    assert not changing.due() and not workers.done and changing.metrics() == {}
    request = ask(tmp_path, rollout_workers=4)
    assert [changing.due() for _ in range(3)] == [False, True, True]
    assert request.wait(0) is None
    assert changing.change().keys() == {"time/scaling"}
    assert workers.done == [*[("prepare", 4)] * 3, ("scale", 4)]
    assert request.wait(0) == "done: rollout workers: 4, learners: 1"
    assert load(tmp_path / "config.json").pipeline.rollout_workers == 4, "a run that is resumed has them"
    assert changing.metrics() == {"scale/rollout_workers": 4, "scale/learners": 1}
    assert changing.metrics() == {} and not changing.due()


def test_what_does_not_start_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    workers = Workers(3, room=8, error=SimulatorDied("it\nwould not"))
    changing = scaling(tmp_path, workers)
    request = ask(tmp_path, rollout_workers=4)
    assert not changing.due() and not changing.due()
    with pytest.raises(UserError, match="refused: it would not"):
        request.wait(0)
    assert workers.count == changing.config.pipeline.rollout_workers == 3


def test_elastic_workers_follow_what_the_cluster_holds(tmp_path: Path) -> None:
    workers = Workers(1, room=1, late=0)
    changing = scaling(tmp_path, workers, elastic=True)
    assert not changing.due()
    workers.room = 2
    assert changing.due()
    changing.change()
    assert workers.count == 2 and not changing.due()
    workers.room = 9
    assert changing.due()
    changing.change()
    assert workers.count == 3, "no more than are wanted"
    workers.room = 1
    assert not changing.due(), "who is there stays"
    assert ask(tmp_path, rollout_workers=2) and changing.due()
    changing.change()
    assert workers.count == 1 and changing.config.pipeline.rollout_workers == 2
    workers.room, workers.error = 2, UserError("no")
    assert not changing.due()
    workers.error = None
    assert not changing.due(), "what did not start is not tried again and again"
    workers.room = 1
    assert not changing.due()


def rows(out: Path) -> list[dict[str, Any]]:
    found = metrics_of(read_metrics(out / "metrics.jsonl"))
    return [{name: value for name, value in row.items() if not name.startswith("scale/")} for row in found]


CHANGED = "time/scaling"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "changes"),
    [(PipelineConfig(), {4: (1, 2), 7: (1, 1)}), (on_ray(1), {4: (4, 2), 7: (2, 1)})],
    ids=["local", "ray"],
)
def test_workers_and_ranks_come_and_go_and_every_segment_is_learned_from_once(
    pipeline: PipelineConfig,
    changes: dict[int, tuple[int, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`changes`: after which iteration: rollout workers, learners."""
    config = on_policy(env_steps=560, evaluate_every=0, checkpoint_every=3)
    config = replace(config, simulator=ReachConfig(num_envs=4, workers=4))
    learned: dict[str, list[tuple[int, torch.Tensor, int]]] = {"alone": [], "scaled": []}
    name, looked, lasted = "alone", 0, []

    def learning(self: Any, batch: Any, generator: Any, learn: Any = PPO.learn) -> Any:
        tickets = batch.tickets.where(batch.valid.any(-1), -1)
        learned[name].append((batch.version, tickets, int(batch.valid.sum())))
        return learn(self, batch, generator)

    def borders(self: Scaling) -> bool:
        nonlocal looked
        looked += 1
        return looked in changes

    def asking(self: Scaling, due: Any = Scaling.due) -> bool:
        """Ask, and do nothing else meanwhile, so that the iterations are known."""
        nonlocal looked
        looked += 1
        if looked not in changes:
            return due(self)
        request, deadline, ready = ask(tmp_path / name, *changes[looked]), time.monotonic() + 240, False
        while not ready:
            assert time.monotonic() < deadline and request.path.exists()
            began = time.monotonic()
            ready = due(self)
            lasted.append(time.monotonic() - began)
            time.sleep(0.1)
        return ready

    monkeypatch.setattr(PPO, "learn", learning)
    with monkeypatch.context() as patch:
        patch.setattr(Scaling, "due", borders)
        patch.setattr(Scaling, "change", lambda _: {})
        alone = train(config, tmp_path / "alone")
    name, looked = "scaled", 0
    with monkeypatch.context() as patch:
        patch.setattr(Scaling, "due", asking)
        scaled = train(replace(config, pipeline=pipeline), tmp_path / "scaled")

    mine, theirs = rows(tmp_path / "alone"), rows(tmp_path / "scaled")
    assert len(mine) > 8
    for one, other in zip(mine, theirs, strict=True):
        for key in one:
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-4), key
    assert [version for version, *_ in learned["scaled"]] == list(range(len(mine)))
    for (_, one, steps), (_, other, their_steps) in zip(*learned.values(), strict=True):
        assert torch.equal(one, other) and steps == their_steps
    assert scaled["env_steps"] == alone["env_steps"] == sum(steps for *_, steps in learned["scaled"])
    assert scaled["lost_episodes"] == scaled["deaths"] == 0
    bounds = [0, *sorted({*changes, *range(3, len(mine), 3)}), len(mine)]
    tickets = [batch for _, batch, _ in learned["scaled"]]
    parts = [set(torch.cat(tickets[begin:end]).unique().tolist()) - {-1} for begin, end in pairwise(bounds)]
    assert sum(map(len, parts)) == len(set().union(*parts)), "no ticket is run on both sides of a border"
    folders = [checkpoint.latest(tmp_path / each / "checkpoints") for each in learned]
    ends = [checkpoint.load(folder) for folder in folders if folder]
    for part in ("policy", "optimizers"):
        torch.testing.assert_close(ends[1][part], ends[0][part], rtol=1e-3, atol=1e-4)

    found = read_metrics(tmp_path / "scaled" / "metrics.jsonl")
    told = {row["iteration"]: (row["scale/rollout_workers"], row["scale/learners"]) for row in found if CHANGED in row}
    assert told == {at + 1: numbers for at, numbers in changes.items()}
    lasting = [row["wall_seconds"] - before["wall_seconds"] for before, row in pairwise(found)]
    for at in changes:
        gap = lasting[at - 1] - median(lasting)
        print(f"gap after iteration {at}: {gap:.2f} s, of which {found[at][CHANGED]:.2f} s changing")
        assert gap < 60
    print(f"looked {len(lasted)} times, the longest look {max(lasted):.2f} s")
    saved = json.loads((tmp_path / "scaled" / "config.json").read_text())["pipeline"]
    assert (saved["rollout_workers"], saved["learners"]) == changes[7]
    assert to_dict(load(tmp_path / "scaled" / "config.json"))["pipeline"] == saved

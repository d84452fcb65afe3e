"""Going over to another plan while a run goes on, in worlds that are known, and in real processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_toys import metrics_of, on_policy

from embodied_rl.config import PipelineConfig, load
from embodied_rl.planner import events
from embodied_rl.planner.costs import Cost, Costs, Work
from embodied_rl.planner.events import Variation
from embodied_rl.planner.placement import Placement, seconds
from embodied_rl.planner.prediction import WINDOW, Prediction
from embodied_rl.planner.profile import Profile
from embodied_rl.planner.replanning import GAIN, Replanning
from embodied_rl.planner.search import Plan
from embodied_rl.specs import ActionSpec, ObservationSpec
from embodied_rl.training.checkpoint import latest
from embodied_rl.training.checkpoint import load as load_checkpoint
from embodied_rl.training.metrics import read_metrics
from embodied_rl.training.run import train

ROWS, DECISIONS, CORES = 8, 20, 16


def profile_of(simulate: float, infer: float, learn: float) -> Profile:
    """Of calls for all environments that take so many milliseconds (learning: for an iteration)."""
    cost = {
        "simulate": Cost(0.0, 1e-3 * simulate),  # every environment has a process
        "infer": Cost(0.1e-3 * infer, 0.9e-3 * infer / ROWS),
        "train": Cost(0.0, 1e-3 * learn / (ROWS * DECISIONS)),
    }
    work = Work(Costs(**cost), ROWS, DECISIONS, processes=ROWS)
    told = ActionSpec((-1.0,), (1.0,), (0.0,))
    return Profile(work, Variation(), [], 1.0, 4, torch.device("cpu"), CORES, 0.0, ObservationSpec(), told)


class World:
    """Where calls take what `truth` says, whatever is expected, and iterations of a placement times `odd` of it."""

    def __init__(self, truth: Profile, odd: dict[int, float] | None = None) -> None:
        self.work, self.odd = truth.work, odd or {}

    def seconds(self, placement: Placement) -> float:
        return self._measure(placement).seconds * self.odd.get(placement.groups, 1.0)

    def live(self, run: Replanning, iterations: float = 1e6, switch: float = 1.0) -> Plan | None:
        """A window of iterations."""
        for _ in range(WINDOW):
            assert run.better(iterations, switch) is None
            calls = self._measure(run.plan.placement).calls
            run.compare(
                self.seconds(run.plan.placement), {name: calls[name] for name in ("simulate", "infer", "train")}
            )
        return run.better(iterations, switch)

    def _measure(self, placement: Placement) -> events.Iteration:
        return events.simulate(self.work.decisions, placement, seconds(self.work, placement), CORES)


def test_simulators_that_became_slow_are_stepped_while_the_policy_decides() -> None:
    run, world = Replanning(profile_of(0.2, 20, 50), 0), World(profile_of(20, 20, 50))
    assert run.plan.placement.groups == 1
    plan = world.live(run)
    assert plan is not None
    assert plan.placement.groups > 1
    assert plan.seconds == pytest.approx(world.seconds(plan.placement), rel=0.01)
    run.follow(plan)
    assert run.seconds == plan.seconds
    assert world.live(run) is None
    assert run.compare(plan.seconds, {})["time/expectation_error"] == pytest.approx(0, abs=0.01)


def test_a_move_must_pay_for_itself_and_exceed_what_predictions_are_off_by() -> None:
    slow = World(profile_of(20, 20, 50))
    assert slow.live(Replanning(profile_of(0.2, 20, 50), 0), iterations=3, switch=1.0) is None
    nearly = World(profile_of(0.8, 20, 50))
    assert nearly.live(Replanning(profile_of(0.2, 20, 50), 0)) is None


def test_a_plan_that_did_not_keep_its_promise_is_left_and_not_tried_again() -> None:
    run = Replanning(profile_of(0.2, 20, 50), 0)
    world = World(profile_of(20, 20, 50), odd={2: 2.0, 4: 2.0})
    tried = [run.plan.placement.groups]
    for _ in range(12):
        if plan := world.live(run):
            run.follow(plan)
            tried.append(plan.placement.groups)
    assert tried[-1] == 1
    assert 1 in map(tried.count, (2, 4))
    assert max(map(tried.count, (2, 4))) == 1


times = st.floats(0.2, 50)


@settings(max_examples=15, deadline=None)
@given(times, times, times, times, times, times, st.integers(0, 1))
def test_whatever_was_measured_before_the_run_ends_with_a_good_plan(
    simulate: float, infer: float, learn: float, simulates: float, infers: float, learns: float, staleness: int
) -> None:
    run, world = Replanning(profile_of(simulate, infer, learn), staleness), World(profile_of(simulates, infers, learns))
    for _ in range(4):
        if plan := world.live(run):
            run.follow(plan)
    best = min(world.seconds(plan.placement) for plan in profile_of(simulates, infers, learns).plans(staleness))
    assert world.seconds(run.plan.placement) * (1 - GAIN) <= best * (1 + 1e-6)


class After(Prediction):
    """Goes over to another plan after two iterations."""

    looked = 0

    def better(self, iterations: float, switch: float) -> Plan | None:
        assert switch > 0
        self.looked += 1
        if self.looked != 2:
            return None
        placement = Placement(range(0), range(0), range(0), groups=2)
        return Plan(placement, 0.5, {}, {}, "")


def test_a_run_that_goes_over_to_groups_ends_as_one_that_had_none(tmp_path: Path) -> None:
    config = on_policy(env_steps=300, checkpoint_every=1, evaluate_every=0)
    config = replace(config, logging=replace(config.logging, trace=True))
    train(config, tmp_path / "stays")
    train(config, tmp_path / "moves", prediction=After(1.0))
    stays, moves = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("stays", "moves"))
    for one, other in zip(metrics_of(stays), metrics_of(moves), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)  # products of two rows are rounded like none of four
    moved = [row["iteration"] for row in moves if "time/move" in row]
    assert moved == [4]  # asked before the third, at whose end it moves
    assert load(tmp_path / "moves" / "config.json").pipeline == PipelineConfig(env_groups=2)
    assert len(list((tmp_path / "moves" / "logs").glob("group-*"))) == 2
    events = json.loads((tmp_path / "moves" / "trace.json").read_text().rstrip(",\n") + "]")
    tracks = {(event["tid"], event["args"]["name"]) for event in events if event["ph"] == "M"}
    assert sorted(tracks) == [(1, "rollout"), (2, "learner"), (3, "simulator 0"), (4, "simulator 1")]
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("stays", "moves")]
    assert results[0]["env_steps"] == results[1]["env_steps"]
    policies = []
    for name in ("stays", "moves"):
        newest = latest(tmp_path / name / "checkpoints")
        assert newest is not None
        policies.append(load_checkpoint(newest)["policy"])
    for name, weight in policies[0].items():
        torch.testing.assert_close(policies[1][name], weight, rtol=1e-4, atol=1e-5)


def test_a_plan_at_the_very_end_is_not_gone_over_to(tmp_path: Path) -> None:
    config = on_policy(env_steps=180, checkpoint_every=1, evaluate_every=0)
    train(config, tmp_path, prediction=After(1.0))
    assert not any("time/move" in row for row in read_metrics(tmp_path / "metrics.jsonl"))


def test_the_best_plan_is_kept_where_nothing_else_is_known() -> None:
    run = Replanning(profile_of(5, 10, 50), 1)
    for _ in range(WINDOW):
        run.compare(run.plan.seconds, {})
    assert run.better(1e6, 0.0) is None

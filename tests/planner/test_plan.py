"""Profiles, plans and predictions of a toy recipe in real processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from training_toys import ReachConfig, off_policy, on_policy

from embodied_rl import registry
from embodied_rl.algorithms.grpo import GRPOConfig
from embodied_rl.cli import main
from embodied_rl.config import PipelineConfig, RunConfig
from embodied_rl.errors import UserError
from embodied_rl.planner import plan as planning
from embodied_rl.planner.plan import choose, elsewhere
from embodied_rl.planner.prediction import WINDOW, Prediction
from embodied_rl.planner.profile import Profile, profile

registry.recipes.register("planner_toy", f"{__name__}:toy")


def toy() -> RunConfig:
    """PPO on the toy task."""
    return on_policy()


@pytest.fixture(scope="module")
def profiled() -> Profile:
    return profile(toy(), beside=True)


def test_a_profile_measures_three_sizes_and_counts_what_an_iteration_holds(profiled: Profile) -> None:
    config = toy()
    assert [sample.rows for sample in profiled.samples] == [1, 2, 4]
    for sample in profiled.samples:
        stages = (sample.simulate, sample.infer, sample.record, sample.train)
        assert all(stage.seconds > 0 and 0 <= stage.cores <= 1 for stage in stages)
        assert sample.infer.cores > 0
    work, whole = profiled.work, profiled.samples[-1]
    assert (work.rows, work.decisions, work.processes, work.batch) == (4, 8, 2, 32)
    assert whole.batch == 4 * whole.decisions
    steps = work.batch * config.policy.chunk
    assert steps / 2 < profiled.steps <= steps  # episodes end within chunks
    assert profiled.groups == 2
    assert profiled.work.costs.sync > 0
    assert 1 <= profiled.work.costs.overlap <= 2
    assert not work.inside


def test_plans_for_this_machine_are_its_groups_and_the_staleness_that_is_allowed(profiled: Profile) -> None:
    plans = profiled.plans(staleness=1)
    found = {(plan.placement.groups, plan.placement.staleness) for plan in plans}
    assert found == {(1, 0), (2, 0), (1, 1), (2, 1)}
    assert {plan.placement.staleness for plan in profiled.plans(staleness=0)} == {0}
    assert {plan.placement.mode for plan in plans} == {"cpu"}
    serial = next(plan for plan in plans if (plan.placement.groups, plan.placement.staleness) == (1, 0))
    sample = profiled.samples[-1]
    each = sample.infer.seconds + max(sample.simulate.seconds, sample.record.seconds)
    assert serial.seconds == pytest.approx(8 * each + sample.train.seconds * 32 / sample.batch, rel=0.5)


def test_an_interpreter_that_two_threads_share_slows_what_overlaps(profiled: Profile) -> None:
    work = replace(profiled.work, costs=replace(profiled.work.costs, overlap=1.0))
    fast, slow = (
        replace(profiled, work=replace(work, costs=replace(work.costs, overlap=times)), cores=8).plans(staleness=1)
        for times in (1.0, 2.0)
    )
    seconds = [{plan.placement: plan.seconds for plan in plans} for plans in (fast, slow)]
    for placement, lasts in seconds[0].items():
        assert (seconds[1][placement] > lasts) == (placement.staleness > 0)


def test_a_machine_that_is_not_here_is_planned_within_its_memory(profiled: Profile) -> None:
    plans = elsewhere(toy(), profiled, 4, 1e9, staleness=1)
    assert {plan.placement.mode for plan in plans} == {"collocated", "disaggregated"}
    with pytest.raises(UserError, match="the learner needs"):
        elsewhere(toy(), profiled, 4, 1e3, staleness=1)


def test_the_best_plan_becomes_the_configuration(profiled: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "profile", lambda config, beside: profiled)
    config = toy()
    chosen, prediction, why = choose(config)
    best = profiled.plans(staleness=0)[0]
    assert chosen == replace(config, pipeline=replace(config.pipeline, env_groups=best.placement.groups))
    assert prediction.seconds == best.seconds
    assert f"env_groups {best.placement.groups}, staleness 0" in why
    costs = replace(profiled.work.costs, train=replace(profiled.work.costs.train, fixed=100.0))
    slow = replace(profiled, work=replace(profiled.work, costs=costs))
    monkeypatch.setattr(planning, "profile", lambda config, beside: slow)
    allowed = replace(config, algorithm=replace(config.algorithm, staleness=1))
    assert choose(allowed)[0].algorithm.staleness == 0  # learning takes all the time: older weights bring nothing


def test_the_command_prints_costs_and_ranked_plans(
    profiled: Profile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "profile", lambda config, beside: profiled)
    assert main(["plan", "planner_toy"]) == 0
    printed = capsys.readouterr().out
    assert "simulate a chunk" in printed
    assert ("this machine was busy" in printed) == (profiled.load >= profiled.cores / 2)
    assert "an iteration: 4 environments x 8 decisions" in printed
    assert "env_groups  staleness" in printed
    assert main(["plan", "planner_toy", "--devices", "4", "--memory", "8"]) == 0
    assert "a machine that is not here: 4 devices of 8 GB" in capsys.readouterr().out
    assert main(["plan", "planner_toy", "--memory", "8"]) == 2
    assert "add --devices N" in capsys.readouterr().err


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(UserError, match="there is nothing to plan"):
        profile(replace(toy(), algorithm=None))
    with pytest.raises(UserError, match="'toy_off_policy' learns off-policy"):
        profile(off_policy())
    with pytest.raises(UserError, match="plans are for one process"):
        profile(replace(toy(), pipeline=PipelineConfig(learners=2)))


def test_simulators_in_this_process_leave_nothing_to_overlap_with() -> None:
    found = profile(replace(toy(), simulator=ReachConfig(workers=None)))
    assert found.work.inside
    assert found.groups == 1
    assert found.samples[-1].simulate.cores > 0
    assert found.samples[-1].record.seconds < 1e-6  # it is part of deciding


def test_whole_episodes_are_profiled_as_they_are_collected() -> None:
    algorithm = GRPOConfig(group_size=2, groups_per_iteration=4, epochs=1, minibatches=1)
    found = profile(replace(toy(), algorithm=algorithm))
    whole = found.samples[-1]
    assert found.work.decisions == whole.decisions
    assert whole.decisions <= found.work.batch <= 4 * whole.decisions  # rows without an episode wait


def test_a_prediction_is_compared_and_warns_once(capsys: pytest.CaptureFixture[str]) -> None:
    prediction = Prediction(2.0)
    for _ in range(WINDOW):
        metrics = prediction.compare(2.1, {})
    assert metrics["time/expectation_error"] == pytest.approx(0.05)
    assert capsys.readouterr().err == ""
    for _ in range(2 * WINDOW):
        metrics: dict[str, Any] = prediction.compare(3.0, {})
    assert metrics == {
        "time/iteration": 3.0,
        "time/iteration_expected": 2.0,
        "time/expectation_error": pytest.approx(0.5),
    }
    assert capsys.readouterr().err.count("warning: iterations take 3.00 s, 2.00 s were expected (+50%)") == 1

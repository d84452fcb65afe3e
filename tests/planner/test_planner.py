"""The planner's costs, formulas, event simulator and search, on invented numbers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from embodied_rl.errors import UserError
from embodied_rl.planner import events, formulas
from embodied_rl.planner.costs import Cost, Costs, Memory, Work
from embodied_rl.planner.placement import Placement, Seconds, seconds
from embodied_rl.planner.search import Machine, placements, search

times = st.floats(0.01, 10)
ONE = dict.fromkeys(("simulate", "infer", "record", "train"), 1.0)
CPU = Placement(range(0), range(0), range(0))
APART = Placement(range(1), range(1, 2), range(2, 3))


def costs(simulate: float = 1.0, infer: float = 1.0, train: float = 0.0, fixed: float = 0.0, **more: float) -> Costs:
    return Costs(Cost(fixed, simulate), Cost(fixed, infer), train=Cost(0.0, train), **more)


@given(st.floats(0, 5), st.floats(0, 5))
def test_a_fit_finds_the_line_that_was_measured(fixed: float, per_row: float) -> None:
    assume(fixed + per_row > 1e-3)
    found = Cost.fit([4, 8, 16], [fixed + per_row * rows for rows in (4, 8, 16)])
    assert found.fixed == pytest.approx(fixed, abs=1e-6)
    assert found.per_row == pytest.approx(per_row, abs=1e-6)


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_no_other_line_without_negative_numbers_fits_better(measured: list[float]) -> None:
    rows = np.array([1.0, 2.0, 4.0])

    def error(fixed: float, per_row: float) -> float:
        return float((((fixed + per_row * rows) / measured - 1) ** 2).sum())

    found = Cost.fit(rows.tolist(), measured)
    assert found.fixed >= 0
    assert found.per_row >= 0
    least = error(found.fixed, found.per_row)
    for fixed, per_row in itertools.product(np.linspace(0, 10, 21), np.linspace(0, 10, 21)):
        assert least <= error(fixed, per_row) + 1e-9


def test_a_fit_to_one_size_takes_nothing_for_fixed() -> None:
    assert Cost.fit([4, 4], [2.0, 2.0]) == Cost(0.0, 0.5)


@settings(max_examples=40)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 3), st.lists(times, min_size=5, max_size=5), st.booleans())
def test_events_without_chance_take_what_the_formulas_say(
    decisions: int, groups: int, staleness: int, lasting: list[float], switches: bool
) -> None:
    simulate, infer, record, train, sync = lasting
    each = Seconds(simulate, infer, record, train, sync, 3.0 * switches * (not staleness), 1, ONE)
    for placement in (CPU, APART):
        placement = replace(placement, groups=groups, staleness=staleness)
        if groups > 1 and placement is not CPU and placement.simulate:
            placement = replace(placement, simulate=range(10, 10 + groups))
        found, busy, _ = events.simulate(decisions, placement, each)
        assert found == pytest.approx(formulas.iteration(decisions, placement, each))
        assert all(0 <= share <= 1 + 1e-9 for share in busy.values())


@settings(max_examples=40)
@given(st.integers(1, 10), st.integers(1, 4), st.integers(0, 1), st.lists(times, min_size=5, max_size=5))
def test_the_formulas_are_a_lower_bound_where_stages_share_devices_or_cores(
    decisions: int, groups: int, staleness: int, lasting: list[float]
) -> None:
    one = range(1)
    shared = Placement(one, one, one, groups, staleness)
    for placement, cores, sharing in ((shared, None, groups), (replace(CPU, groups=groups), 1.5, 1)):
        each = Seconds(*lasting, 0.0, sharing, ONE)
        found, *_ = events.simulate(decisions, placement, each, cores)
        bound = formulas.iteration(decisions, placement, each, cores)
        simulate, infer, record, train, sync = lasting
        alone = decisions * groups * (simulate + infer + record) + train + sync
        assert bound - 1e-6 <= found <= alone + 1e-6


@settings(max_examples=40)
@given(st.integers(1, 10), st.integers(1, 4), st.integers(0, 1), st.lists(times, min_size=5, max_size=5))
def test_staleness_never_costs_and_cheaper_stages_never_take_longer(
    decisions: int, groups: int, staleness: int, lasting: list[float]
) -> None:
    placement = replace(CPU, groups=groups)
    each = Seconds(*lasting, 0.0, 1, ONE)
    after = formulas.iteration(decisions, placement, each)
    beside = formulas.iteration(decisions, replace(placement, staleness=1), each)
    assert after / 2 - 1e-9 <= beside <= after + 1e-9
    stale = replace(placement, staleness=staleness)
    whole = events.simulate(decisions, stale, each)[0]
    for name in ("simulate", "infer", "record", "train", "sync"):
        cheaper = each._replace(**{name: getattr(each, name) / 2})
        assert events.simulate(decisions, stale, cheaper)[0] <= whole + 1e-9


@given(st.integers(2, 4), times, times)
def test_groups_gain_at_most_a_factor_of_two_and_lose_when_costs_do_not_shrink(
    groups: int, simulate: float, infer: float
) -> None:
    work = Work(costs(simulate, infer), rows=12, decisions=50, processes=12)
    one, many = (
        formulas.iteration(50, replace(CPU, groups=count), seconds(work, replace(CPU, groups=count)))
        for count in (1, groups)
    )
    assert one / 2 <= many * (1 + 1e-9)
    fixed = Work(Costs(Cost(simulate), Cost(infer + simulate)), rows=12, decisions=50, processes=12)
    one, many = (
        formulas.iteration(50, replace(CPU, groups=count), seconds(fixed, replace(CPU, groups=count)))
        for count in (1, groups)
    )
    assert many > one * 0.99


def test_cores_that_are_wanted_twice_are_shared() -> None:
    each = Seconds(simulate=1.0, infer=1.0, record=0.0, train=10.0, sync=0.0, switch=0.0, sharing=1, cores=ONE)
    placement = replace(CPU, groups=2, staleness=1)
    assert events.simulate(5, placement, each, cores=3)[0] == pytest.approx(11.0)
    assert events.simulate(5, placement, each, cores=1)[0] == pytest.approx(30.0)  # all the work there is
    assert formulas.iteration(5, placement, each, cores=1) == pytest.approx(30.0)


def test_chance_makes_iterations_longer_on_average() -> None:
    each = Seconds(simulate=1.0, infer=0.5, record=0.0, train=1.0, sync=0.0, switch=0.0, sharing=1, cores=ONE)
    placement = replace(CPU, groups=2)
    plain = events.simulate(40, placement, each)[0]
    spread = events.simulate(40, placement, each, variation=events.Variation(spread=0.5), iterations=20)[0]
    resets = events.simulate(
        40, placement, each, variation=events.Variation(reset_chance=0.1, reset_seconds=2.0), iterations=20
    )[0]
    tail = events.simulate(40, placement, each, variation=events.Variation(tail=0.2), iterations=20)[0]
    assert plain * 1.02 < spread < plain * 1.6
    assert plain * 1.05 < resets < plain * 1.5
    assert plain < tail < plain * 1.5
    again = events.simulate(40, placement, each, variation=events.Variation(spread=0.5), iterations=20)[0]
    assert again == spread


def test_modes_are_values_of_one_description() -> None:
    every = range(4)
    assert Placement(every, every, every).mode == "collocated"
    assert Placement(range(0), every, every).mode == "collocated"
    assert Placement(range(2), range(2, 4), every).mode == "hybrid"
    assert Placement(range(2), range(2), range(2, 4)).mode == "disaggregated"
    assert CPU.mode == "cpu"
    work = Work(costs(), rows=8, decisions=4)
    assert {placement.mode for placement in placements(work, 4, 1, 0)} == {"collocated", "hybrid", "disaggregated"}


def test_stages_that_do_not_fit_together_take_turns_in_memory() -> None:
    memory = Memory(simulate=1, infer=10, train=20)
    together = Placement(range(2), range(2), range(2))
    assert not together.switches(memory, 8, limit=34)
    assert together.switches(memory, 8, limit=33)
    with pytest.raises(UserError, match="the learner needs"):
        together.switches(memory, 8, limit=19)
    with pytest.raises(UserError, match="at the same time"):
        replace(together, staleness=1).switches(memory, 8, limit=33)
    assert not Placement(range(1), range(1, 2), range(2, 3)).switches(memory, 8, limit=20)


def test_what_cannot_be_dealt_out_evenly_is_refused() -> None:
    work = Work(costs(), rows=8, decisions=3, processes=2)
    with pytest.raises(UserError, match="8 environments cannot be dealt out evenly to 3 groups"):
        seconds(work, replace(CPU, groups=3))
    with pytest.raises(UserError, match="4 groups need as many simulator processes"):
        seconds(work, replace(CPU, groups=4))
    with pytest.raises(UserError, match="8 environments of a group cannot be dealt out evenly to 3 devices"):
        seconds(work, Placement(range(0), range(3), range(3, 5)))
    uneven = seconds(replace(work, costs=costs(train=1.0)), Placement(range(0), range(1), range(1, 6)))
    assert uneven.train == 5  # of 24 decisions on 5 devices


def test_the_search_finds_the_best_of_all_placements_and_says_why() -> None:
    balanced = Work(costs(simulate=1.0, infer=1.0, train=0.05), rows=64, decisions=20)
    plans = search(balanced, Machine(devices=8), groups=4, staleness=1)
    best = min(
        formulas.iteration(20, placement, seconds(balanced, placement))
        for placement in placements(balanced, 8, 4, 1)
        if _fits(balanced, placement)
    )
    assert plans[0].seconds <= best * 1.02 + 1e-9
    assert plans == sorted(plans, key=lambda plan: round(plan.seconds / plans[0].seconds / 1.02))
    heavy = replace(balanced, costs=costs(simulate=0.01, infer=0.01, train=5.0))
    found = search(heavy, Machine(devices=8), groups=1, staleness=0)[0]
    assert found.placement.mode == "collocated"
    assert "learning takes" in found.reason


def _fits(work: Work, placement: Placement) -> bool:
    try:
        seconds(work, placement)
    except UserError:
        return False
    return True


def test_memory_decides_between_switching_and_devices_of_ones_own() -> None:
    memory = Memory(infer=15 << 30, train=60 << 30)
    expensive = Work(costs(train=0.1, switch=100.0, memory=memory), rows=16, decisions=10, processes=16)
    cheap = replace(expensive, costs=replace(expensive.costs, switch=0.01))
    assert search(expensive, Machine(8, 64 << 30), 1, 0)[0].placement.mode == "disaggregated"
    assert search(cheap, Machine(8, 64 << 30), 1, 0)[0].placement.mode == "collocated"
    with pytest.raises(UserError, match="the learner needs 60"):
        search(cheap, Machine(8, 32 << 30), 1, 0)


@pytest.mark.parametrize("devices", [8, 64, 1024])
def test_more_devices_never_make_the_best_plan_slower(devices: int) -> None:
    work = Work(costs(simulate=0.02, infer=0.01, train=0.002, fixed=0.05), rows=4096, decisions=80)
    few = search(work, Machine(devices // 2), 2, 1)[0].seconds
    many = search(work, Machine(devices), 2, 1)[0].seconds
    assert many <= few * 1.02
    assert math.isfinite(many)

"""Pairs of a forward and a backward: free of deadlock, as fast as the model says, refused in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule import Costs, Kind, ScheduleOptions, SchedulePlan, make_schedule, simulate
from parallel.schedule.checker.check import PlanError, check
from parallel.schedule.checker.memory import held_microbatches
from parallel.schedule.checker.streams import find_ring
from parallel.schedule.generators.lower import lower
from parallel.schedule.generators.orders import Work
from parallel.schedule.generators.problem import Problem
from parallel.schedule.simulator.costs import Turns, alternate
from tests.parallel.schedule.cases import Case, paired_cases, plan_of, use

WHOLE = {"ep": 2, "params": "step"}
EXCHANGES = {("llm", kind): (0.2, 0.2) for kind in (Kind.FORWARD, Kind.BACKWARD)}


@settings(max_examples=40)
@given(paired_cases())
def test_every_plan_with_pairs_passes(case: Case) -> None:
    plan = case.plan()
    assert any(a.paired for _, a in plan)
    check(plan)
    assert find_ring(plan, "one", "eager") is None
    line = simulate(plan, Costs(exchange=EXCHANGES))
    for p, program in enumerate(plan.programs):
        for k, a in enumerate(program):
            if a.paired:  # both begin and end together
                assert program[k + 1].kind is Kind.BACKWARD
                assert (line.start[p][k], line.end[p][k]) == (line.start[p][k + 1], line.end[p][k + 1])
    many = simulate(plan, Costs(exchange=EXCHANGES, cores=len(plan.ranks)))
    assert many.seconds == pytest.approx(line.seconds)  # event by event
    busy = [line.busy[plan.program_of[r]] for r in plan.ranks]
    assert max(busy) <= line.seconds * (1 + 1e-9)


@settings(max_examples=30)
@given(paired_cases(), st.sampled_from([0.0, 0.5, 4.0]))
def test_pairs_are_chosen_only_where_they_are_faster(case: Case, price: float) -> None:
    costs = Costs(exchange={key: (price, price) for key in EXCHANGES})

    def seconds(pairs: bool | None) -> float:
        options = ScheduleOptions(case.ahead, case.batch, overlap_experts=pairs, costs=costs)
        active, sink = case.active, case.modules["llm"]
        plan = make_schedule("auto", {"llm": sink}, sink="llm", active=[set()] * len(active), options=options)
        assert pairs is None or any(a.paired for _, a in plan) == pairs
        return simulate(plan, costs).seconds

    assert seconds(None) == min(seconds(True), seconds(False))


@pytest.mark.parametrize(("pp", "m"), [(1, 4), (2, 6), (4, 12)])
def test_pairs_cost_activations_and_no_bubble(pp: int, m: int) -> None:
    plan = plan_of("1f1b", 2 * pp, m, {"llm": {"pp": pp, **WHOLE}}, overlap_experts=True)
    assert [peak.bytes for peak in check(plan)] == [2 * (pp - r) for r in range(pp)]
    assert held_microbatches(plan, "llm") == 2 * pp
    assert simulate(plan, Costs()).seconds == 3 * (m + pp - 1)  # as 1F1B
    # Two exchanges of 0.2 beside pieces of 1/3 and 2/3: those of a pair are hidden, of p + p alone not.
    apart = plan_of("1f1b", 2 * pp, m, {"llm": {"pp": pp, **WHOLE}})
    costs = Costs(exchange=EXCHANGES)
    assert simulate(apart, costs).seconds == pytest.approx(3.8 * (m + pp - 1))
    hidden = 0.8 * (m - 2 * pp + 1)
    assert simulate(plan, costs).seconds <= 3.8 * (m + pp - 1) - hidden + 1e-9


@given(
    *(st.builds(Turns, st.floats(0, 4), st.lists(st.floats(0, 4), max_size=5).map(tuple)) for _ in range(2))
)
def test_turns_take_no_less_than_either_resource_and_no_more_than_both(a: Turns, b: Turns) -> None:
    computed = sum(x.piece * (len(x.exchanges) + 1) for x in (a, b))
    exchanged = sum(a.exchanges + b.exchanges)
    found = alternate(a, b)
    assert max(computed, exchanged) - 1e-9 <= found <= computed + exchanged + 1e-9
    assert alternate(Turns(a.piece, ()), Turns(b.piece, ())) == a.piece + b.piece


def test_turns_hide_an_exchange_beside_the_other_computation() -> None:
    # a 0-1, b 1-3, a 3-4 ..: the exchanges of a are under way while b computes, and the other way round.
    assert alternate(Turns(1, (2, 2)), Turns(2, (1, 1))) == 9
    # Those longer than the other's piece show their ends; b's last piece has nothing beside it.
    assert alternate(Turns(1, (3,)), Turns(2, (0,))) == 6 + 1


def test_a_pair_that_waits_for_itself_is_caught() -> None:
    """Rank 1 gives the gradient of 0 with the forward of 1, which rank 0 gives only for that gradient."""
    modules = {"llm": use("llm", 4, pp=2, **WHOLE)}
    problem = Problem("1f1b", modules, "llm", (frozenset[str](),) * 3, ScheduleOptions())

    def works(stage: int, first: int) -> list[Work]:
        forwards = [Work(Kind.FORWARD, "llm", stage, i, paired=i >= first) for i in range(3)]
        backwards = [Work(Kind.BACKWARD, "llm", stage, i) for i in range(3)]
        both = [w for pair in zip(forwards[first:], backwards, strict=False) for w in pair]
        return [*forwards[:first], *both, *backwards[3 - first :]]

    check(lower(problem, {(0,): works(0, 3), (1,): works(1, 1)}), backend="gloo")
    with pytest.raises(PlanError, match="the schedule cannot finish: rank 0"):
        check(lower(problem, {(0,): works(0, 1), (1,): works(1, 1)}), backend="gloo")


def _changed(plan: SchedulePlan, p: int, change: Any) -> SchedulePlan:
    """The plan whose program p is change(index of its first pair's forward, its actions)."""
    program = list(plan.programs[p])
    k = next(k for k, a in enumerate(program) if a.paired)
    changed = tuple(change(k, program))
    return replace(plan, programs=tuple(changed if q == p else x for q, x in enumerate(plan.programs)))


def test_broken_pairs_are_caught() -> None:
    # Vision is on one of the two ranks of an ep group, which so run two programs.
    plan = plan_of("1f1b", 2, 4, {"vision": {"ranks": "0"}, "llm": WHOLE}, overlap_experts=True)
    check(plan)
    p = plan.program_of[1]

    def alone(k: int, program: list[Any]) -> list[Any]:
        return [*program[:k], program[k]._replace(paired=False), *program[k + 1 :]]

    with pytest.raises(
        PlanError, match=r"rank 0 does forward\(llm, 1, paired\), rank 1 does forward\(llm, 1\)"
    ):
        check(_changed(plan, p, alone))

    def same(k: int, program: list[Any]) -> list[Any]:
        back = program[k + 1]._replace(microbatch=program[k].microbatch)
        return [*program[: k + 1], back, *program[k + 2 :]]

    def between(k: int, program: list[Any]) -> list[Any]:
        return [*program[: k + 1], program[k + 2], program[k + 1], *program[k + 3 :]]

    for broken in (same, between):
        with pytest.raises(PlanError, match=r"paired with .*; needed: a backward of another micro-batch"):
            check(_changed(plan, p, broken))
    each = {**plan.modules, "llm": replace(plan.modules["llm"], params="each")}
    with pytest.raises(PlanError) as caught:
        check(replace(plan, modules=each))
    assert any("weights of llm do not stay whole" in why for why in caught.value.problems)


@pytest.mark.parametrize(
    ("kind", "m", "llm", "options", "words"),
    [
        ("zero_bubble", 4, {"pp": 2, **WHOLE}, {}, "zero_bubble does not; needed: 1f1b or interleaved"),
        ("1f1b", 4, {"params": "step"}, {}, "ep=1 and etp=1: no rows are exchanged"),
        ("1f1b", 1, WHOLE, {}, "no effect with schedule.microbatches=1"),
        ("1f1b", 4, {"ep": 2}, {}, "data_parallel=auto each gathers and frees its own; needed: .* step"),
        ("1f1b", 4, {"ep": 4, "tp": 4}, {}, "with one data rank each gathers"),
        ("1f1b", 4, WHOLE, {"limit": 1}, "bound of 1; nearest: schedule.overlap_experts=false"),
    ],
)
def test_pairs_are_refused_in_words(kind: str, m: int, llm: Any, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_of(kind, 4, m, {"llm": llm}, overlap_experts=True, **options)
    plan = plan_of(kind, 4, m, {"llm": llm}, overlap_experts=None, **options)
    assert not any(a.paired for _, a in plan)


def test_a_bound_on_encoders_that_leaves_no_pair_is_refused() -> None:
    specs = {"vision": {}, "llm": WHOLE}
    with pytest.raises(ValueError, match=r"no effect with schedule.ahead=1: .* at least 2, best 2"):
        plan_of("1f1b", 2, 4, specs, overlap_experts=True, ahead=1)
    for ahead in (2, 3, 4):
        plan = plan_of("1f1b", 2, 4, specs, overlap_experts=True, ahead=ahead)
        assert held_microbatches(plan, "vision") <= ahead
    assert not any(a.paired for _, a in plan_of("1f1b", 2, 4, specs, overlap_experts=True, train=False))

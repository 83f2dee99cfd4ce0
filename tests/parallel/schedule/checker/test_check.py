"""The checker accepts every generated plan and catches every broken one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule import Kind, SchedulePlan
from parallel.schedule.action import COMPUTE, POSTED, Action
from parallel.schedule.checker.check import PlanError, check
from parallel.schedule.checker.memory import check_limit, held_microbatches, peaks
from parallel.topology.groups import WORLD
from tests.parallel.schedule.cases import Case, any_cases, cases, plan_of


@settings(max_examples=80)
@given(cases())
def test_every_generated_plan_passes(case: Case) -> None:
    plan = case.plan()
    assert len(check(plan)) == len(plan.programs)
    assert set(plan.ranks) == {r for u in case.modules.values() for r in u.layout.ranks}


@settings(max_examples=60)
@given(cases(train=True))
def test_colocated_sources_hold_no_more_than_the_bound(case: Case) -> None:
    plan = case.plan()
    sink = set(case.modules["llm"].layout.ranks)
    for m in plan.sources:
        if sink & set(case.modules[m].layout.ranks) and not case.modules[m].frozen:
            assert plan.ahead is not None and held_microbatches(plan, m) <= plan.ahead


def with_program(plan: SchedulePlan, p: int, actions: list[Action]) -> SchedulePlan:
    programs = tuple(tuple(actions) if q == p else old for q, old in enumerate(plan.programs))
    return replace(plan, programs=programs)


@settings(max_examples=30)
@given(any_cases(), st.randoms(use_true_random=False))
def test_a_dropped_or_doubled_action_is_caught(case: Case, rng: random.Random) -> None:
    plan = case.plan()
    p = rng.randrange(len(plan.programs))
    if not plan.programs[p]:
        return
    actions = list(plan.programs[p])
    k = rng.randrange(len(actions))
    # The update is optional: a plan without it is valid too, if no rank has it.
    if actions[k].kind is Kind.OPTIMIZER and len(plan.programs) == 1:
        return
    for broken in (actions[:k] + actions[k + 1 :], [*actions[: k + 1], *actions[k:]]):
        with pytest.raises(PlanError) as caught:
            check(with_program(plan, p, broken))
        assert f"rank {plan.ranks_of[p][0]}" in str(caught.value)
        assert actions[k].kind.value.split("_")[0] in str(caught.value) or actions[k].last


def matters(plan: SchedulePlan, p: int, a: Action, b: Action) -> bool:
    """Whether two neighbours of a list may not be swapped: the rules, written a second time."""
    same = (a.module, a.stage) == (b.module, b.stage)
    if a.kind in COMPUTE and b.kind in COMPUTE:
        shared = {
            g for g in a.groups if g in b.groups and any(p in s and len(s) > 1 for s in plan.program_sets(g))
        }
        both = (a.kind, b.kind) in {(Kind.FORWARD, Kind.BACKWARD), (Kind.FORWARD, Kind.BACKWARD_INPUT)}
        covered = set(range(a.microbatch, a.microbatch + a.span))
        return bool(shared) or (same and both and b.microbatch in covered)
    if a.kind in POSTED and b.kind is a.kind and a.groups == b.groups:
        if a.peer is None:
            return any(p in s and len(s) > 1 for s in plan.program_sets(a.groups[0]))
        return (a.stage - (a.peer or 0)) == (b.stage - (b.peer or 0))
    if a.kind is Kind.FORWARD and b.kind is Kind.SEND_FORWARD:
        return same and a.microbatch == b.microbatch
    if a.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and b.kind is Kind.SEND_BACKWARD:
        return same and a.microbatch == b.microbatch
    if a.kind is Kind.RECV_FORWARD and b.kind is Kind.FORWARD:
        return same and a.microbatch == b.microbatch
    if Kind.GATHER in (a.kind, b.kind) or Kind.GRAD_SYNC in (a.kind, b.kind) or b.kind is Kind.FREE:
        return same and (a.kind in COMPUTE or b.kind in COMPUTE)
    return b.kind is Kind.OPTIMIZER


@settings(max_examples=30)
@given(any_cases(), st.randoms(use_true_random=False))
def test_neighbours_that_depend_on_each_other_cannot_be_swapped(case: Case, rng: random.Random) -> None:
    plan = case.plan()
    found = [
        (p, k)
        for p, program in enumerate(plan.programs)
        for k in range(len(program) - 1)
        if matters(plan, p, program[k], program[k + 1])
    ]
    for p, k in rng.sample(found, min(6, len(found))):
        actions = list(plan.programs[p])
        actions[k], actions[k + 1] = actions[k + 1], actions[k]
        with pytest.raises(PlanError):
            check(with_program(plan, p, actions))


@settings(max_examples=60)
@given(cases(train=True), st.randoms(use_true_random=False))
def test_a_plan_that_passes_after_any_move_still_holds_the_same(case: Case, rng: random.Random) -> None:
    """Moving one action far away is caught, or leaves every computation after what it needs."""
    plan = case.plan()
    p = rng.randrange(len(plan.programs))
    actions = list(plan.programs[p])
    a = actions.pop(rng.randrange(len(actions)))
    actions.insert(rng.randrange(len(actions) + 1), a)
    moved = with_program(plan, p, actions)
    try:
        check(moved)
    except PlanError:
        return
    for module in plan.modules:
        for stage in range(plan.modules[module].stages):
            for kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
                at = {
                    (b.kind, i): k
                    for k, b in enumerate(actions)
                    if (b.module, b.stage) == (module, stage)
                    for i in range(b.microbatch, b.microbatch + b.span)
                }
                for (k, i), where in at.items():
                    assert k is not kind or at[Kind.FORWARD, i] < where


@settings(max_examples=40)
@given(any_cases(), st.randoms(use_true_random=False))
def test_an_action_changed_in_any_field_is_caught(case: Case, rng: random.Random) -> None:
    plan = case.plan()
    p = rng.randrange(len(plan.programs))
    actions = list(plan.programs[p])
    at = [k for k, a in enumerate(actions) if a.kind in COMPUTE or a.kind in POSTED]
    if not at:
        return
    k = rng.choice(at)
    a = actions[k]
    other = next((m for m in plan.modules if m != a.module), "nothing")
    for broken in (
        a._replace(microbatch=a.microbatch + plan.microbatches),
        a._replace(stage=a.stage + 1),
        a._replace(span=plan.microbatches + 1) if a.kind in COMPUTE else a._replace(peer=(a.peer or 0) + 1),
        a._replace(module=other),
        a._replace(last=not a.last),
        a._replace(groups=(*a.groups, WORLD)),
    ):
        with pytest.raises(PlanError, match=f"rank {plan.ranks_of[p][0]}"):
            check(with_program(plan, p, [*actions[:k], broken, *actions[k + 1 :]]))


def test_errors_name_actions_and_ranks() -> None:
    plan = plan_of("1f1b", 4, 4, {"vision": {"ranks": "0-1"}, "llm": {"ranks": "2-3", "pp": 2}})
    p = plan.program_of[3]
    actions = list(plan.programs[p])
    lost = next(k for k, a in enumerate(actions) if a.kind is Kind.RECV_FORWARD and a.microbatch == 2)
    with pytest.raises(PlanError, match=r"rank 3 lacks recv_forward\(llm\.1, 2\)"):
        check(with_program(plan, p, actions[:lost] + actions[lost + 1 :]))
    sends = [k for k, a in enumerate(actions) if a.kind is Kind.SEND_BACKWARD]
    actions[sends[0]], actions[sends[1]] = actions[sends[1]], actions[sends[0]]
    with pytest.raises(PlanError, match=r"message 0 of rank 3 to rank 2: send_backward\(llm\.1, 1\) meets"):
        check(with_program(plan, p, actions))


def test_a_deadlock_is_found_though_every_list_is_complete() -> None:
    plan = plan_of("1f1b", 2, 3, {"llm": {"pp": 2}})
    p = plan.program_of[0]
    actions = [a for a in plan.programs[p] if a.kind is not Kind.FORWARD or a.microbatch]
    forward = next(a for a in plan.programs[p] if a.kind is Kind.FORWARD and a.microbatch == 0)
    back = next(k for k, a in enumerate(actions) if a.kind is Kind.BACKWARD)
    actions.insert(back, forward)
    with pytest.raises(PlanError, match=r"rank 0: send_forward\(llm\.0, 0\) waits for forward\(llm\.0, 0\)"):
        check(with_program(plan, p, actions))


def test_collectives_in_another_order_on_one_member_are_found() -> None:
    # The encoder's ranks are at different places of the language model's pipeline.
    plan = plan_of("1f1b", 2, 4, {"vision": {}, "llm": {"pp": 2}}, ahead=4)
    p = plan.program_of[1]
    actions = list(plan.programs[p])
    first = [k for k, a in enumerate(actions) if a.module == "vision" and a.kind is Kind.FORWARD][:2]
    actions[first[0]], actions[first[1]] = actions[first[1]], actions[first[0]]
    with pytest.raises(
        PlanError, match=r"group vision.data: rank 0 does forward\(vision, 0\), rank 1 does forward"
    ):
        check(with_program(plan, p, actions))


@pytest.mark.parametrize(
    ("kind", "pp", "vpp", "m", "want"),
    [
        ("1f1b", 4, 1, 8, [4, 3, 2, 1]),
        ("gpipe", 4, 1, 8, [8, 8, 8, 8]),
        ("sequential", 4, 1, 8, [1, 1, 1, 1]),
        ("zero_bubble", 4, 1, 8, [4, 4, 4, 4]),
        # Interleaved, arXiv 2104.04473: 2 (p - r - 1) + (v - 1) p + 1 chunks in flight.
        ("interleaved", 4, 2, 8, [11, 9, 7, 5]),
    ],
)
def test_high_water_marks_are_those_of_the_literature(
    kind: str, pp: int, vpp: int, m: int, want: list[int]
) -> None:
    plan = plan_of(kind, pp, m, {"llm": {"pp": pp, "vpp": vpp}})
    assert [peak.bytes for peak in check(plan)] == want


def test_a_bound_that_cannot_be_met_is_refused_with_numbers() -> None:
    plan = plan_of("gpipe", 2, 6, {"llm": {"pp": 2}})
    assert max(peak.bytes for peak in check(plan, limit=6)) == 6
    with pytest.raises(
        ValueError, match=r"rank 0 holds activations of 6 .* bound of 5; nearest: a bound of 6"
    ):
        check(plan, limit=5)
    assert check_limit(plan, 6) == peaks(plan)

"""Plans on a backend with one stream a communicator and no buffers or tags, as NCCL has.

The model is checked against a second one, written here: ranks that carry out their lists one action at a
time, each waiting for the other ends of its message.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule import (
    Action,
    Costs,
    Group,
    Kind,
    ScheduleOptions,
    SchedulePlan,
    make_schedule,
    simulate,
)
from parallel.schedule.action import COMPUTE, POSTED
from parallel.schedule.checker.check import PlanError, check
from parallel.schedule.checker.streams import find_ring
from parallel.schedule.generators.posting import in_one_order
from parallel.topology.groups import Direction
from tests.parallel.schedule.cases import Case, any_cases, cases, plan_of, receives_early, use

EVERY_KIND = ("1f1b", "interleaved", "zero_bubble", "fill", "sequential", "gpipe")


def pipeline_of_two(kind: str, *, vpp: int) -> SchedulePlan:
    layouts = {"llm": {"pp": 2, "vpp": vpp}}
    return plan_of(kind, 2, 4, {"vision": {"params": "step"}, **layouts} if kind == "fill" else layouts)


@pytest.mark.parametrize("kind", [k for k in EVERY_KIND if k != "1f1b"])
def test_both_directions_over_one_pair_hang_unless_their_calls_have_one_order(kind: str) -> None:
    plan = pipeline_of_two(kind, vpp=2)
    check(plan)
    early = receives_early(plan)
    check(early, backend="gloo")
    with pytest.raises(PlanError, match=r"hangs on NCCL.*rank 0: .* waits for rank 1.*rank 1: .*rank 0"):
        check(early)
    # Each direction of a pipeline has a stream of its own: without virtual stages they do not meet.
    if kind != "interleaved":
        once = receives_early(pipeline_of_two(kind, vpp=1))
        assert find_ring(once, "each") is None
        with pytest.raises(PlanError, match="no common order of operations, which NCCL needs"):
            check(once)


def test_first_uses_that_wait_for_each_other_are_found() -> None:
    overlapping = {"vision": {"ranks": "0-3", "pp": 2}, "llm": {"ranks": "2-5", "pp": 2}}
    plan = plan_of("auto", 6, 8, overlapping)
    early = receives_early(plan)
    for first_use in ("eager", "lazy"):
        check(plan, first_use=first_use)
        ring = find_ring(early, "each", first_use)
        assert ring is not None and "the first use of vision.pp.backward, waits for rank 2" in str(ring)
    assert find_ring(early, "each") is None


@settings(max_examples=80)
@given(cases())
def test_every_generated_plan_has_one_order_of_operations(case: Case) -> None:
    plan = case.plan()
    assert finishes(plan)
    for first_use in ("connected", "eager", "lazy"):
        assert find_ring(plan, "one", first_use) is None
        assert find_ring(plan, "each", first_use) is None


@settings(max_examples=60)
@given(cases())
def test_things_that_take_no_time_keep_their_order(case: Case) -> None:
    nothing = {(m, kind): 0.0 for m in case.modules for kind in COMPUTE}
    check(in_one_order(case.plan(), Costs(nothing)))


def test_gathers_start_before_their_first_rank_needs_them_and_sums_once_the_last_has_its_gradients() -> None:
    """Early stages of the pipeline compute the second encoder's only items long after late ones."""
    specs = {"vision": {"params": "step"}, "audio": {"params": "step"}, "llm": {"pp": 4}}
    modules = {m: use(m, 4, **spec) for m, spec in specs.items()}
    active = [{"vision"}] * 5 + [{"vision", "audio"}]
    plan = make_schedule("fill", modules, sink="llm", active=active, options=ScheduleOptions(ahead=6))
    check(plan)
    line, needed = simulate(plan), []
    for program, starts in zip(plan.programs, line.start, strict=True):
        audio = [k for k, a in enumerate(program) if a.module == "audio"]
        assert program[audio[0]].kind is Kind.GATHER
        needed.append(starts[audio[1]])
    gathers = {t.start for t in line.transfers if (t.kind, t.module) == (Kind.GATHER, "audio")}
    assert max(needed) > min(needed) and len(gathers) == 1 and gathers.pop() <= min(needed)
    last: dict[str, float] = {}
    for program, ends in zip(plan.programs, line.end, strict=True):
        for a, end in zip(program, ends, strict=True):
            last[a.module] = max(end * a.last, last.get(a.module, 0.0))
    sums = {t.module: t.start for t in line.transfers if t.kind is Kind.GRAD_SYNC}
    assert sums["vision"] == last["vision"] < sums["audio"] == last["audio"]


def test_collectives_have_their_place_among_the_messages() -> None:
    plan = plan_of("three_phase", 2, 4, {"vision": {}, "llm": {"pp": 2}})  # vision's gathers join both stages
    program = list(plan.programs[0])
    rows = next(a for a in reversed(program) if a.kind is Kind.BOUNDARY_BACKWARD)
    program.remove(rows)
    first = next(k for k, a in enumerate(program) if (a.kind, a.module) == (Kind.BACKWARD, "vision"))
    program.insert(first + 1, rows)
    moved = replace(plan, programs=(tuple(program), plan.programs[1]))
    check(moved, backend="gloo")
    assert find_ring(moved, "each") is None
    with pytest.raises(PlanError, match=r"no common order.*: backward\(vision, 0"):
        check(moved)


@settings(max_examples=60)
@given(any_cases(), st.randoms(use_true_random=False))
def test_the_model_finds_a_ring_where_ranks_that_wait_in_every_action_do_not_finish(
    case: Case, rng: random.Random
) -> None:
    plan = case.plan()
    if rng.random() < 0.3:
        plan = receives_early(plan)
    for _ in range(rng.randrange(3)):
        plan = with_a_transfer_moved(plan, rng)
    try:
        check(plan, backend="gloo")
    except PlanError:
        return
    assert finishes(plan) == (find_ring(plan, "one") is None)
    if finishes(plan):
        assert find_ring(plan, "each") is None


def with_a_transfer_moved(plan: SchedulePlan, rng: random.Random) -> SchedulePlan:
    """The plan with one transfer of one rank started a little earlier or later."""
    p = rng.randrange(len(plan.programs))
    actions = list(plan.programs[p])
    at = [k for k, a in enumerate(actions) if a.kind in POSTED]
    if at:
        k = rng.choice(at)
        a = actions.pop(k)
        actions.insert(max(0, k + rng.randint(-3, 3)), a)
    return replace(plan, programs=(*plan.programs[:p], tuple(actions), *plan.programs[p + 1 :]))


def finishes(plan: SchedulePlan) -> bool:
    """Whether ranks that wait in every action for all of its other ends reach the ends of their lists."""
    lists = {r: list(plan.actions(r)) for r in plan.ranks}
    at = dict.fromkeys(lists, 0)
    moved = True
    while moved:
        moved = False
        for rank in lists:
            if at[rank] == len(lists[rank]):
                continue
            ends = ends_of(plan, rank, lists[rank][at[rank]])
            if all(at[r] < len(lists[r]) and same(lists[r][at[r]], want) for r, want in ends.items()):
                for r in ends:
                    at[r] += 1
                moved = True
    return all(at[r] == len(lists[r]) for r in lists)


def ends_of(plan: SchedulePlan, rank: int, a: Action) -> dict[int, Action]:
    """The ranks that must carry out an action together, each with its own form of it."""
    if a.peer is not None:
        layout = plan.modules[a.module].layout
        line = layout.peers(rank, "pp")
        other = {
            Kind.SEND_FORWARD: Kind.RECV_FORWARD,
            Kind.RECV_FORWARD: Kind.SEND_FORWARD,
            Kind.SEND_BACKWARD: Kind.RECV_BACKWARD,
            Kind.RECV_BACKWARD: Kind.SEND_BACKWARD,
        }[a.kind]
        there = a._replace(kind=other, stage=a.peer, peer=a.stage)
        return {rank: a, line[a.peer % layout.pp]: there}
    joined, todo = {rank}, [rank]
    while todo:
        r = todo.pop()
        for group in a.groups:
            for ranks in plan.instances(group):
                if r in ranks:
                    todo += set(ranks) - joined
                    joined |= set(ranks)
    return dict.fromkeys(joined, a)


def same(a: Action, b: Action) -> bool:
    return (a[:4], a.peer) == (b[:4], b.peer)


def test_groups_of_one_lane_and_no_others_may_share_a_communicator() -> None:
    compute = [Group("module", m, axis) for m in ("a", "b") for axis in ("tp", "cp", "ep", "etp")]
    gathers = [Group("module", "a", "data"), Group("module", "b", "edp")]
    ways: tuple[Direction, ...] = ("forward", "backward")
    pipes = [Group("module", "a", "pp", way) for way in ways]
    edges = [Group("edge", m, direction=way, stage=s) for m in ("a", "pp") for way in ways for s in (0, 1)]
    assert {g.lane for g in compute} == {"compute"} and {g.lane for g in gathers} == {"parameters"}
    lanes = [*(g.lane for g in (*pipes, *edges)), "compute", "parameters", Group("world").lane]
    assert len(set(lanes)) == len(lanes)
    posted = {g for _, a in pipeline_of_two("gpipe", vpp=2) if a.kind in POSTED for g in a.groups}
    assert posted == {Group("module", "llm", "pp", way) for way in ways}
    assert all(a.lane != b.lane for a, b in itertools.combinations(sorted(posted), 2))

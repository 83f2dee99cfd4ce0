"""What make_schedule chooses, keeps to and refuses."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule import (
    Action,
    Costs,
    Group,
    Kind,
    ModuleUse,
    ScheduleOptions,
    SchedulePlan,
    make_schedule,
    simulate,
)
from parallel.schedule.action import BOUNDARY, COMPUTE
from parallel.schedule.checker.check import check
from parallel.schedule.checker.memory import Memory, held_microbatches, peaks
from parallel.topology.data_parallel import Shards
from parallel.topology.layout import make_layout
from tests.parallel.schedule.cases import entries, plan_of, use

F, B = Kind.FORWARD, Kind.BACKWARD


def computed(plan: SchedulePlan, rank: int) -> list[tuple[str, str]]:
    """What a rank computes, short: ("llm", "F0")."""
    return [
        (a.module, f"{a.kind.value[0].upper()}{a.microbatch}")
        for a in plan.actions(rank)
        if a.kind in COMPUTE
    ]


def test_auto_takes_the_schedule_that_fits_the_layout() -> None:
    assert plan_of("auto", 4, 4, {"llm": {"pp": 4}}).kind == "1f1b"
    assert plan_of("auto", 4, 4, {"llm": {"pp": 4, "vpp": 2}}).kind == "interleaved"
    order = " ".join(
        f"{m}:{what}" for m, what in computed(plan_of("auto", 2, 2, {"vision": {}, "llm": {}}), 1)
    )
    assert order == "vision:F0 vision:F1 llm:F0 llm:B0 llm:F1 llm:B1 vision:B0 vision:B1"


def test_ranks_of_one_place_share_one_list() -> None:
    plan = plan_of("auto", 16, 4, {"vision": {"ranks": "0-7"}, "llm": {"ranks": "8-15", "pp": 2, "tp": 2}})
    assert len(plan.programs) == 3
    assert plan.actions(8) is plan.actions(11) and plan.actions(12) is not plan.actions(8)
    assert plan.actions(16) == ()


def test_transfers_name_stage_peer_tag_and_groups() -> None:
    plan = plan_of("interleaved", 4, 4, {"llm": {"pp": 2, "vpp": 2, "tp": 2}})
    onward = Group("module", "llm", "pp", "forward")
    sends = [a for a in plan.actions(0) if a.kind is Kind.SEND_FORWARD]
    assert {(a.stage, a.peer) for a in sends} == {(0, 1), (2, 3)}
    assert all(a.groups == (onward,) for a in sends)
    assert plan.members(onward, 1) == (1, 3) and plan.members(Group("module", "llm", "tp"), 1) == (0, 1)
    receives = [a for a in plan.actions(2) if a.kind is Kind.RECV_FORWARD]
    assert [a.tag for a in sends] == [a.tag for a in receives]
    messages = [(a.tag, a.groups) for a in plan.actions(0) if a.peer is not None]
    assert len(set(messages)) == len(messages)


def test_an_action_is_hashable_data_that_reads_well() -> None:
    group = Group("module", "llm", "pp", "forward")
    a = Action(Kind.SEND_FORWARD, "llm", 3, stage=1, peer=2, groups=(group,))
    assert str(a) == "send_forward(llm.1, 3)" and len({a, a}) == 1
    assert str(Action(F, "vision", 2, span=3)) == "forward(vision, 2-4)"


def test_a_module_without_items_is_skipped_on_all_ranks_alike() -> None:
    modules = {"vision": use("vision", 4), "audio": use("audio", 4, ranks="0-1"), "llm": use("llm", 4, pp=2)}
    active: list[set[str]] = [{"vision"}, {"audio"}, set(), {"vision", "audio"}]
    plan = make_schedule("auto", modules, sink="llm", active=active)
    check(plan)
    for m in ("vision", "audio"):
        here = [{a.microbatch for a in plan.actions(r) if a.module == m} for r in modules[m].layout.ranks]
        assert all(found == {i for i, a in enumerate(active) if m in a} for found in here)


def test_three_phases_and_a_bound_of_micro_batches() -> None:
    layouts = {"vision": {}, "llm": {"pp": 2}}
    plan = plan_of("three_phase", 2, 6, layouts)
    order = [m for m, _ in computed(plan, 0)]
    assert order == ["vision"] * 6 + ["llm"] * 12 + ["vision"] * 6
    assert held_microbatches(plan, "vision") == 6
    for ahead in range(1, 7):  # below 2, the depth of the pipeline, it drains between windows
        assert held_microbatches(plan_of("auto", 2, 6, layouts, ahead=ahead), "vision") <= ahead
    times = [simulate(plan_of("auto", 2, 6, layouts, ahead=ahead)).seconds for ahead in range(1, 7)]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_encoders_take_several_micro_batches_at_once() -> None:
    layouts = {"vision": {}, "llm": {"pp": 2}}
    plan = plan_of("auto", 2, 6, layouts, batch={"vision": 3}, ahead=6)
    check(plan)
    spans = {(a.microbatch, a.span) for a in plan.actions(0) if a.module == "vision" and a.kind is F}
    assert spans == {(0, 3), (3, 3)}
    assert sum(a.kind is Kind.BOUNDARY_FORWARD for a in plan.actions(0)) == 6
    disjoint = plan_of("auto", 2, 5, {"vision": {"ranks": 0}, "llm": {"ranks": 1}}, batch={"vision": 2})
    check(disjoint)
    assert [w for m, w in computed(disjoint, 0)][:2] == ["F0", "F2"]


def test_parameters_are_gathered_once_a_step_on_request() -> None:
    plan = plan_of("auto", 4, 2, {"vision": {"params": "step"}, "llm": {"pp": 2, "params": "replicated"}})
    check(plan)
    found = [str(a) for a in plan.actions(0) if a.kind in (Kind.GATHER, Kind.FREE, Kind.GRAD_SYNC)]
    assert found == ["gather(vision, 0)", "free(vision, 0)"]
    data = Group("module", "vision", "data")
    moved = [a for a in plan.actions(0) if a.kind in COMPUTE and data in a.groups]
    assert moved == [a for a in plan.actions(0) if a.module == "vision" and a.last]  # it sums gradients
    filled = plan_of("fill", 4, 4, {"vision": {"params": "step"}, "llm": {"pp": 2, "params": "replicated"}})
    check(filled)
    for rank in range(4):  # the sum starts once all ranks have their gradients
        at_end = [str(a) for a in filled.actions(rank) if a.module == "vision"][-3:]
        assert at_end[0].startswith("b") and {*at_end[1:]} == {"grad_sync(vision, 0)", "free(vision, 0)"}
    assert all(data not in a.groups for a in filled.actions(0) if a.kind in COMPUTE)
    each = plan_of("auto", 4, 2, {"vision": {}, "llm": {"pp": 2}})
    assert {a.groups for a in each.actions(0) if a.module == "vision" and a.kind is F} == {(data,)}
    sharded = {"vision": {"params": "replicated", "sums": "backward"}, "llm": {"pp": 2}}
    plan = plan_of("auto", 4, 2, sharded)
    check(plan)
    held = {(a.kind, a.groups) for a in plan.actions(0) if a.module == "vision" and a.kind in COMPUTE}
    assert held == {(F, ()), (B, (data,))}


@pytest.mark.parametrize(("seconds", "before"), [(0.0, 0), (0.5, 1), (1.4, 2), (2.5, 4), (9.0, 4)])
def test_a_gather_starts_as_late_as_costs_no_time(seconds: float, before: int) -> None:
    """The language model computes after four forwards of the encoder, of a second each."""
    specs = {"vision": {"params": "step"}, "llm": {"params": "step"}}
    costs = Costs(transfer={("llm", Kind.GATHER): seconds})
    plan = plan_of("three_phase", 2, 4, specs, costs=costs)
    check(plan)
    found = [(a.kind, a.module) for a in plan.actions(0) if a.kind in (Kind.GATHER, F)]
    between = found[found.index((Kind.GATHER, "llm")) : found.index((F, "llm"))]
    assert between.count((F, "vision")) == before


def test_a_gather_starts_later_where_memory_does_not_allow_it() -> None:
    """The encoder's weights are freed before those of the language model are gathered."""
    specs = {"vision": {"params": "step"}, "llm": {"params": "step"}}
    costs = Costs(transfer={("llm", Kind.GATHER): 1.4})
    memory = Memory(whole={("vision", 0): 10.0, ("llm", 0): 10.0})
    options: dict[str, Any] = {"costs": costs, "memory": memory, "train": False, "slack": False, "ahead": 4}
    early = plan_of("auto", 2, 4, specs, **options)
    late = plan_of("auto", 2, 4, specs, limit=15.0, **options)
    assert [peak.bytes for peak in (*peaks(early, memory), *peaks(late, memory))] == [20.0, 10.0]
    assert simulate(late, costs).seconds == simulate(early, costs).seconds + 1.4


def test_copies_of_shards_are_summed_once_a_step() -> None:
    """In nodes of 4 ranks: the data ranks of dense weights are 2 x 2, those of an expert on two nodes."""
    spec = {"tp": 2, "ep": 2, "shards": Shards(2, 1), "sums": "backward"}
    plan = plan_of("auto", 8, 2, {"llm": spec})
    check(plan)
    groups = [[g.axis for g in a.groups if g.lane == "parameters"] for a in plan.actions(0)]
    near = ["data_shard"]
    assert groups == [near, near, near, ["data_shard", "data_replica", "edp"]]
    assert [a.last for a in plan.actions(0)] == [False, False, False, True]
    assert plan.instances(Group("module", "llm", "data_replica")) == ((0, 4), (2, 6), (1, 5), (3, 7))


def test_whole_experts_have_data_ranks_of_their_own_under_tensor_parallelism() -> None:
    plan = plan_of("auto", 4, 1, {"llm": {"tp": 2, "experts": True}})
    check(plan)
    assert {g.axis for a in plan.actions(0) for g in a.groups} == {"data", "edp", "tp"}
    assert plan.instances(Group("module", "llm", "edp")) == ((0, 1, 2, 3),)


def filled(m: int, pp: int, share: float, **options: Any) -> tuple[float, float, float]:
    """(seconds without encoder, filled, with encoder work at common moments) for an encoder of `share` of the
    language model's cost."""
    costs = Costs({("vision", F): share, ("vision", B): 2 * share})
    specs = {"vision": {"params": "step"}, "llm": {"pp": pp}}
    alone = simulate(plan_of("auto", pp, m, {"llm": {"pp": pp}}), costs).seconds
    plan = plan_of("fill", pp, m, specs, costs=costs, ahead=m)
    check(plan)
    common = plan_of("three_phase", pp, m, specs, costs=costs)
    return alone, simulate(plan, costs).seconds, simulate(common, costs).seconds


@pytest.mark.parametrize(
    ("m", "pp", "share", "least"), [(8, 2, 0.25, 0.7), (8, 4, 0.4, 0.5), (16, 4, 0.5, 0.95)]
)
def test_encoder_work_fills_the_bubble(m: int, pp: int, share: float, least: float) -> None:
    alone, fill, common = filled(m, pp, share)
    bubble, work = 3.0 * (pp - 1), 3 * share * m
    hidden = (alone + work - fill) / min(bubble, work)
    assert least <= hidden <= 1 + 1e-9
    assert fill < common


@st.composite
def beside(draw: st.DrawFn, module: str, pp: int, dp: int) -> ModuleUse:
    """An encoder on ranks of a pipeline of pp stages of dp ranks, on some of them, or on a rank of its own;
    with stages of its own or without."""
    ranks = list(range(pp * dp))
    ranks = draw(st.sampled_from([ranks, ranks, ranks[:dp], ranks[dp:], ranks[::dp], [pp * dp]]))
    stages = draw(st.sampled_from([d for d in (1, 1, 2) if len(ranks) % d == 0]))
    params = draw(st.sampled_from(["step", "replicated"]))
    return use(module, pp * dp + 1, ranks=ranks, pp=stages, params=params)


@st.composite
def fillable(
    draw: st.DrawFn,
) -> tuple[dict[str, ModuleUse], list[set[str]], dict[str, int], int | None, Costs]:
    pp, vpp, dp = draw(st.integers(2, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    world = pp * dp + 1  # one rank is not the language model's
    names = draw(st.sampled_from([["vision"], ["vision", "audio"]]))
    modules = {m: draw(beside(m, pp, dp)) for m in names}
    enters = draw(entries(make_layout("llm", pp * dp, {"pp": pp, "vpp": vpp})))
    modules["vision"] = replace(modules["vision"], frozen=draw(st.booleans()), enters=enters)
    modules["llm"] = use("llm", world, ranks=f"0-{world - 2}", pp=pp, vpp=vpp, frozen=draw(st.booleans()))
    m = draw(st.integers(1, 9))
    active = [draw(st.sets(st.sampled_from(names))) for _ in range(m)]
    batch = {name: draw(st.integers(1, 2)) for name in names}
    share = draw(st.floats(0.05, 2.0))
    rows = {(m, kind): 0.1 for m in names for kind in BOUNDARY}
    costs = Costs({("vision", F): share, ("vision", B): 2 * share, ("audio", F): share / 2}, rows)
    return modules, active, batch, draw(st.sampled_from([None, 8, 40])), costs


@pytest.mark.parametrize("kind", ["interleaved", "zero_bubble", "three_phase"])
def test_a_last_round_of_fewer_micro_batches_costs_no_more_than_a_whole_one(kind: str) -> None:
    for pp, vpp in ((2, 2), (4, 2), (4, 3)):
        times = []
        for m in range(1, 3 * pp + 1):
            plan = plan_of(kind, pp, m, {"llm": {"pp": pp, "vpp": vpp}})
            check(plan)
            times.append(simulate(plan).seconds)
        assert times == sorted(times)
        for m in range(pp + 1, 2 * pp):  # and no less than its share of the work, which all stages share
            assert times[m - 1] <= times[2 * pp - 1] and times[m - 1] >= times[pp - 1] + 3 * (m - pp)


def test_fill_hides_encoders_with_stages_of_their_own_on_some_ranks_and_beside_others() -> None:
    """What fill takes longer than the pipeline alone, as a share of what it takes longer without."""
    costs = Costs({(m, kind): n for m in ("vision", "audio") for kind, n in ((F, 0.25), (B, 0.5))})
    audio = {"audio": {"ranks": 4}}
    for most, specs in (
        (0.34, {"vision": {"ranks": "0-3"}, **audio}),
        (0.67, {"vision": {"ranks": "0-3", "pp": 2}}),
        (0.40, {"vision": {"ranks": "0-1"}}),
        (1.00, {"vision": {"ranks": "2-3", "pp": 2}, **audio}),  # late ranks are idle at the start anyway
    ):
        modules = {m: use(m, 5, params="step", **spec) for m, spec in specs.items()}
        modules["llm"] = use("llm", 5, ranks="0-3", pp=4)
        rest: dict[str, Any] = {"sink": "llm", "active": [set(specs)] * 8}
        found = {}
        for kind in ("auto", "fill"):
            plan = make_schedule(kind, modules, **rest, options=ScheduleOptions(8, costs=costs))
            check(plan)
            found[kind] = simulate(plan, costs).seconds
        alone = simulate(plan_of("1f1b", 4, 8, {"llm": {"pp": 4}}), costs).seconds
        assert (found["fill"] - alone) / (found["auto"] - alone) <= most + 1e-9


def test_encoders_have_virtual_stages() -> None:
    apart = {"vision": {"ranks": "0-1", "pp": 2, "vpp": 2}, "llm": {"ranks": "2-3", "pp": 2, "vpp": 2}}
    together = {"vision": {"pp": 2, "vpp": 2}, "llm": {"pp": 2}}
    for world, specs in ((4, apart), (2, together)):
        plan = plan_of("auto", world, 6, specs)
        check(plan)
        stages = {
            r: {a.stage for a in plan.actions(r) if a.module == "vision" and a.kind is F} for r in (0, 1)
        }
        assert stages == {0: {0, 2}, 1: {1, 3}}


@settings(max_examples=25)
@given(fillable())
def test_filled_plans_pass_and_are_never_slower(case: Any) -> None:
    modules, active, batch, ahead, costs = case
    options = ScheduleOptions(ahead, batch, costs)
    rest: dict[str, Any] = {"sink": "llm", "active": active, "options": options}
    plan = make_schedule("fill", modules, **rest)
    check(plan)
    home = set(modules["llm"].layout.ranks)
    for m in plan.sources:
        if not modules[m].frozen and home & set(modules[m].layout.ranks):
            assert plan.ahead is not None and held_microbatches(plan, m) <= plan.ahead
    assert (
        simulate(plan, costs).seconds
        <= simulate(make_schedule("auto", modules, **rest), costs).seconds + 1e-9
    )


def test_filled_orders_that_get_stuck_are_left_out() -> None:
    """Ranks 0 and 1 have different stages of vision, and meet in every gather of the language model."""
    specs = {"vision": {"ranks": "0-1", "pp": 2, "params": "step"}, "audio": {"params": "step"}}
    rng = random.Random(1)
    for _ in range(12):
        costs = Costs({(m, k): rng.choice([0.1, 0.5, 1.0, 3.0]) for m in specs for k in (F, Kind.BACKWARD)})
        check(plan_of("fill", 4, rng.randint(6, 9), {**specs, "llm": {"pp": 2}}, costs=costs))


LLM = {"llm": {"pp": 4, "vpp": 2}}


@pytest.mark.parametrize(
    ("kind", "m", "specs", "options", "message"),
    [
        ("1f1b", 4, LLM, {}, r"vpp=2; nearest: schedule.kind=interleaved or layout.llm.vpp=1"),
        ("interleaved", 4, {"llm": {"pp": 4}}, {}, r"vpp=1; nearest: schedule.kind=1f1b"),
        ("zerobubble", 4, LLM, {}, r"given 'zerobubble'; known: auto, .*did you mean zero_bubble\?"),
        ("auto", 0, LLM, {}, r"at least one micro-batch, given 0"),
        (
            "auto",
            8,
            {"vision": {}, "llm": {}},
            {"ahead": 1, "batch": {"vision": 2}},
            r"take 2 at once; needed: at",
        ),
        (
            "fill",
            4,
            {"vision": {}, "llm": {}},
            {},
            r"layout.llm.pp=1, which has none; nearest: schedule.kind=auto",
        ),
        (
            "fill",
            4,
            {"vision": {}, "llm": {"pp": 4}},
            {},
            r"vision at different times.*gathers weights in each.*nearest: layout.vision.data_parallel=step",
        ),
        (
            "fill",
            4,
            {"vision": {"ranks": "0-1"}, "llm": {"ranks": "1-2", "pp": 2}},
            {},
            r"given vision on \[0, 1\] and llm on \[1, 2\]; nearest: schedule.kind=auto",
        ),
        (
            "fill",
            4,
            {"vision": {"tp": 4}, "llm": {"pp": 4}},
            {},
            r"vision.tp=4 joins ranks \[0, 1, 2, 3\].*vision.tp=1",
        ),
    ],
)
def test_refusals_give_numbers_and_what_works(
    kind: str, m: int, specs: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(kind, 4, m, specs, **options)


def test_more_stages_than_layers_are_refused() -> None:
    llm = use("llm", 4, pp=4, vpp=2)
    with pytest.raises(
        ValueError, match=r"pp=4 x vpp=2 makes 8 stages, but it has 6 layers.*nearest: pp=2 or vpp=1"
    ):
        make_schedule("auto", {"llm": ModuleUse(llm.layout, layers=6)}, sink="llm", active=[()] * 4)
    with pytest.raises(ValueError, match=r"pp=4 makes 4 stages, but it has 3 layers.*nearest: pp=2"):
        vision = ModuleUse(use("vision", 4, pp=4).layout, layers=3)
        make_schedule("auto", {"vision": vision, "llm": use("llm", 4)}, sink="llm", active=[()] * 4)


def test_items_of_an_unknown_source_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"micro-batch 1 has items of \['touch'\]; the sources are \['vision'\]"
    ):
        modules = {"vision": use("vision", 1), "llm": use("llm", 1)}
        make_schedule("auto", modules, sink="llm", active=[(), {"touch"}])


def test_a_bound_on_memory_names_what_keeps_to_it() -> None:
    modules = {"vision": use("vision", 4), "llm": use("llm", 4, pp=4)}
    rest: dict[str, Any] = {"sink": "llm", "active": [{"vision"}] * 8}
    memory = Memory({"vision": 3.0, "llm": 1.0})
    with pytest.raises(
        ValueError, match=r"rank 0 holds .*bound of 10; nearest: schedule.ahead=2, or a bound of"
    ):
        make_schedule("auto", modules, **rest, options=ScheduleOptions(8, limit=10, memory=memory))
    plan = make_schedule("auto", modules, **rest, options=ScheduleOptions(2, limit=10, memory=memory))
    assert max(peak.bytes for peak in check(plan, memory=memory)) <= 10
    with pytest.raises(ValueError, match=r"vision 3, llm 1.*bound of 3; nearest: a bound of 4"):
        make_schedule("sequential", modules, **rest, options=ScheduleOptions(limit=3, memory=memory))
    with pytest.raises(
        ValueError, match=r"llm 8.*bound of 4; nearest: schedule.kind=sequential, or a bound of 8"
    ):
        alone, options = {"llm": modules["llm"]}, ScheduleOptions(limit=4)
        make_schedule("gpipe", alone, sink="llm", active=[()] * 8, options=options)

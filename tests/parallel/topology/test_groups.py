"""The groups of a job, derived from its layouts: who is in them, which are one, how many have to be made."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.topology.data_parallel import Shards
from parallel.topology.groups import (
    WORLD,
    Group,
    GroupPlan,
    Ranks,
    along,
    data_axes,
    group_plan,
    size_along,
)
from parallel.topology.layout import Layout, make_layout
from tests.parallel.schedule.cases import Case, cases

MODULES = ("vision", "audio", "llm")


def random_layouts(seed: int, world: int) -> dict[str, Layout]:
    """Layouts on any ranks in any order."""
    rng = random.Random(seed)
    out = {}
    for m in MODULES:
        n = rng.choice([d for d in (1, 2, 3, 4, 6, 8, 12) if d <= world])
        ranks = rng.choice([list(range(n)), rng.sample(range(world), n), list(range(world - n, world))])
        pp = rng.choice([d for d in (1, 2, 4) if n % d == 0])
        left = n // pp
        tp = rng.choice([d for d in (1, 2, 3) if left % d == 0])
        cp = rng.choice([d for d in (1, 2) if left // tp % d == 0])
        ep = rng.choice([d for d in (1, 2, 4) if left % d == 0])
        etp = rng.choice([d for d in (1, 2) if left // ep % d == 0])
        vpp = rng.choice([1, 2]) if pp > 1 and m == "llm" else 1
        out[m] = make_layout(
            m, world, {"ranks": ranks, "tp": tp, "cp": cp, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp}
        )
    return out


def derived(layouts: dict[str, Layout], world: int) -> GroupPlan:
    edges = [("vision", 0), ("audio", 0), ("vision", layouts["llm"].pp - 1)]
    return group_plan(layouts, world=world, edges=list(dict.fromkeys(edges)), sink="llm", tied=("llm",))


def expected(layout: Layout, axis: str, rank: int) -> Ranks:
    """Brute force: the ranks whose other coordinates are those of `rank`, in mesh order."""
    if axis == "ends":
        same = expected(layout, "pp", rank)
        return (same[0], same[-1])
    view = layout.expert_coord if axis in ("edp", "ep", "etp") else layout.coord
    free = {"data": {"dp", "cp"}, "stage": {"dp", "cp", "tp"}}.get(axis, {axis})

    def fixed(r: int) -> dict[str, int]:
        return {k: v for k, v in view(r)._asdict().items() if k not in free}

    return tuple(r for r in layout.ranks if fixed(r) == fixed(rank))


@given(seed=st.integers(0, 2**32), world=st.sampled_from([1, 2, 4, 12]))
def test_groups_are_those_of_the_coordinates_and_each_is_made_once(seed: int, world: int) -> None:
    layouts = random_layouts(seed, world)
    plan = derived(layouts, world)
    for name, groups in plan.named.items():
        members = [r for g in groups for r in g]
        assert len(members) == len(set(members)), f"{name}: a rank is in two groups"
        assert all(len(g) > 1 for g in groups), name
    for m, layout in layouts.items():
        for rank in layout.ranks:
            own = plan.of_rank(rank)
            for axis in ("data", "edp", "tp", "cp", "ep", "etp", "stage", "ends"):
                ranks = expected(layout, axis, rank)
                found = own.get(Group("module", m, axis))
                wanted = len(ranks) > 1 and rank in ranks
                if axis == "ends":
                    wanted = wanted and m == "llm" and layout.pp > 1
                if axis == "edp" and max(layout.tp, layout.ep, layout.etp) == 1:
                    wanted = False  # it is the group of the dense weights
                assert found == (ranks if wanted else None), (m, axis, rank)
            for way in ("forward", "backward"):
                ranks = expected(layout, "pp", rank)
                assert own.get(Group("module", m, "pp", way)) == (ranks if len(ranks) > 1 else None)
    made = [(name.lane, g) for name, groups in plan.families for g in groups]
    everyone = (WORLD.lane, tuple(range(world)))
    assert len(made) == len(set(made)) and everyone not in made
    needed = {(name.lane, g) for name, groups in plan.named.items() for g in groups}
    assert needed - {everyone} == set(made)


@settings(max_examples=60)
@given(cases())
def test_every_group_that_a_schedule_names_is_there(case: Case) -> None:
    schedule = case.plan()
    layouts = {m: use.layout for m, use in schedule.modules.items()}
    edges = [(s, stage) for s in schedule.sources for stage in schedule.modules[s].enters]
    shards = {m: use.shards for m, use in schedule.modules.items() if use.shards is not None}
    world = max(schedule.ranks) + 1
    plan = group_plan(layouts, world=world, edges=edges, sink=schedule.sink, shards=shards)
    for name in {g for _, a in schedule for g in a.groups} - {WORLD}:
        several = tuple(ranks for ranks in schedule.instances(name) if len(ranks) > 1)
        assert several == plan.named.get(name, ()), name


@given(cases())
def test_shards_and_replicas_of_them_divide_the_data_ranks(case: Case) -> None:
    """A rank of each data group is in one group of shards and in one of replicas, which meet in it alone."""
    for use in case.modules.values():
        for axis in ("data", "edp"):
            wanted = size_along(use.layout, axis)
            if use.shards is not None:
                wanted = use.shards.dense if axis == "data" else use.shards.expert
            shard, replica = data_axes(use.layout, axis, use.shards)
            share = along(use.layout, shard, use.shards) if shard else ()
            same = along(use.layout, replica, use.shards) if replica else ()
            for line in along(use.layout, axis):
                for place, rank in enumerate(line):
                    near = next((g for g in share if rank in g), (rank,))
                    far = next((g for g in same if rank in g), (rank,))
                    assert len(near) == wanted and len(near) * len(far) == len(line)
                    assert set(near) & set(far) == {rank} and {*near, *far} <= set(line)
                    assert near.index(rank) == place % wanted, "FSDP counts shards in the order of data ranks"


def test_names_where_nodes_have_copies() -> None:
    layout = make_layout("llm", 8, {"tp": 2, "ep": 2})
    named = group_plan({"llm": layout}, world=8, shards={"llm": Shards(2, 1)}).named
    found = {name.axis: ranks for name, ranks in named.items() if name.lane == "parameters"}
    assert found == {
        "data_shard": ((0, 2), (4, 6), (1, 3), (5, 7)),
        "data_replica": ((0, 4), (2, 6), (1, 5), (3, 7)),
        "edp": ((0, 2, 4, 6), (1, 3, 5, 7)),
    }


def test_groups_of_one_lane_and_the_same_ranks_in_one_order_are_one() -> None:
    tp = {"tp": 2}
    layouts = {
        "a": make_layout("a", 4, tp),
        "b": make_layout("b", 4, tp),
        "c": make_layout("c", 4, {"ranks": [1, 0, 2, 3], "tp": 2}),
    }
    plan = group_plan(layouts, world=4)
    made = {str(name): groups for name, groups in plan.families}
    assert made["a.tp"] == ((0, 1), (2, 3)) and "b.tp" not in made
    assert made["c.tp"] == ((1, 0),), "another order is another group, the rest is shared"
    assert made["a.data"] == ((0, 2), (1, 3)) and "b.data" not in made
    assert "a.stage" not in made and made["c.stage"] == ((1, 0, 2, 3),), "all ranks: the default group"
    assert plan.of_rank(1)[Group("module", "b", "tp")] == (0, 1)


def test_directions_are_never_one() -> None:
    plan = group_plan({"a": make_layout("a", 2, {"pp": 2}), "b": make_layout("b", 2, {"pp": 2})}, world=2)
    assert [str(name) for name, _ in plan.families] == [
        "a.pp.forward", "a.pp.backward", "b.pp.forward", "b.pp.backward",
    ]  # fmt: skip


@pytest.mark.parametrize("world", [8, 64, 1024, 4096])
def test_how_many_groups_a_rank_is_in_does_not_grow_with_the_job(world: int) -> None:
    alone = group_plan({"vision": Layout("vision", tuple(range(world)))}, world=world)
    assert len(alone.families) == 1 and alone.most_by_kind()["all"] == 2
    every = tuple(range(world))
    layouts = {
        "vision": Layout("vision", every),
        "audio": Layout("audio", every, tp=2),
        "llm": Layout("llm", every, tp=2, cp=2, pp=2, ep=2, etp=2),
    }
    plan = derived(layouts, world)
    assert len(plan.families) <= 21 and plan.most_by_kind()["all"] <= 22


def test_what_crosses_nodes() -> None:
    plan = group_plan({"llm": make_layout("llm", 8, {"tp": 2, "pp": 2})}, world=8)
    crossing = {str(name): n for name, n in plan.crossing(4).items()}
    assert crossing == {"world": 1, "llm.pp.forward": 4, "llm.pp.backward": 4}
    assert {str(name) for name in plan.crossing(2)} == {
        "world", "llm.data", "llm.edp", "llm.stage", "llm.pp.forward", "llm.pp.backward",
    }  # fmt: skip

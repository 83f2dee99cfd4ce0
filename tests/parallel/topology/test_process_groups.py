"""Making the groups: how many calls, in which order, by whom, and who is named when one is missing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.topology import process_groups
from parallel.topology.data_parallel import Shards
from parallel.topology.groups import WORLD, Group, group_plan
from parallel.topology.layout import Layout, make_layout
from parallel.topology.mesh import build_mesh
from parallel.topology.process_groups import make_groups

TP, DATA = Group("module", "llm", "tp"), Group("module", "llm", "data")


@pytest.fixture
def fake() -> Iterator[Any]:
    """fake(rank, world): this process as a rank of a job that sends nothing."""

    def start(rank: int, world: int) -> None:
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())

    yield start
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [8, 64, 1024, 4096])
def test_a_rank_makes_few_groups_however_large_the_job(
    world: int, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(world - 3, world)
    calls = []
    make = c10d._new_process_group_helper

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(named.get("group_name") or given[5])
        return make(*given, **named)

    monkeypatch.setattr(c10d, "_new_process_group_helper", counted)
    every = tuple(range(world))
    layouts = {
        "vision": Layout("vision", every),
        "audio": Layout("audio", every[world // 2 :]),
        "llm": Layout("llm", every, tp=2, pp=2, ep=min(64, world // 2)),
    }
    start = time.process_time()
    edges = [("vision", 0), ("audio", 0)]
    groups = make_groups(group_plan(layouts, world=world, edges=edges, sink="llm"), timeout_s=9.0)
    meshes = {m: build_mesh(layout, "cpu", groups=groups) for m, layout in layouts.items()}
    seconds = time.process_time() - start
    print(f"rank {world - 3} of {world}: {len(calls)} groups, {seconds * 1e3:.0f} ms")
    assert len(set(calls)) == len(calls) <= 16  # one of them of this rank alone
    assert seconds < 2.0
    llm, vision = meshes["llm"], meshes["vision"]
    assert llm is not None and vision is not None
    assert vision.stage is dist.group.WORLD and vision.dense.mesh_dim_names == ("data",)
    assert llm.dense.mesh_dim_names == ("data", "tp") and llm.axes.tp.rank == (world - 3) % 2
    assert dist.get_process_group_ranks(groups[DATA]) == list(layouts["llm"].peers(world - 3, ("cp", "dp")))
    groups.close()


def test_axes_of_one_rank_share_a_group_that_sends_nothing(fake: Any) -> None:
    fake(5, 8)
    layouts = {m: make_layout(m, 8, {"ranks": "4-7", "tp": 4}) for m in ("a", "b")}
    groups = make_groups(group_plan(layouts, world=8), timeout_s=9.0)
    a, b = (build_mesh(layout, "cpu", groups=groups) for layout in layouts.values())
    assert a is not None and b is not None
    assert a.data.size() == 1 and a.data.get_group() is b.data.get_group() is groups.alone()
    assert dist.get_process_group_ranks(groups.alone()) == [5]
    assert a.axes.tp.group is b.axes.tp.group and a.axes.cp.group is None
    groups.close()


@pytest.mark.parametrize(
    ("shards", "dims"),
    [
        (Shards(2, 1), {"replica": [3, 7], "data": [1, 3], "tp": [2, 3]}),
        (Shards(1, 1), {"replica": [1, 3, 5, 7], "data": [3], "tp": [2, 3]}),
        (None, {"data": [1, 3, 5, 7], "tp": [2, 3]}),
    ],
)
def test_meshes_of_copies(shards: Shards | None, dims: dict[str, list[int]], fake: Any) -> None:
    fake(3, 8)
    mesh = build_mesh(make_layout("llm", 8, {"tp": 2, "ep": 2}), "cpu", shards=shards)
    assert mesh is not None and mesh.expert is not None
    assert mesh.dense.mesh_dim_names == tuple(dims)
    assert {n: dist.get_process_group_ranks(mesh.dense.get_group(n)) for n in dims} == dims
    for view in (mesh.dense, mesh.expert):
        places = [view.get_group(k).rank() for k in range(view.ndim)]
        assert list(view.get_coordinate() or ()) == places, "FSDP and DTensor agree"
    assert mesh.replicas("dense") == len(dims.get("replica", [3]))
    assert mesh.expert.mesh_dim_names == (("replica", "edp", "ep") if shards else ("edp", "ep"))
    over = [dist.get_process_group_ranks(group) for group in mesh.data_groups]
    assert over == [ranks for name, ranks in dims.items() if name != "tp" and len(ranks) > 1]
    mesh.close()


class Recorder:
    """Stands in for the calls that make groups on a device, and writes them down."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[Any]]] = []

    def split_group(self, *, split_ranks: list[list[int]], **named: Any) -> Any:
        self.calls.append(("split", split_ranks))
        rank = dist.get_rank()
        return next((("split", tuple(g)) for g in split_ranks if rank in g), None)

    def new_group(self, ranks: list[int], sort_ranks: bool = True, **named: Any) -> Any:
        assert not sort_ranks
        self.calls.append(("new", ranks))
        return ("new", tuple(ranks))


def test_bound_to_a_device_all_ranks_make_the_same_calls_one_a_family(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The calls of every rank of a job, whose default group is taken to be bound."""
    layouts = {
        "vision": make_layout("vision", 8, {"ranks": "0-3"}),
        "audio": make_layout("audio", 8, {"ranks": [7, 5, 6, 4], "tp": 2}),
        "llm": make_layout("llm", 8, {"tp": 2, "pp": 2}),
    }
    plan = group_plan(layouts, world=8, edges=[("vision", 0)], sink="llm", experts=())
    by_rank = []
    for rank in range(8):
        dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
        recorder = Recorder()
        with monkeypatch.context() as patch:
            patch.setattr(process_groups, "_bound", lambda: True)
            patch.setattr(dist, "split_group", recorder.split_group)
            patch.setattr(dist, "new_group", recorder.new_group)
            groups = make_groups(plan, timeout_s=9.0)
            for name, ranks in groups:
                if name != WORLD:
                    made: Any = groups[name]
                    assert made[1] == ranks and rank in ranks, name
        by_rank.append(recorder.calls)
        dist.destroy_process_group()
    assert all(calls == by_rank[0] for calls in by_rank)
    assert sum(kind == "split" for kind, _ in by_rank[0]) == len(plan.families) - 3
    # Splitting would sort these: they are made one by one, in their order.
    one_by_one = [tuple(ranks) for kind, ranks in by_rank[0] if kind == "new"]
    assert one_by_one == [(7, 6), (5, 4), (7, 5), (6, 4), (7, 5, 6, 4)]
    for kind, ranks in by_rank[0]:
        flat = [r for g in ranks for r in g] if kind == "split" else ranks
        assert len(flat) == len(set(flat)), "groups of a family are disjoint"


def sums() -> dict[str, tuple[list[int], float]]:
    """Of each group of this rank: its ranks in order, and the sum of their numbers."""
    layouts = {
        "vision": make_layout("vision", 4, {"ranks": [0, 1]}),
        "audio": make_layout("audio", 4, {"ranks": [0, 2]}),
        "llm": make_layout("llm", 4, {"ranks": [3, 1, 0, 2], "tp": 2, "pp": 2}),
    }
    # Ranks are in 3 to 8 groups each: names that count a process's own groups would differ.
    edges = [("audio", 0), ("vision", 0), ("vision", 1)]
    plan = group_plan(layouts, world=4, edges=edges, sink="llm", tied=("llm",))
    out = {}
    for _ in range(2):  # a later job of the same processes
        groups = make_groups(plan, timeout_s=20.0)
        for name, ranks in groups:
            x = torch.tensor([2.0 ** dist.get_rank()])
            dist.all_reduce(x, group=groups[name])
            group = groups[name]
            assert dist.get_process_group_ranks(group) == list(ranks)
            assert group.rank() == ranks.index(dist.get_rank())
            out[str(name)] = list(ranks), float(x)
        distinct = {id(groups[name]) for name, _ in groups}
        assert len(distinct) == len({(name.lane, ranks) for name, ranks in groups})
        dist.barrier()
        groups.close()
    return out


def test_members_meet_though_they_are_in_unequal_numbers_of_groups(ranks: Any) -> None:
    for rank, found in enumerate(ranks(4, sums)):
        assert found["llm.tp"][0] == [[0, 2], [3, 1]][rank % 2]
        for name, (members, total) in found.items():
            assert total == sum(2**r for r in members), (rank, name)


def messages_of_two_lanes() -> list[float]:
    """The same two ranks in the groups of two directions: each message stays in its own."""
    plan = group_plan({"llm": make_layout("llm", 2, {"pp": 2})}, world=2)
    groups = make_groups(plan, timeout_s=20.0)
    lanes = [groups[Group("module", "llm", "pp", way)] for way in ("forward", "backward")]
    peer, out = 1 - dist.get_rank(), []
    if dist.get_rank() == 0:
        sent = [torch.tensor([1.0]), torch.tensor([2.0])]
        works = [dist.isend(x, peer, group=lane) for lane, x in zip(lanes, sent, strict=True)]
        for work in works:
            assert work is not None
            work.wait()
    else:
        for lane in reversed(lanes):
            x = torch.zeros(1)
            dist.recv(x, peer, group=lane)
            out.append(float(x))
    dist.barrier()
    groups.close()
    return out


def test_two_lanes_of_the_same_ranks_do_not_mix(ranks: Any) -> None:
    assert ranks(2, messages_of_two_lanes)[1] == [2.0, 1.0]


def without_one() -> str:
    """What the others say where rank 2 does not come."""
    store = dist.distributed_c10d._get_default_store()
    plan = group_plan({"llm": make_layout("llm", 3, {"ranks": [2, 0, 1]})}, world=3)
    if dist.get_rank() == 2:
        time.sleep(4.0)  # its store must answer until the others have given up
        return ""
    with pytest.raises(RuntimeError) as caught:
        make_groups(plan, timeout_s=1.5, store=store)
    return str(caught.value)


def test_a_rank_that_does_not_come_is_named(ranks: Any) -> None:
    first, second, _ = ranks(3, without_one)
    for text in (first, second):
        assert "llm.data" in text and "not made within 1.5 s; not yet there: rank 2" in text, text

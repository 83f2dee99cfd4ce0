"""The first use of every group: whom each rank meets in which round, and who is named when one is missing."""

from __future__ import annotations

import random
import time
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.comm.warm_up import PEERS, Ends, Round, rounds, warm_up
from parallel.schedule.action import SENDS
from parallel.topology.groups import Group, Ranks, edge_ranks, group_plan
from parallel.topology.layout import make_layout
from parallel.topology.process_groups import make_groups
from tests.parallel.schedule.cases import Case, cases

FORWARD, BACKWARD = (Group("edge", "vision", "", way) for way in ("forward", "backward"))


def connected(name: Group, ranks: Ranks, ends: Ends | None = None, node_size: int | None = None) -> set[Any]:
    """(sender, receiver) of all messages of a group, each of which must be in one round at both ends."""
    by_rank = {r: list(rounds(name, ranks, r, ends, node_size)) for r in ranks}
    most = max(map(len, by_rank.values()))
    found = set()
    for i in range(most):
        now: dict[int, Round] = {r: own[i] for r, own in by_rank.items() if i < len(own)}
        sent = {(r, each.to) for r, each in now.items() if each.to is not None}
        received = {(each.source, r) for r, each in now.items() if each.source is not None}
        assert sent == received and all(a != b for a, b in sent), (i, sent ^ received)
        assert node_size or not sent & found, "once"
        found |= sent
    return found


@given(
    n=st.integers(1, 9), m=st.integers(1, 9), node_size=st.sampled_from([None, 2, 3]), seed=st.integers(0, 99)
)
def test_an_edge_connects_every_source_with_every_sink(
    n: int, m: int, node_size: int | None, seed: int
) -> None:
    rng = random.Random(seed)
    source, sink = (tuple(rng.sample(range(12), k)) for k in (n, m))
    ranks = tuple(sorted({*source, *sink}))
    for name, senders, readers in ((FORWARD, source, sink), (BACKWARD, sink, source)):
        found = connected(name, ranks, Ends(source, sink), None)
        assert found == {(a, b) for a, b in product(senders, readers) if a != b}
        if node_size is not None:
            near = {(a, b) for a, b in product(readers, readers) if a // node_size == b // node_size}
            both = connected(name, ranks, Ends(source, sink), node_size)
            assert both == found | {(a, b) for a, b in near if a != b}


def test_a_large_edge_connects_a_bounded_number() -> None:
    source, sink = tuple(range(200)), tuple(range(100, 300))
    found = connected(FORWARD, tuple(range(300)), Ends(source, sink))
    assert max(sum(a == r for a, _ in found) for r in source) <= PEERS
    assert len(found) > 0.9 * PEERS * 200


@given(n=st.integers(2, 9), seed=st.integers(0, 99))
def test_a_context_axis_connects_every_pair(n: int, seed: int) -> None:
    ranks = tuple(random.Random(seed).sample(range(20), n))
    assert connected(Group("module", "llm", "cp"), ranks) == {(a, b) for a in ranks for b in ranks if a != b}


def test_a_pipeline_is_connected_in_the_direction_of_its_messages() -> None:
    line = (5, 2, 7, 1)
    for direction, step in (("forward", 1), ("backward", -1)):
        found = connected(Group("module", "llm", "pp", direction), line)
        assert found == {(line[i], line[(i + step) % 4]) for i in range(4)}


@settings(max_examples=60)
@given(cases())
def test_every_message_of_a_pipeline_is_connected_before_the_first_step(case: Case) -> None:
    plan = case.plan()
    for rank in plan.ranks:
        for action in plan.actions(rank):
            if action.kind in SENDS:
                assert action.peer is not None
                layout, name = plan.modules[action.module].layout, action.groups[0]
                line = plan.members(name, rank)
                to = {each.to for each in rounds(name, line, rank)}
                assert line[action.peer % layout.pp] in to, (rank, action)


def uses() -> int:
    """A job's groups, all used once by every member; how many."""
    layouts = {
        "vision": make_layout("vision", 4, {"ranks": [3, 1], "cp": 2}),
        "llm": make_layout("llm", 4, {"ranks": [3, 1, 0, 2], "tp": 2, "pp": 2, "ep": 2}),
    }
    plan = group_plan(layouts, world=4, edges=[("vision", 0)], sink="llm", tied=("llm",))
    groups = make_groups(plan, timeout_s=20.0)
    ends = Ends(layouts["vision"].ranks, layouts["llm"].stage_ranks(0))
    assert edge_ranks(*layouts.values(), 0) == tuple(sorted({*ends.source, *ends.sink}))
    warm_up(groups, torch.device("cpu"), {("vision", 0): ends}, node_size=2)
    dist.barrier()
    n = len(list(groups))
    groups.close()
    return n


def test_all_groups_of_a_job_are_used(ranks: Any) -> None:
    assert min(ranks(4, uses)) > 4


def without_one() -> str:
    """What the others say where rank 2 makes its groups and then does not use them."""
    store = dist.distributed_c10d._get_default_store()
    plan = group_plan({"llm": make_layout("llm", 3, {"ranks": [2, 0, 1]})}, world=3)
    groups = make_groups(plan, timeout_s=1.5, store=store)
    if dist.get_rank() == 2:
        dist.all_reduce(torch.zeros(1))  # of the default group, which is the first
        time.sleep(4.0)
        return ""
    with pytest.raises(RuntimeError) as caught:
        warm_up(groups, torch.device("cpu"))
    return str(caught.value)


def test_a_rank_that_hangs_at_a_first_use_is_named(ranks: Any) -> None:
    for text in ranks(3, without_one)[:2]:
        assert "group llm.data of 3 ranks was not used within 1.5 s; not yet there: rank 2" in text, text

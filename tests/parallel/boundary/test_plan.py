"""The plan moves the right rows, the least of them, in an order that both ends share."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parallel.boundary import PlanCache
from parallel.boundary.nodes import Relay
from parallel.boundary.plan import EdgePlan, Transfer, edge_rows, plan_edge, plan_transfer
from parallel.boundary.repeats import Copies, Round
from parallel.boundary.rows import RowMap
from parallel.sequence.intervals import count
from parallel.topology.directions import Directions
from tests.parallel.boundary.cases import (
    Case,
    least_crossings,
    least_gradient_rows,
    least_rows,
    random_case,
    rows_of,
)


def play(transfers: list[Transfer], values: list[np.ndarray]) -> list[np.ndarray]:
    """Carry out one direction for all ranks in memory."""
    mail: dict[tuple[int, int], np.ndarray] = {}
    for t in transfers:
        assert len(values[t.rank]) == t.rows_in
        for peer, rows in t.sends:
            assert (t.rank, peer) not in mail and peer != t.rank and count(rows) > 0
            mail[t.rank, peer] = values[t.rank][rows]
    out = []
    for t in transfers:
        # Rows that the plan claims to cover start as rubbish, as in memory that was not cleared.
        y = np.full(t.rows_out, np.nan) if t.covered else np.zeros(t.rows_out)
        y[t.keep.dest] = values[t.rank][t.keep.source]
        for peer, rows in t.recvs:
            y[rows] = mail.pop((peer, t.rank))
        out.append(y)
        if t.view is not None:
            assert np.array_equal(y, values[t.rank][t.view])
    assert not mail, "something was sent that nobody receives"
    assert {t.moves for t in transfers} == {any(t.sends for t in transfers)}
    relays = [t.relay for t in transfers]
    assert all(relays) or not any(relays), "a second hop is known to all"
    for t in transfers:
        for peer, rows in t.relay.sends if t.relay else ():
            assert (t.rank, peer) not in mail and peer != t.rank and count(rows) > 0
            mail[t.rank, peer] = out[t.rank][rows]
    for t in transfers:
        for peer, rows in t.relay.recvs if t.relay else ():
            out[t.rank][rows] = mail.pop((peer, t.rank))
    assert not mail and (not any(relays) or any(r.sends for r in relays if r))
    return out


def crossing(transfers: list[Transfer], node_size: int) -> int:
    """Rows received from other nodes."""
    hops = [(t.rank, t.recvs) for t in transfers] + [(t.rank, t.relay.recvs) for t in transfers if t.relay]
    return sum(
        count(rows) for rank, recvs in hops for peer, rows in recvs if peer // node_size != rank // node_size
    )


def check(case: Case, node_size: int | None = None) -> None:
    """Plan for all ranks, play both directions, compare contents and bytes with the brute-force account."""
    ranks = range(case.world)
    plans = [plan_edge("e", case.source, case.dest, r, node_size=node_size) for r in ranks]
    value = np.random.default_rng(case.rows).normal(size=case.rows)
    forward = play([p.forward for p in plans], [value[rows_of(case.source, r)] for r in ranks])
    for r, y in enumerate(forward):
        for _, of, to in places(plans[r]):
            y[to] = y[of]
        assert np.array_equal(y, value[rows_of(case.dest, r)]), r
    assert sum(p.forward.received_rows for p in plans) == least_rows(case.source, case.dest, case.world)
    if node_size:
        crossed = crossing([p.forward for p in plans], node_size)
        assert crossed == least_crossings(case.source, case.dest, case.world, node_size)
    check_backward(case, plans, node_size)
    assert edge_rows(case.source, case.dest) == Directions(
        forward=sum(p.forward.received_rows for p in plans),
        backward=sum(t.received_rows for p in plans for t in p.backward),
    )


def places(plan: EdgePlan) -> tuple[Round, ...]:
    return plan.repeats.rounds if plan.repeats else ()


def only(m: RowMap, lane: int) -> RowMap:
    """The rows of one lane, on its ranks alone."""
    runs = np.flatnonzero(m.lane == lane)
    copies = m.copies and Copies(*(c[m.copies.lane == lane] for c in m.copies))
    return RowMap(
        lanes=(m.lanes[lane],),
        start=m.start[runs],
        length=m.length[runs],
        lane=m.lane[runs] * 0,
        local=m.local[runs],
        rows=m.rows[[lane]],
        copies=None if copies is None else copies._replace(lane=copies.lane * 0),
    )


def check_backward(case: Case, plans: list[EdgePlan], node_size: int | None) -> None:
    # The gradient of a destination lane's copy: a function of (lane, row), equal on the lane's ranks.
    lane_of = {r: i for i, lane in enumerate(case.dest.lanes) for r in lane}
    grads = [
        np.asarray([1000.0 * lane_of[r] + row + 1 for row in rows_of(case.dest, r)])
        for r in range(case.world)
    ]
    for plan, grad in zip(plans, grads, strict=True):
        for _, of, to in places(plan):
            assert len(set(of)) == len(of), "each row once a round"
            grad[of] += grad[to]
            grad[to] = np.nan  # nothing reads it
    expected = np.zeros(case.rows)
    for i, lane in enumerate(case.dest.lanes):
        for row in rows_of(case.dest, lane[0]):
            expected[row] += 1000.0 * i + row + 1
    total = [np.zeros(len(rows_of(case.source, r))) for r in range(case.world)]
    for layer in range(len(plans[0].backward)):
        for r, y in enumerate(play([p.backward[layer] for p in plans], grads)):
            total[r] += y
    for r in range(case.world):
        assert np.array_equal(total[r], expected[rows_of(case.source, r)]), r
    moved = sum(t.received_rows for p in plans for t in p.backward)
    assert moved == least_gradient_rows(case.source, case.dest, case.world)
    if node_size:
        crossed = sum(
            crossing([p.backward[k] for p in plans], node_size) for k in range(len(plans[0].backward))
        )
        least = 0
        for k in range(len(case.dest.lanes)):  # each consumer's gradient of a row once to each node
            least += least_crossings(only(case.dest, k), case.source, case.world, node_size)
        assert crossed == least


@pytest.mark.parametrize("holders", [1, 2])
@pytest.mark.parametrize("consumers", [1, 3])
@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), node_size=st.sampled_from([None, 2, 4]))
@example(seed=3697, node_size=None)  # a rank asks for fewer rows than there are replicas to share them
def test_random_boundaries(consumers: int, holders: int, seed: int, node_size: int | None) -> None:
    check(random_case(seed, consumers=consumers, holders=holders), node_size)


@given(
    dp=st.sampled_from([(3, 2), (5, 4), (2, 3), (4, 5), (4, 1), (1, 6), (6, 4)]),
    tp=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    offset=st.integers(0, 8),
    sharded=st.booleans(),
    items=st.lists(st.integers(0, 9), max_size=12),
    seed=st.integers(0, 99),
)
def test_any_ratio_of_layouts(
    dp: tuple[int, int],
    tp: tuple[int, int],
    offset: int,
    sharded: bool,
    items: list[int],
    seed: int,
) -> None:
    """tp x dp on both sides, the same ranks, others or some in common; sequence-sharded or replicated."""

    def lanes(side: int, first: int) -> list[tuple[int, ...]]:
        n = tp[side]
        return [tuple(range(first + d * n, first + (d + 1) * n)) for d in range(dp[side])]

    rng = np.random.default_rng(seed)
    source = RowMap.of_items(lanes(0, 0), items, rng.integers(0, dp[0], len(items)))
    deal = rng.integers(0, dp[1], len(items))
    dest = RowMap.of_items(lanes(1, offset), items, deal)
    if sharded:
        starts = np.cumsum(items) - items
        cut = [
            (s + n * k // tp[1], s + n * (k + 1) // tp[1])
            for s, n in zip(starts, items, strict=True)
            for k in range(tp[1])
        ]
        owner = [int(d) * tp[1] + k for d in deal for k in range(tp[1])]
        single = [(r,) for ranks in lanes(1, offset) for r in ranks]
        dest = RowMap.of_runs(single, [a for a, _ in cut], [b - a for a, b in cut], owner)
    world = max(dp[0] * tp[0], offset + dp[1] * tp[1])
    check(Case(world, sum(items), source, dest))


def test_the_usual_case_has_one_backward_transfer() -> None:
    case = random_case(5)
    assert len(plan_edge("e", case.source, case.dest, 0).backward) == 1


def test_senders_share_the_work() -> None:
    source = RowMap.of_items([(0, 1, 2, 3)], [8] * 4, [0] * 4)
    dest = RowMap.of_items([(4,), (5,), (6,), (7,)], [8] * 4, [0, 1, 2, 3])
    assert [sent(plan_transfer(source, dest, r)) for r in range(8)] == [8, 8, 8, 8, 0, 0, 0, 0]


def test_spare_replicas_share_the_rows_of_one_rank() -> None:
    source = RowMap.of_items([(0, 1, 2, 3)], [8, 3], [0, 0])
    dest = RowMap.of_items([(4,)], [8, 3], [0, 0])
    assert sorted(sent(plan_transfer(source, dest, r)) for r in range(4)) == [2, 3, 3, 3]


def test_all_replicas_want_all_rows_of_other_lanes() -> None:
    """tp8 dp2 to tp16: each of 16 ranks lacks half of the rows and serves exactly one other."""
    source = RowMap.of_items([tuple(range(8)), tuple(range(8, 16))], [32, 32], [0, 1])
    dest = RowMap.of_items([tuple(range(16))], [32, 32], [0, 0])
    assert [sent(plan_transfer(source, dest, r)) for r in range(16)] == [32] * 16


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_senders_share_the_work_whichever_lanes_ask(stride: int) -> None:
    """Two lanes of four replicas; a lane's consumers are every stride-th lane of the destination."""
    source = RowMap.of_items([(0, 1, 2, 3), (4, 5, 6, 7)], [4] * 8, [k // stride % 2 for k in range(8)])
    dest = RowMap.of_items([(8 + k,) for k in range(8)], [4] * 8, range(8))
    assert [sent(plan_transfer(source, dest, r)) for r in range(8)] == [4] * 8


def sent(t: Transfer | Relay) -> int:
    return sum(count(rows) for _, rows in t.sends)


def test_near_senders_are_preferred() -> None:
    source = RowMap.of_items([(0, 4)], [3], [0])
    dest = RowMap.of_runs([(1,), (5,)], [0, 0], [3, 3], [0, 1])
    assert plan_transfer(source, dest, 5, node_size=4).recvs[0][0] == 4
    assert plan_transfer(source, dest, 1, node_size=4).recvs[0][0] == 0


def test_rows_cross_to_a_node_in_equal_shares_and_spread_there() -> None:
    """Nodes of four: ranks 4-7 want the rows of rank 0, and each lets a quarter of them in."""
    source = RowMap.of_items([(0,), (9,)], [8, 8], [0, 1])
    dest = RowMap.of_items([(1, 2, 4, 5, 6, 7)], [8, 8], [0, 0])
    plans = [plan_transfer(source, dest, r, node_size=4) for r in range(10)]
    play(plans, [np.arange(8.0) + 8 * (r == 9) if r in (0, 9) else np.zeros(0) for r in range(10)])
    assert crossing(plans, 4) == 8 + 2 * 8
    assert [sum(count(r) for _, r in p.recvs) for p in plans[4:8]] == [4] * 4
    assert [received for p in plans[4:8] if p.relay for received in [sent(p.relay)]] == [12] * 4
    assert plans[1].relay is not None and sent(plans[1].relay) == 4, "rank 0's rows came in one hop"


def test_one_hop_is_enough_where_each_row_has_one_reader_a_node() -> None:
    source = RowMap.of_items([(0,), (1,)], [8, 8], [0, 1])
    dest = RowMap.of_items([(4,), (5,)], [8, 8], [1, 0])
    assert all(plan_transfer(source, dest, r, node_size=2).relay is None for r in range(6))
    assert plan_transfer(source, dest, 4, node_size=2).recvs == plan_transfer(source, dest, 4).recvs


def test_a_node_of_no_ranks_is_refused() -> None:
    side = RowMap.of_items([(0,)], [1], [0])
    with pytest.raises(ValueError, match="node_size is 0; needed: ranks a node, or None"):
        plan_transfer(side, side, 0, node_size=0)


def test_plans_are_remembered_for_rows_that_lie_alike() -> None:
    def edge(rows: int) -> tuple[RowMap, RowMap]:
        return RowMap.of_items([(0,), (1,)], [rows, 2], [0, 1]), RowMap.of_items([(0, 1)], [rows, 2], [0, 0])

    cache = PlanCache(0, keep=2)
    first = cache.plan("e", *edge(3))
    assert cache.plan("e", *edge(3)) is first
    got, made = (p.forward for p in (cache.plan("e", *edge(4)), plan_edge("e", *edge(4), 0)))
    assert (got.rows_in, got.rows_out, got.received_rows) == (made.rows_in, made.rows_out, made.received_rows)
    assert cache.plan("f", *edge(3)).name == "f"  # the third: the first is forgotten
    assert cache.plan("e", *edge(3)) is not first


def test_rows_that_nobody_has_are_refused() -> None:
    source = RowMap.of_items([(0,)], [4], [0])
    dest = RowMap.of_runs([(1,)], [2], [4], [0])
    with pytest.raises(ValueError, match=r"rows 4-5 are wanted by ranks \(1,\), but no rank has them"):
        plan_transfer(source, dest, 1)


def test_local_rows_without_a_run_are_zero() -> None:
    source = RowMap.of_items([(0,)], [2], [0])
    dest = RowMap.of_runs([(0,)], [0], [2], [0], local=[1], rows=[4])
    t = plan_transfer(source, dest, 0)
    assert not t.covered and t.rows_out == 4 and t.keep[1] == slice(1, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RowMap.of_items([(0, 1), (1, 2)], [1], [0]), "a rank is in two lanes"),
        (lambda: RowMap.of_items([(0,), ()], [1], [0]), "lane 1 has no ranks"),
        (lambda: RowMap.of_items([(0,)], [1], [1]), "a run is in lane 1, but there are lanes 0-0"),
        (lambda: RowMap.of_items([(0,)], [-1], [0]), "run 0 has a negative length, -1"),
        (lambda: RowMap.of_runs([(0,)], [0], [1, 2], [0]), "unequal count: 1 starts, 2 lengths, 1 lanes"),
        (lambda: RowMap.of_runs([(3,)], [0, 9], [2, 2], [0, 0], [0, 1]), "local row 1 is twice in lane 0"),
        (lambda: RowMap.of_runs([(3,)], [0], [2], [0], rows=[1]), "has 1 local rows, but run 0 reaches to 2"),
    ],
)
def test_maps_that_contradict_themselves_are_refused(make: Callable[[], RowMap], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("node_size", [None, 8])
def test_planning_one_of_1024_ranks_is_quick(node_size: int | None) -> None:
    """Under 50 ms for 10,000 items on a quiet core, and growth like the number of runs."""
    best = {}
    for world, items in ((256, 2_500), (1024, 10_000), (4096, 40_000)):
        rng = np.random.default_rng(0)
        rows = rng.integers(1, 64, items)
        source = RowMap.of_items([(r,) for r in range(world)], rows, rng.integers(0, world, items))
        lanes = [tuple(range(i, i + 8)) for i in range(0, world, 8)]
        dest = RowMap.of_items(lanes, rows, np.arange(items) * (world // 8) // items)

        def plan(source: RowMap = source, dest: RowMap = dest) -> None:
            fresh = replace(source), replace(dest)  # maps remember what they sorted
            plan_edge("e", *fresh, 7, node_size=node_size)

        plan()
        best[world] = min(_seconds(plan) for _ in range(5))
        print(f"{world} ranks, {items} items: both directions planned in {best[world] * 1e3:.1f} ms")
    assert best[1024] < 0.1, best
    assert best[4096] < 8 * best[1024] + 0.02, best


def test_memory_of_a_plan_grows_with_ranks_and_rows_held_not_with_their_product() -> None:
    peak = {}
    for world in (128, 512, 2048):
        items = 10 * world
        rows = np.full(items, 16)
        source = RowMap.of_items([(r,) for r in range(world)], rows, np.arange(items) % world)
        lanes = [tuple(range(i, i + 8)) for i in range(0, world, 8)]
        dest = RowMap.of_items(lanes, rows, np.arange(items) * (world // 8) // items)
        tracemalloc.start()
        plan_edge("e", source, dest, 7, node_size=8)
        peak[world] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak[2048] < 6 * peak[512] < 36 * peak[128], peak


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()  # of this process alone: the machine may be busy
    call()
    return time.process_time() - start


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), node_size=st.sampled_from([2, 4]), spares=st.sampled_from([0.1, 0.3, 0.6]))
def test_a_second_hop_is_taken_where_it_spares_enough(seed: int, node_size: int, spares: float) -> None:
    """All ranks decide alike, every row arrives, and rows cross once a reader or once a node."""
    case = random_case(seed, consumers=3, holders=2)
    plans = [
        plan_transfer(case.source, case.dest, r, node_size=node_size, spares=spares)
        for r in range(case.world)
    ]
    value = np.random.default_rng(case.rows).normal(size=case.rows)
    for r, y in enumerate(play(plans, [value[rows_of(case.source, r)] for r in range(case.world)])):
        assert np.array_equal(y, value[rows_of(case.dest, r)]), r
    assert len({plan.relay is None for plan in plans}) == 1
    least = least_crossings(case.source, case.dest, case.world, node_size)
    straight = 0
    for r in range(case.world):
        near = range(r // node_size * node_size, min((r // node_size + 1) * node_size, case.world))
        held = {row for other in near for row in rows_of(case.source, other)}
        straight += len(set(rows_of(case.dest, r)) - held)
    hops = straight > least and straight - least >= spares * straight
    assert (plans[0].relay is not None) == hops
    assert crossing(plans, node_size) == (least if hops else straight)

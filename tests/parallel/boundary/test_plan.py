"""The plan moves the right rows, the least of them, in an order that both ends share."""

from __future__ import annotations

import time

import numpy as np
import pytest

from parallel.boundary.plan import EdgePlan, Transfer, plan_edge, plan_transfer
from parallel.boundary.rows import RowMap
from tests.parallel.boundary.cases import least_rows, random_case, rows_of

SEEDS = range(300)


def play(transfers: list[Transfer], values: list[np.ndarray]) -> list[np.ndarray]:
    """Carry out one direction for all ranks in memory."""
    mail: dict[tuple[int, int], np.ndarray] = {}
    for t in transfers:
        for peer, rows in t.sends:
            assert (t.rank, peer) not in mail and peer != t.rank
            mail[t.rank, peer] = values[t.rank][rows]
    out = []
    for t in transfers:
        y = np.zeros(t.rows_out)
        y[t.keep[1]] = values[t.rank][t.keep[0]]
        for peer, rows in t.recvs:
            y[rows] = mail.pop((peer, t.rank))
        out.append(y)
    assert not mail, "something was sent that nobody receives"
    return out


@pytest.mark.parametrize("consumers", [1, 3])
def test_rows_arrive_and_gradients_return_exactly_with_least_bytes(consumers: int) -> None:
    for seed in SEEDS:
        case = random_case(seed, consumers=consumers)
        plans = [plan_edge("e", case.source, case.dest, r) for r in range(case.world)]
        value = np.random.default_rng(seed).normal(size=case.rows)
        forward = play(
            [p.forward for p in plans], [value[rows_of(case.source, r)] for r in range(case.world)]
        )
        for r, y in enumerate(forward):
            assert np.array_equal(y, value[rows_of(case.dest, r)]), (seed, r)
        moved = sum(p.forward.received_rows for p in plans)
        assert moved == least_rows(case.source, case.dest, case.world), seed
        check_backward(seed, case, plans)


def check_backward(seed: int, case: object, plans: list[EdgePlan]) -> None:
    # The gradient of a destination lane's copy: a function of (lane, row), equal on the lane's ranks.
    lane_of = {r: i for i, lane in enumerate(case.dest.lanes) for r in lane}
    grads = [
        np.asarray([1000.0 * lane_of[r] + row + 1 for row in rows_of(case.dest, r)])
        for r in range(case.world)
    ]
    expected = np.zeros(case.rows)
    for lane in case.dest.lanes:
        for row in rows_of(case.dest, lane[0]):
            expected[row] += 1000.0 * lane_of[lane[0]] + row + 1
    total = [np.zeros(len(rows_of(case.source, r))) for r in range(case.world)]
    for layer in range(len(plans[0].backward)):
        for r, y in enumerate(play([p.backward[layer] for p in plans], grads)):
            total[r] += y
    for r in range(case.world):
        assert np.array_equal(total[r], expected[rows_of(case.source, r)]), (seed, r)
    if len(plans[0].backward) == 1:
        moved = sum(p.backward[0].received_rows for p in plans)
        assert moved == least_rows(case.dest, case.source, case.world), seed


def test_senders_share_the_work() -> None:
    source = RowMap.of_items([(0, 1, 2, 3)], [8] * 4, [0] * 4)
    dest = RowMap.of_items([(4,), (5,), (6,), (7,)], [8] * 4, [0, 1, 2, 3])
    sent = [sum(len(t.sends) for t in [plan_transfer(source, dest, r)]) for r in range(8)]
    assert sent == [1, 1, 1, 1, 0, 0, 0, 0]


def test_near_senders_are_preferred() -> None:
    source = RowMap.of_items([(0, 4)], [3], [0])
    dest = RowMap.of_items([(1,), (5,)], [3], [0])
    dest = RowMap.of_runs([(1,), (5,)], [0, 0], [3, 3], [0, 1])
    assert plan_transfer(source, dest, 5, node_size=4).recvs[0][0] == 4
    assert plan_transfer(source, dest, 1, node_size=4).recvs[0][0] == 0


def test_rows_that_nobody_has_are_refused() -> None:
    source = RowMap.of_items([(0,)], [4], [0])
    dest = RowMap.of_runs([(1,)], [2], [4], [0])
    with pytest.raises(ValueError, match=r"rows 4-5 are wanted by ranks \(1,\)"):
        plan_transfer(source, dest, 1)


def test_two_lanes_with_one_rank_are_refused() -> None:
    with pytest.raises(ValueError, match="two lanes"):
        RowMap.of_items([(0, 1), (1, 2)], [1], [0])


def test_planning_one_of_1024_ranks_is_quick() -> None:
    world, items = 1024, 10_000
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 64, items)
    source = RowMap.of_items([(r,) for r in range(world)], rows, rng.integers(0, world, items))
    dest = RowMap.of_items(
        [tuple(range(i, i + 8)) for i in range(0, world, 8)], rows, np.arange(items) * (world // 8) // items
    )
    best = min(_seconds(lambda: plan_edge("e", source, dest, 7)) for _ in range(3))
    assert best < 0.2, best  # 50 ms on a quiet core; the bound leaves room for a busy one


def _seconds(call: object) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

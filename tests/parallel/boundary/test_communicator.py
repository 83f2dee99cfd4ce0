"""Boundaries over real process groups: exact, the counted least bytes, and never a silent wait."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.boundary import BoundaryCommunicator, RowMap, plan_edge
from tests.parallel.boundary.cases import least_gradient_rows, least_rows, random_case, rows_of
from tests.parallel.boundary.counter import Counter
from tests.pool import RankFailed

SHAPE = (3, 2)  # trailing dims of the boundary tensors
SIZE = 6


def run_cases(seeds: range, transport: str, dtype: torch.dtype) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    comm = BoundaryCommunicator(dist.group.WORLD, transport=transport, timeout_s=20.0)
    for seed in seeds:
        again = seed % 4 == 3
        case = random_case(seed, world, consumers=1 + seed % 3 + again, holders=1 + seed % 2, again=again)
        node_size = [None, 2, 3][seed // 2 % 3]
        plan = plan_edge("vision -> llm", case.source, case.dest, rank, node_size=node_size)
        value = torch.randn(case.rows, *SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)
        x = value[rows_of(case.source, rank)].requires_grad_()
        with Counter() as sent:
            y = comm.exchange(plan, x)
        assert torch.equal(y, value[rows_of(case.dest, rank)]), (seed, "forward")
        total = torch.tensor([sent.bytes])
        dist.all_reduce(total)
        least = least_rows(case.source, case.dest, world) * SIZE * value.element_size()
        assert total.item() == least, (seed, total.item(), least)
        # Distinct consumers' gradients: powers of two, so that their sums are exact in every dtype.
        scale = {r: 2.0**i for i, lane in enumerate(case.dest.lanes) for r in lane}
        expected = torch.zeros(case.rows)
        for lane in case.dest.lanes:
            for row in rows_of(case.dest, lane[0]):
                expected[row] += scale[lane[0]]
        with Counter() as sent:
            (grad,) = torch.autograd.grad(y, x, torch.full_like(y, scale.get(rank, 1.0)))
        mine = expected[rows_of(case.source, rank)].to(dtype)
        assert torch.equal(grad, mine[:, None, None].expand_as(grad)), (seed, "backward")
        total = torch.tensor([sent.bytes])
        dist.all_reduce(total)
        least = least_gradient_rows(case.source, case.dest, world) * SIZE * value.element_size()
        assert total.item() == least, (seed, "backward", total.item(), least)


@pytest.mark.parametrize("transport", ["p2p", "all_to_all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_random_boundaries_are_exact_with_least_bytes(ranks: Any, transport: str, dtype: torch.dtype) -> None:
    ranks(4, run_cases, range(18), transport, dtype)
    ranks(3, run_cases, range(18, 27), transport, dtype)


def count_received() -> tuple[dict[str, int], dict[str, float]]:
    comm = BoundaryCommunicator(dist.group.WORLD)
    source = RowMap.of_items([(0,), (1,)], [4, 4], [0, 1])
    dest = RowMap.of_items([(0, 1)], [4, 4], [0, 0])
    plan = plan_edge("e", source, dest, dist.get_rank())
    comm.backward(plan, comm.forward(plan, torch.zeros(4, 5)))
    return dict(comm.stats.bytes_received), dict(comm.stats.seconds)


def test_statistics_count_payload_from_other_ranks(ranks: Any) -> None:
    for received, seconds in ranks(2, count_received):
        assert received == {"e": 4 * 5 * 4}  # forward brings the other's rows; gradients of own rows are here
        assert seconds["e"] > 0


def wrong_rows() -> None:
    comm = BoundaryCommunicator(dist.group.WORLD)
    side = RowMap.of_items([(0,)], [4], [0])
    comm.forward(plan_edge("vision -> llm", side, side, 0), torch.zeros(3, 2))


def test_rows_that_do_not_match_the_plan_are_named(ranks: Any) -> None:
    with pytest.raises(RankFailed, match="edge vision -> llm, forward: rank 0 gave 3 rows, the plan has 4"):
        ranks(1, wrong_rows)


def wrong_width() -> None:
    comm = BoundaryCommunicator(dist.group.WORLD)
    side = RowMap.of_items([(0,)], [4], [0])
    comm.backward(plan_edge("vision -> llm", side, side, 0, row_shape=(3,)), torch.zeros(4, 2))


def test_rows_of_another_shape_than_planned_are_named(ranks: Any) -> None:
    with pytest.raises(RankFailed, match=r"backward: rank 0 gave rows of shape \[2\], the plan has \[3\]"):
        ranks(1, wrong_width)


def silent_peer(transport: str) -> str:
    comm = BoundaryCommunicator(dist.group.WORLD, timeout_s=1.0, transport=transport)
    source, dest = RowMap.of_items([(0,)], [4], [0]), RowMap.of_items([(1,)], [4], [0])
    if dist.get_rank() == 0:
        time.sleep(2.5)  # alive, but never sends
        return ""
    try:
        comm.forward(plan_edge("vision -> llm", source, dest, 1), torch.zeros(0, 2))
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("transport", ["p2p", "all_to_all"])
def test_a_peer_that_does_not_answer_is_named(ranks: Any, transport: str) -> None:
    message = ranks(2, silent_peer, transport, timeout=20)[1]
    assert "edge vision -> llm, forward: no answer from rank 0" in message


def peer_ends() -> None:
    comm = BoundaryCommunicator(dist.group.WORLD, timeout_s=10.0)
    source, dest = RowMap.of_items([(0,)], [4], [0]), RowMap.of_items([(1,)], [4], [0])
    plan = plan_edge("vision -> llm", source, dest, dist.get_rank())
    y = comm.exchange(plan, torch.zeros(4 if dist.get_rank() == 0 else 0, 2))
    if dist.get_rank() == 1:
        os._exit(3)
    y.sum().backward()


def test_a_peer_that_has_ended_is_named_at_once(ranks: Any) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match="edge vision -> llm, backward: no answer from rank 1"):
        ranks(2, peer_ends, timeout=20)
    assert time.monotonic() - start < 8


def ranks_without_rows(learns: bool) -> tuple[bool, list[int], torch.Tensor | None]:
    """Rank 0 has the rows, rank 1 wants them, rank 2 has and wants none."""
    rank = dist.get_rank()
    comm = BoundaryCommunicator(dist.group.WORLD, timeout_s=10.0)
    source, dest = RowMap.of_items([(0,), (2,)], [4], [0]), RowMap.of_items([(1,), (2,)], [4], [0])
    weight = torch.ones(2, requires_grad=learns)
    x = torch.ones(4 if rank == 0 else 0, 2) * weight if rank != 1 else torch.zeros(0, 2)
    y = comm.exchange(plan_edge("e", source, dest, rank), x, grads=learns)
    if learns:
        y.sum().backward()
    return y.requires_grad, list(y.shape), weight.grad


def test_ranks_without_rows_stay_in_the_graph(ranks: Any) -> None:
    found = ranks(3, ranks_without_rows, True)
    assert [(graph, shape) for graph, shape, _ in found] == [(True, [0, 2]), (True, [4, 2]), (True, [0, 2])]
    assert found[0][2].tolist() == [4.0, 4.0] and found[1][2] is None and found[2][2].tolist() == [0.0, 0.0]


def test_a_source_that_does_not_learn_gets_no_gradient(ranks: Any) -> None:
    assert [graph for graph, _, _ in ranks(3, ranks_without_rows, False)] == [False] * 3


def two_under_way() -> bool:
    rank = dist.get_rank()
    comm = BoundaryCommunicator(dist.group.WORLD, timeout_s=10.0)
    source = RowMap.of_items([(0,), (1,)], [4, 4], [0, 1])
    dest = RowMap.of_items([(0, 1)], [4, 4], [0, 0])
    plan = plan_edge("e", source, dest, rank)
    value = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    mine = slice(4 * rank, 4 * rank + 4)
    pending = [comm.start_forward(plan, value[k, mine]) for k in range(2)]
    done = [p.wait() for p in reversed(pending)]
    return torch.equal(done[1], value[0]) and torch.equal(done[0], value[1]) and pending[0].wait() is done[1]


def test_transfers_overlap(ranks: Any) -> None:
    assert ranks(2, two_under_way) == [True, True]


def test_nothing_is_sent_where_rows_stay(ranks: Any) -> None:
    assert ranks(2, stays) == [0, 0]


def stays() -> int:
    comm = BoundaryCommunicator(dist.group.WORLD)
    side = RowMap.of_items([(0,), (1,)], [4, 2, 0], [0, 1, 1])
    plan = plan_edge("e", side, side, dist.get_rank())
    x = torch.ones(4 if dist.get_rank() == 0 else 2, 2)
    with Counter() as sent:
        assert comm.forward(plan, x) is x and comm.backward(plan, x) is x
        y = comm.exchange(plan, x)
        assert y.requires_grad and y.data_ptr() == x.data_ptr()
    return sent.bytes

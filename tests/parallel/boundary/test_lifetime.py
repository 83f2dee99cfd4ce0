"""Transfers under way, peers that go missing, and communicators that come and go."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.boundary import BoundaryCommunicator, EdgePlan, RowMap, plan_edge
from tests.pool import RankFailed

SIGNAL = 77  # tag of the messages that order a test's ranks


def told(rank: int) -> None:
    """Wait for a message from `rank`."""
    dist.recv(torch.zeros(1), rank, tag=SIGNAL)


def tell(rank: int) -> None:
    dist.send(torch.ones(1), rank, tag=SIGNAL)


def across(rows: int = 4) -> EdgePlan:
    """Rank 0's rows to rank 1."""
    sides = [RowMap.of_items([(r,)], [rows], [0]) for r in range(2)]
    return plan_edge("vision -> llm", *sides, dist.get_rank())


def waits_for_nobody() -> bool:
    """The receiver starts, computes, and only then lets the sender start: start_* must not wait."""
    comm = BoundaryCommunicator(dist.group.WORLD, timeout_s=10.0)
    rank, plan = dist.get_rank(), across()
    for start, receiver in ((comm.start_forward, 1), (comm.start_backward, 0)):
        x = torch.ones(0 if rank == receiver else 4, 3)
        if rank == receiver:
            pending = start(plan, x)
            torch.ones(64, 64) @ torch.ones(64, 64)
            tell(1 - rank)
        else:
            told(receiver)
            pending = start(plan, x)
        y = pending.wait()
        assert rank != receiver or torch.equal(y, torch.ones(4, 3))
    return True


def test_computing_goes_on_between_start_and_wait(ranks: Any) -> None:
    assert ranks(2, waits_for_nobody, timeout=20) == [True, True]


def arrives_meanwhile() -> bool:
    """The sender's wait ends, for more than a socket holds, before the receiver waits."""
    comm = BoundaryCommunicator(dist.group.WORLD, timeout_s=10.0)
    plan = across(4096)
    if dist.get_rank() == 0:
        comm.start_forward(plan, torch.ones(4096, 1024)).wait()
        tell(1)
        return True
    pending = comm.start_forward(plan, torch.ones(0, 1024))
    told(0)
    return bool((pending.wait() == 1).all())


def test_rows_arrive_while_the_receiver_computes(ranks: Any) -> None:
    assert ranks(2, arrives_meanwhile, timeout=20) == [True, True]


def starts_edges_in_any_order() -> bool:
    comm = BoundaryCommunicator(dist.group.WORLD, timeout_s=10.0)
    rank = dist.get_rank()
    sides = [RowMap.of_items([(r,)], [4], [0]) for r in range(2)]
    pending = {}
    for k in (0, 1, 2) if rank == 0 else (2, 0, 1):
        plan = plan_edge(f"encoder {k} -> llm", *sides, rank)
        pending[k] = comm.start_forward(plan, torch.full((4, 3), float(k)) if rank == 0 else torch.ones(0, 3))
    done = {k: transfer.wait() for k, transfer in pending.items()}
    return rank == 0 or all(bool((rows == k).all()) for k, rows in done.items())


def test_edges_that_pass_each_other_are_told_apart(ranks: Any) -> None:
    assert ranks(2, starts_edges_in_any_order, timeout=20) == [True, True]


def spread(name: str) -> EdgePlan:
    """Rank 0's rows to ranks 2 and 3, which are one node: each lets half of them in."""
    source, dest = RowMap.of_items([(0,)], [4], [0]), RowMap.of_items([(2, 3)], [4], [0])
    return plan_edge(name, source, dest, dist.get_rank(), node_size=2)


def waits_in_any_order(transport: str) -> bool:
    comm = BoundaryCommunicator(dist.group.WORLD, timeout_s=10.0, transport=transport)
    rank = dist.get_rank()
    x = torch.arange(12.0).reshape(4, 3)[: 4 if rank == 0 else 0]
    pending = [comm.start_forward(spread(f"e{k}"), x + k) for k in range(3)]
    order = [0, 1, 2] if rank == 2 else [2, 1, 0]
    done = {k: pending[k].wait() for k in order}
    return rank < 2 or all(torch.equal(done[k], torch.arange(12.0).reshape(4, 3) + k) for k in range(3))


@pytest.mark.parametrize("transport", ["p2p", "all_to_all"])
def test_second_hops_come_through_whatever_is_waited_for_first(ranks: Any, transport: str) -> None:
    assert ranks(4, waits_in_any_order, transport, timeout=20) == [True] * 4


def ends_before_the_second_hop() -> None:
    comm = BoundaryCommunicator(dist.group.WORLD, timeout_s=10.0)
    rank = dist.get_rank()
    pending = comm.start_forward(spread("vision -> llm"), torch.ones(4 if rank == 0 else 0, 3))
    dist.barrier()
    if rank == 2:
        os._exit(3)
    if rank == 3:
        pending.wait()


def test_a_peer_that_ends_before_its_second_hop_is_named(ranks: Any) -> None:
    with pytest.raises(RankFailed, match="edge vision -> llm, forward: no answer from rank 2"):
        ranks(4, ends_before_the_second_hop, timeout=20)


def in_use() -> tuple[int, int, int]:
    """(torch's process groups, open files, threads) of this process."""
    gc.collect()
    files = len(list(Path("/proc/self/fd").iterdir()))
    return len(dist.distributed_c10d._world.pg_map), files, threading.active_count()


def come_and_go(times: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """What is in use after a few communicators and after `times` more."""
    counts = []
    for more in (5, times):
        for k in range(more):
            comm = BoundaryCommunicator(dist.new_group(), timeout_s=20.0)
            plan = across(1 + k % 3)
            y = comm.exchange(plan, torch.ones(plan.forward.rows_in, 2))
            y.sum().backward()
            comm.close()
        dist.barrier()
        deadline = time.monotonic() + 5  # connections end a moment after their group
        while counts and in_use() > counts[0] and time.monotonic() < deadline:
            time.sleep(0.05)
        counts.append(in_use())
    return counts[0], counts[1]


@pytest.mark.slow
def test_hundreds_of_communicators_leave_nothing_behind(ranks: Any) -> None:
    for few, many in ranks(2, come_and_go, 200, timeout=90):
        assert all(b <= a for a, b in zip(few, many, strict=True)), (few, many)

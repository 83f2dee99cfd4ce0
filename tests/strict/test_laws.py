"""The transport on real processes: what NCCL hangs on is cut off and named, the rest is as on gloo."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.pool import RankFailed
from tests.strict.run import Hang
from tests.strict.warm import warm_up


def started(kind: str, n: int, peer: int, *, tag: int = 0, x: Tensor | None = None) -> dist.Work:
    call = dist.isend if kind == "send" else dist.irecv
    work = call(torch.zeros(n) if x is None else x, peer, tag=tag)
    assert work is not None
    return work


def crossed_sends() -> None:
    warm_up()
    other = 1 - dist.get_rank()
    for work in [started("send", 4, other), started("recv", 4, other)]:
        work.wait()


def tags_that_choose() -> None:
    """The receiver takes the second message first."""
    if dist.get_rank() == 0:
        works = [started("send", 2, 1, tag=1), started("send", 3, 1, tag=2)]
    else:
        works = [started("recv", 3, 0, tag=2), started("recv", 2, 0, tag=1)]
    for work in works:
        work.wait()


def a_send_without_a_receive() -> None:
    warm_up()
    if dist.get_rank() == 0:
        started("send", 4, 1).wait()


def a_first_batch_without_a_member() -> None:
    group = dist.new_group([0, 1, 2], group_desc="three")
    if dist.get_rank() < 2:
        other = 1 - dist.get_rank()
        ops = [dist.P2POp(call, torch.zeros(4), other, group) for call in (dist.isend, dist.irecv)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
    dist.barrier()


def collectives_in_two_orders() -> None:
    x, out = torch.zeros(4), torch.zeros(8)
    steps = [lambda: dist.all_reduce(x), lambda: dist.all_gather(list(out.chunk(2)), x)]
    for step in steps if dist.get_rank() == 0 else steps[::-1]:
        step()


def batched_and_unbatched() -> None:
    warm_up()
    if dist.get_rank() == 0:
        dist.batch_isend_irecv([dist.P2POp(dist.isend, torch.zeros(4), 1)])[0].wait()
    else:
        started("recv", 4, 0).wait()


def groups_in_two_orders() -> None:
    groups = [dist.new_group([0, 1], group_desc=name) for name in ("first", "second")]
    for group in groups if dist.get_rank() == 0 else groups[::-1]:
        dist.all_reduce(torch.zeros(4), group=group)


ORDER = r"rank \d does all_(reduce|gather) .*\[4 float32\], rank \d does all_(reduce|gather)"
# Ranks, and what names it where communicators are lazy and where bound to the device; None: it passes.
HANGS: dict[Any, tuple[int, str, str | None]] = {
    crossed_sends: (
        2,
        r"0 -> 1 -> 0\n  rank 0 waits at send to 1 \[4 float32\] on default_pg 0 of ranks 0, 1, pair 0:1 "
        r"for rank 1 \(at send to 0 \[4 float32\]\)",
        r"rank 0 waits at send to 1 \[4 float32\] on default_pg 0 of ranks 0, 1 for rank 1 \(at send to 0",
    ),
    tags_that_choose: (
        2,
        r"message 0 -> 1: rank \d does (send to 1 \[2|recv from 0 \[3)",
        r"message 0 -> 1: rank \d does (send to 1 \[2|recv from 0 \[3)",
    ),
    a_send_without_a_receive: (
        2,
        r"rank 0 waits at send to 1 .* for rank 1 \(nothing posted\)\n  rank 1 has come to its end",
        "rank 1 has come to its end",
    ),
    a_first_batch_without_a_member: (
        3,
        r"rank 0 waits in the host at batch\(send to 1 .*\) on three \d+ of ranks 0, 1, 2 for rank 2 to come",
        None,
    ),
    collectives_in_two_orders: (2, ORDER, ORDER),
    batched_and_unbatched: (2, r"rank 0 waits at batch\(send to 1.* for rank 1 \(nothing posted\)", None),
    groups_in_two_orders: (
        2,
        r"rank 0 waits in the host at all_reduce \(sum\) \[4 float32\] on first \d+ .* for rank 1 to come",
        "to its first collective",
    ),
}


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
@pytest.mark.parametrize("fn", HANGS, ids=lambda fn: fn.__name__)
def test_what_nccl_hangs_on_is_cut_off_and_named(fn: Any, eager: bool, strict: Any, ranks: Any) -> None:
    n, *texts = HANGS[fn]
    if texts[eager] is None:
        strict(n, fn, eager=eager)
        return
    start = time.monotonic()
    with pytest.raises(Hang) as caught:
        strict(n, fn, eager=eager)
    assert re.search(texts[eager] or "", str(caught.value)), caught.value
    assert time.monotonic() - start < 60  # not the timeout of two minutes


def mirrored() -> list[float]:
    """Messages of every kind that mirror each other; tags do not decide which is which."""
    rank, n = dist.get_rank(), dist.get_world_size()
    got = []
    right, left = (rank + 1) % n, (rank - 1) % n
    for step in range(2):
        mine, theirs = torch.full((3,), 10.0 * step + rank), torch.empty(3)
        ops = [dist.P2POp(dist.irecv, theirs, left), dist.P2POp(dist.isend, mine, right)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        got.append(theirs[0].item())
    if rank == 0:
        for work in [started("send", 0, 1, x=torch.tensor([k]), tag=2 - k) for k in (1, 2)]:
            work.wait()
    elif rank == 1:
        both = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        for work in [started("recv", 0, 0, x=x, tag=1 + k) for k, x in enumerate(both)]:
            work.wait()
        got += [x.item() for x in both]
    if rank == 2:
        dist.all_reduce(torch.zeros(0))  # dropped
    return got


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
def test_messages_meet_in_order_whatever_their_tags(eager: bool, strict: Any) -> None:
    assert strict(3, mirrored, eager=eager) == [[2, 12], [0, 10, 1, 2], [1, 11]]


def collectives() -> list[Any]:
    """Results of every collective."""
    rank, n = dist.get_rank(), dist.get_world_size()
    x = torch.arange(n * n, dtype=torch.float64).view(n, n) + rank
    out = [x.clone() for _ in range(12)]
    dist.all_reduce(out[0])
    dist.all_reduce(out[1], dist.ReduceOp.MAX)
    dist.reduce(out[2], 1)
    dist.broadcast(out[3], 2)
    dist.all_gather(list(out[4].unbind()), x[0])
    dist.all_gather_into_tensor(out[5], x[:1].contiguous())
    dist.reduce_scatter_tensor(out[6][:1], x)
    dist.all_to_all_single(out[7], x)
    sizes = [[(a + b) % n for b in range(n)] for a in range(n)]  # rows from a to b
    taken = [sizes[a][rank] for a in range(n)]
    dist.all_to_all_single(out[8][: sum(taken)], x[: sum(sizes[rank])], taken, sizes[rank])
    dist.gather(x[0], list(out[9].unbind()) if rank == 0 else None, dst=0)
    dist.scatter(out[10][0], list(x.unbind()) if rank == 1 else None, src=1)
    work = dist.all_reduce(out[11], async_op=True)
    assert work is not None
    work.wait()
    objects: list[Any] = [None] * n
    dist.all_gather_object(objects, {"rank": rank})
    box = [rank]
    dist.broadcast_object_list(box, src=2)
    dist.barrier()
    return [*(t.tolist() for t in out), objects, box]


def test_collectives_are_those_of_gloo(ranks: Any, strict: Any) -> None:
    assert strict(3, collectives) == ranks(3, collectives)


def late(seconds: float) -> None:
    warm_up()
    if dist.get_rank() == 0:
        started("send", 4, 1).wait()
    else:
        time.sleep(seconds)


def test_where_a_rank_is_busy_the_timeout_names_the_wait(strict: Any) -> None:
    with pytest.raises(
        RankFailed, match=r"strict: rank 0 waits at send to 1 .*nothing posted.*limit 1 s"
    ) as e:
        strict(2, late, 3.0, timeout=1.0)
    assert not isinstance(e.value, Hang)


def fail_alone() -> None:
    if dist.get_rank() == 1:
        raise ValueError("deliberate")
    dist.barrier()


def test_ranks_that_wait_for_a_failed_one_are_cut_off(strict: Any) -> None:
    with pytest.raises(Hang, match="rank 1 has come to its end") as caught:
        strict(3, fail_alone)
    assert "deliberate" in str(caught.value.__cause__)

"""How the rows of one transfer travel. Each start_* puts everything under way and returns what completes it.

Where a peer's rows are consecutive they are sent from, and received in, their place without a copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.boundary.plan import NONE, Rows, Transfer, count

Finish = Callable[[], None]


@dataclass(frozen=True)
class Route:
    """What a transfer is called in errors, the group that it runs in and the longest wait, in seconds."""

    name: str
    group: dist.ProcessGroup
    timeout_s: float

    def call(self, peers: list[int], call: Callable[[], Any]) -> Any:
        """call(), its failure told in words: RuntimeError naming the edge, the direction and `peers`."""
        try:
            return call()
        except RuntimeError as error:
            head, *others = [f"rank {p}" for p in dict.fromkeys(peers)]
            more = f" (or from {', '.join(others)})" if others else ""
            raise RuntimeError(
                f"{self.name}: no answer from {head}{more} within {self.timeout_s:g} s; "
                f"it has ended, or is busy with other work ({str(error).splitlines()[0]})"
            ) from error


def start_p2p(route: Route, t: Transfer, x: Tensor, out: Tensor) -> Finish:
    """One message for each peer, of exactly its rows."""
    ops, landing, peers = [], [], []
    # Receives first: what arrives then goes straight to its place.
    for peer, rows in t.recvs:
        buffer = out[rows] if isinstance(rows, slice) else out.new_empty((len(rows), *out.shape[1:]))
        landing.append((rows, buffer))
        ops.append(dist.P2POp(dist.irecv, buffer, peer, route.group))
        peers.append(peer)
    for peer, rows in t.sends:
        ops.append(dist.P2POp(dist.isend, pick(x, rows), peer, route.group))
        peers.append(peer)
    works = route.call(peers, lambda: dist.batch_isend_irecv(ops)) if ops else []
    # gloo has one handle a message, in order; other backends may have one for the batch.
    single = len(works) == len(peers)

    def finish() -> None:
        deadline = time.monotonic() + route.timeout_s
        for i, work in enumerate(works):
            left = timedelta(seconds=max(deadline - time.monotonic(), 0.001))
            waiting = peers[i : i + 1] if single else peers
            route.call(waiting, lambda work=work, left=left: work.wait(left))  # type: ignore[misc]
        for rows, buffer in landing:
            if not isinstance(rows, slice):
                put(out, rows, buffer)
        ops.clear()  # the messages' memory, which was ours to keep until here

    return finish


def start_all_to_all(route: Route, t: Transfer, x: Tensor, out: Tensor) -> Finish:
    """One collective with uneven splits, in which every rank of the group takes part."""
    ranks = dist.get_process_group_ranks(route.group)
    sends, recvs = dict(t.sends), dict(t.recvs)
    out_rows, in_rows = [recvs.get(r, NONE) for r in ranks], [sends.get(r, NONE) for r in ranks]
    into, place = _joined(in_rows), _joined(out_rows)
    packed = x[into] if into is not None else torch.cat([pick(x, rows) for rows in in_rows])
    splits_in, splits_out = [count(rows) for rows in in_rows], [count(rows) for rows in out_rows]
    landed = out[place] if place is not None else out.new_empty((sum(splits_out), *out.shape[1:]))
    work = route.call(
        ranks,
        lambda: dist.all_to_all_single(
            landed, packed, splits_out, splits_in, group=route.group, async_op=True
        ),
    )

    def finish() -> None:
        route.call([r for r in ranks if r != t.rank], lambda: work.wait(timedelta(seconds=route.timeout_s)))
        if place is None:
            for rows, part in zip(out_rows, landed.split(splits_out), strict=True):
                put(out, rows, part)

    return finish


def pick(x: Tensor, rows: Rows) -> Tensor:
    """Rows of x: a view where they are consecutive, else one indexed copy."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, _index(rows, x))


def put(out: Tensor, rows: Rows, values: Tensor) -> None:
    """Write `values` to rows of out."""
    if not isinstance(rows, slice):
        out.index_copy_(0, _index(rows, out), values)
    elif rows.stop > rows.start:
        out[rows].copy_(values)


def move(out: Tensor, to: Rows, x: Tensor, rows: Rows) -> None:
    """Copy rows of x to rows of out, in one pass wherever the one or the other are consecutive."""
    if isinstance(to, slice) and not isinstance(rows, slice):
        torch.index_select(x, 0, _index(rows, x), out=out[to])
    else:
        put(out, to, pick(x, rows))


def _joined(parts: list[Rows]) -> slice | None:
    """All parts as one slice, where they are consecutive in this order."""
    low: int | None = None
    high = 0
    for rows in parts:
        if count(rows) == 0:
            continue
        if not isinstance(rows, slice) or (low is not None and rows.start != high):
            return None
        low, high = rows.start if low is None else low, rows.stop
    return slice(low or 0, high)


def _index(rows: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(like.device, non_blocking=True)

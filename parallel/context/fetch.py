"""Rows of other context-parallel ranks, fetched by plan, and their gradients brought home.

Which rows go where follows from the documents' lengths (parallel.context.packing), so nothing is agreed at
run time, and each rank receives the rows that it wants and no others. All at once (one all-to-all), or a
rank at a time: in round i rank r gives to rank r + i and takes from rank r - i, a ring without forwarding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.axis import Axis
from parallel.context.packing import ContextPacking
from parallel.context.shard import Span


@dataclass(frozen=True)
class Fetch:
    """Who gives this rank which rows, and takes which of its own.

    give[s]: local rows for cp rank s, ascending int64; take[s]: how many rows come from rank s. Received
    rows lie by rank, ascending in the stream within one; ascending [m]: the order that sorts them all.
    rows[s]: places in the stream of what comes from rank s.
    """

    axis: Axis
    give: tuple[Tensor, ...]
    rows: tuple[np.ndarray, ...]
    ascending: Tensor

    @property
    def take(self) -> list[int]:
        return [len(r) for r in self.rows]

    @property
    def gives(self) -> list[int]:
        return [len(g) for g in self.give]


def rows_of(spans: Sequence[Span]) -> np.ndarray:
    """The numbers in disjoint ascending spans."""
    return np.concatenate([np.arange(*s, dtype=np.int64) for s in spans] or [np.zeros(0, np.int64)])


def overlap(a: Sequence[Span], b: Sequence[Span]) -> list[Span]:
    """What two lists of disjoint ascending spans share; both are short."""
    both = [(max(x[0], y[0]), min(x[1], y[1])) for x in a for y in b]
    return sorted((start, stop) for start, stop in both if start < stop)


def join(spans: Sequence[Span]) -> list[Span]:
    """Spans as disjoint ascending ones."""
    out: list[Span] = []
    for start, stop in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        elif start < stop:
            out.append((start, stop))
    return out


def plan_fetch(packing: ContextPacking, wanted: Sequence[Sequence[Span]]) -> Fetch:
    """The exchange in which cp rank s gets the rows wanted[s] (disjoint ascending spans of the stream).

    wanted must cover every rank, and be the same on every rank. Rows that a rank holds itself may be wanted.
    """
    me = packing.cp.rank
    held = packing.spans
    give = []
    for spans in wanted:
        leaving = rows_of(overlap(spans, held[me]))
        give.append(torch.from_numpy(packing.owners(leaving)[1]).to(packing.device))
    rows = tuple(rows_of(overlap(wanted[me], spans)) for spans in held)
    ascending = np.argsort(np.concatenate(rows), kind="stable")
    return Fetch(packing.cp, tuple(give), rows, torch.from_numpy(ascending).to(packing.device))


def taken_from_others(packing: ContextPacking, wanted: Sequence[Sequence[Span]]) -> list[int]:
    """How many rows each cp rank receives over the wire for what it wants. Pure, for costs."""
    out = []
    for spans, held in zip(wanted, packing.spans, strict=True):
        own = sum(b - a for a, b in overlap(spans, held))
        out.append(sum(b - a for a, b in spans) - own)
    return out


def all_at_once(x: Tensor, fetch: Fetch) -> Tensor:
    """Local rows [T, ..] to the wanted rows [m, ..], by rank. No gradient."""
    out = x.new_empty((sum(fetch.take), *x.shape[1:]))
    leaving = x.index_select(0, torch.cat(fetch.give))
    dist.all_to_all_single(out, leaving, fetch.take, fetch.gives, group=fetch.axis.group)
    return out


def all_home(grad: Tensor, fetch: Fetch, into: Tensor) -> Tensor:
    """Add gradients [m, ..] of the received rows to their owners' rows `into` [T, ..], in place."""
    arriving = grad.new_empty((sum(fetch.gives), *grad.shape[1:]))
    dist.all_to_all_single(arriving, grad.contiguous(), fetch.gives, fetch.take, group=fetch.axis.group)
    # Rank by rank: a row may go to several, and one index_add would sum those in any order on accelerators.
    for index, part in zip(fetch.give, arriving.split(fetch.gives), strict=True):
        into.index_add_(0, index, part.to(into.dtype))
    return into


class _FetchRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fetch: Fetch) -> Tensor:
        ctx.fetch, ctx.rows = fetch, x.shape[0]
        return all_at_once(x, fetch).index_select(0, fetch.ascending)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        fetch: Fetch = ctx.fetch
        by_rank = torch.empty_like(grad).index_copy_(0, fetch.ascending, grad)
        return all_home(by_rank, fetch, grad.new_zeros((ctx.rows, *grad.shape[1:]))), None


def fetch_rows(x: Tensor, fetch: Fetch) -> Tensor:
    """Local rows [T, ..] to the wanted rows [m, ..], ascending in the stream; differentiable."""
    return _FetchRows.apply(x, fetch)


@dataclass
class InFlight:
    """A round under way: wait() before using `arriving` [m, ..]."""

    arriving: Tensor
    leaving: Tensor | None  # kept until sent
    works: list[Any]

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        self.leaving = None
        return self.arriving


def _send_receive(axis: Axis, to: int, leaving: Tensor, source: int, rows: int) -> InFlight:
    arriving = leaving.new_empty((rows, *leaving.shape[1:]))
    ops = []
    if leaving.shape[0]:
        ops.append(dist.P2POp(dist.isend, leaving.contiguous(), group=axis.group, group_peer=to))
    if rows:
        ops.append(dist.P2POp(dist.irecv, arriving, group=axis.group, group_peer=source))
    works = dist.batch_isend_irecv(ops) if ops else []
    return InFlight(arriving, leaving, works)


def start_round(x: Tensor, fetch: Fetch, i: int) -> InFlight:
    """Begin round i: local rows [T, ..] wanted by rank r + i leave, those of rank r - i arrive."""
    axis = fetch.axis
    to, source = (axis.rank + i) % axis.size, (axis.rank - i) % axis.size
    leaving = x.index_select(0, fetch.give[to])
    if i == 0:
        return InFlight(leaving, None, [])
    return _send_receive(axis, to, leaving, source, len(fetch.rows[source]))


def start_return(grad: Tensor, fetch: Fetch, i: int) -> InFlight:
    """Begin the way back of round i: gradients of what came from rank r - i; those from r + i arrive."""
    axis = fetch.axis
    to, source = (axis.rank - i) % axis.size, (axis.rank + i) % axis.size
    if i == 0:
        return InFlight(grad, None, [])
    return _send_receive(axis, to, grad, source, len(fetch.give[source]))

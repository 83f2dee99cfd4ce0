"""Rows of a packed tensor brought together inside one axis.

Each rank of an axis holds a few stretches of the rows and needs others besides its own: the keys of a
sequence that goes on elsewhere, the neighbours that a convolution sees, the states of earlier pieces. The
stretches determine who sends what, so nothing is agreed at run time (law 4). A row travels once to each rank
that wants and lacks it. Its gradient comes back the same way and is summed where the row is held.

    fetch = make_fetch("keys", axes.cp, held, wanted)   # once a batch; pure but for the group
    for layer in layers:
        k = fetch(layer.keys(x))                        # [rows held, ..] to [rows wanted, ..], autograd

start() brings all rows at once. start_round() brings them a round at a time, as a ring without forwarding: in
round i rank r sends to rank r + i and receives from rank r - i. These two, start_home() and
start_round_home() return at once and record no autograd graph.

Fetches share the transport of parallel.boundary but not its plans. At a boundary a row may have several
holders, and the backward is a transfer for each further reader of a row, with a result as long as all rows
held. Here a row has one holder, each pair of ranks exchanges one message, and what arrives is added to its
row in the dtype of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm.linear_map import linear_map
from parallel.comm.pending import Pending
from parallel.comm.transport import (
    Channel,
    Finish,
    Message,
    move,
    pick,
    start_all_to_all,
    start_p2p,
    tag_of,
)
from parallel.sequence.host import Indices
from parallel.sequence.intervals import NONE, Rows, Span, count, disjoint, outside, overlap, rows_of, size
from parallel.topology.axis import Axis
from parallel.topology.directions import Directions


@dataclass(frozen=True)
class FetchPlan:
    """One rank's part of a fetch.

    name: what errors call the fetch.
    me: this rank's index on the axis.
    held, wanted: how many rows this rank has, and gets.
    give: by rank of the axis, the local rows that go to it, by ascending row.
    take: by rank of the axis, where its rows belong among the wanted, by ascending row.
    moves: whether any rank sends another one a row; equal on all ranks.
    """

    name: str
    me: int
    held: int
    wanted: int
    give: tuple[Rows, ...]
    take: tuple[Rows, ...]
    moves: bool

    @property
    def received(self) -> Directions[int]:
        """Rows that this rank receives from others."""
        forward, backward = (
            sum(count(r) for s, r in enumerate(rows) if s != self.me) for rows in (self.take, self.give)
        )
        return Directions(forward, backward)


@dataclass(frozen=True)
class _Hop:
    """The messages of one call on one rank; peers are ranks of the axis, this rank among them.

    what: direction and round, for errors. gives: rows of the input; takes: rows of the output. together: one
    collective for all messages, else a message a peer.
    """

    what: str
    gives: list[Message]
    takes: list[Message]
    together: bool = False


@dataclass(frozen=True)
class Fetch:
    """A planned fetch, shared by the layers of a batch.

    Calls are collective over the axis: every rank makes them in the same order, those that hold and want no
    rows too. They raise ValueError where rows are not as planned, and RuntimeError, naming the ranks waited
    for, where a rank is silent. Results may share memory with the input, which must not change before wait().

    plan: this rank's part.
    ranks: global ranks of the axis.
    home: plan.give, on the device.
    channel: None where no row moves.
    together: whether start() and start_home() are one collective, else a message a peer.
    indices: the plan's row numbers on the device, for all layers.
    """

    plan: FetchPlan
    ranks: tuple[int, ...]
    home: tuple[slice | Tensor, ...]
    channel: Channel | None
    together: bool
    indices: Indices = field(default_factory=Indices, repr=False)

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows held here, ..] to [rows wanted here, ..], by ascending row.

        Whether x requires a gradient must be the same on all ranks: no gradient is sent back where it does
        not. Where it does, every rank must run its backward, those with no rows too.
        """
        plan = self.plan
        _check(plan.name, x, plan.held)
        if not plan.moves:
            rows = plan.give[plan.me]
            return x if _all(rows, plan.held) else pick(x, rows, self.indices)
        return linear_map(x, lambda y: self.start(y).wait(), self._sum_home)

    def _sum_home(self, grad: Tensor) -> Tensor:
        into = grad.new_zeros((self.plan.held, *grad.shape[1:]))
        return self.start_home(grad, into).wait()

    def start(self, x: Tensor) -> Pending:
        """x [rows held here, ..] to [rows wanted here, ..]; no autograd."""
        hop = _Hop("forward", _by_rank(self.plan.give), _by_rank(self.plan.take), self.together)
        return self._start(hop, x, self.plan.wanted)

    def start_home(self, grad: Tensor, into: Tensor) -> Pending:
        """Start sending gradients [rows wanted here, ..] to the ranks that hold the rows.

        wait() adds those that arrive to `into` [rows held here, ..], in place and in its dtype, rank by rank,
        and returns it.
        """
        hop = _Hop("backward", _by_rank(self.plan.take), _by_rank(self.plan.give), self.together)
        _check(self.plan.name, grad, self.plan.wanted)
        return self._start_home(hop, grad, into)

    def start_round(self, x: Tensor, i: int) -> Pending:
        """Round i of start(): the rows that come from rank r - i, which are ascending, and no others."""
        away, here = self._round(i)
        return self._start(_Hop(f"forward, round {i}", [away], [here]), x, count(here.rows))

    def start_round_home(self, grad: Tensor, into: Tensor, i: int) -> Pending:
        """The way back of round i, as start_home(): gradients of what start_round(x, i) brought."""
        away, here = self._round(i)
        _check(self.plan.name, grad, count(here.rows))
        return self._start_home(_Hop(f"backward, round {i}", [here], [away]), grad, into)

    def _round(self, i: int) -> tuple[Message, Message]:
        """(what goes to rank me + i, what comes from rank me - i) in round i."""
        n, me = len(self.ranks), self.plan.me
        to, source = (me + i) % n, (me - i) % n
        return Message(to, self.plan.give[to]), Message(source, slice(0, count(self.plan.take[source])))

    def _start(self, hop: _Hop, x: Tensor, rows: int) -> Pending:
        """[held, ..] to [rows, ..]: hop.gives are rows of x, hop.takes of the result."""
        _check(self.plan.name, x, self.plan.held)
        x = x.contiguous()
        own, at = _of(hop.gives, self.plan.me), _of(hop.takes, self.plan.me)
        same = _all(own, self.plan.held) and _all(at, rows)
        # No other view of x: it would keep all of x in memory for a part.
        out = x if same else x.new_empty((rows, *x.shape[1:]))
        finish = self._depart(hop, x, out)
        if not same:
            move(out, at, x, own, self.indices)  # while the others' rows are on their way

        def wait() -> Tensor:
            finish()
            return out

        return Pending(wait)

    def _start_home(self, hop: _Hop, grad: Tensor, into: Tensor) -> Pending:
        """hop.gives are rows of grad, hop.takes of `into`: each a part of plan.give."""
        me = self.plan.me
        _check(self.plan.name, into, self.plan.held)
        grad = grad.contiguous()
        # Each rank's rows land in a stretch of their own: several ranks may have read the same row.
        ends = np.cumsum([0, *(0 if s == me else count(rows) for s, rows in hop.takes)]).tolist()
        landing = [
            Message(peer, slice(low, high))
            for (peer, _), (low, high) in zip(hop.takes, pairwise(ends), strict=True)
        ]
        arriving = grad.new_empty((ends[-1], *grad.shape[1:]))
        finish = self._depart(replace(hop, takes=landing), grad, arriving)
        own = _of(hop.gives, me)

        def wait() -> Tensor:
            finish()
            for peer, at in landing:
                # Rank by rank: one index_add of all would sum a row in any order on accelerators.
                _add(into, self.home[peer], pick(grad, own, self.indices) if peer == me else arriving[at])
            return into

        return Pending(wait)

    def _depart(self, hop: _Hop, x: Tensor, out: Tensor) -> Finish:
        """Start the messages between ranks, from x to out; the result completes them."""
        if self.channel is None:
            return lambda: None
        sends, recvs = (
            [Message(self.ranks[s], rows) for s, rows in messages if s != self.plan.me and count(rows)]
            for messages in (hop.gives, hop.takes)
        )
        name = f"{self.channel.name}, {hop.what}"
        channel = replace(self.channel, name=name)
        start = start_all_to_all if hop.together else start_p2p
        return start(channel, sends, recvs, x, out, tag_of(name))


def fetch_plan(
    name: str, held: Sequence[Sequence[Span]], wanted: Sequence[Sequence[Span]], me: int
) -> FetchPlan:
    """The part of rank `me` of an axis in a fetch. Pure.

    held: by rank, the stretches of rows [start, stop) that it holds, in its local order; no row is held
    twice, stretches may be empty. wanted: by rank, the stretches that it wants, ascending and disjoint.
    Raises ValueError where a wanted row is held by none, or is wanted twice by one rank.
    """
    if len(held) != len(wanted):
        raise ValueError(f"{name}: stretches of {len(held)} ranks are held, but of {len(wanted)} wanted")
    for mine in wanted:
        if not disjoint(mine):
            raise ValueError(f"{name}: the stretches that a rank wants must ascend and not overlap")
    _check_held(name, held, wanted)
    give = tuple(_shared(held[me], theirs, False) for theirs in wanted)
    take = tuple(_shared(wanted[me], theirs, True) for theirs in held)
    return FetchPlan(
        name=name,
        me=me,
        held=size(held[me]),
        wanted=size(wanted[me]),
        give=give,
        take=take,
        moves=any(lacking(held, wanted)),
    )


def make_fetch(
    name: str,
    axis: Axis,
    held: Sequence[Sequence[Span]],
    wanted: Sequence[Sequence[Span]],
    *,
    device: torch.device | str = "cpu",
    timeout_s: float = 120.0,
) -> Fetch:
    """Plan a fetch over `axis`. held and wanted are those of fetch_plan(), equal on all ranks.

    Where `device` is the host each peer gets a message, which is faster there; elsewhere all rows travel in
    one collective. timeout_s, in seconds, bounds every wait of the host; where the device's queue waits, the
    group's own timeout does. Raises ValueError as fetch_plan() does.
    """
    plan = fetch_plan(name, held, wanted, axis.rank)
    indices = Indices()
    home = tuple(g if isinstance(g, slice) else indices.on(g, torch.device(device)) for g in plan.give)
    if not plan.moves:
        return Fetch(plan, tuple(range(axis.size)), home, channel=None, together=False, indices=indices)
    assert axis.group is not None and len(held) == axis.size, (name, axis)
    ranks = tuple(dist.get_process_group_ranks(axis.group))
    channel = Channel(name, axis.group, timeout_s, indices)
    together = torch.device(device).type != "cpu"
    return Fetch(plan, ranks, home, channel, together=together, indices=indices)


def lacking(held: Sequence[Sequence[Span]], wanted: Sequence[Sequence[Span]]) -> list[int]:
    """By rank, how many rows it wants and does not hold, and so receives. Pure; used for costs."""
    return [size(want) - size(overlap(want, mine)) for want, mine in zip(wanted, held, strict=True)]


def _shared(mine: Sequence[Span], others: Sequence[Span], ascending: bool) -> Rows:
    """Local rows of `mine`, laid end to end, that are in `others` too, by ascending row. ascending: whether
    `mine` must ascend."""
    assert not ascending or list(mine) == sorted(mine), mine
    found, at = [], 0
    for start, stop in mine:
        found += [(a, a - start + at, b - a) for a, b in overlap([(start, stop)], others)]
        at += stop - start
    found.sort()
    local, length = (np.asarray([f[k] for f in found], dtype=np.int64) for k in (1, 2))
    return rows_of(local, length)


def _check_held(name: str, held: Sequence[Sequence[Span]], wanted: Sequence[Sequence[Span]]) -> None:
    some = sorted((a, b) for mine in held for a, b in mine if a < b)
    if not disjoint(some):
        raise ValueError(f"{name}: a row is held by two ranks, or twice by one; needed: one holder a row")
    listed = [(a, b, r) for r, mine in enumerate(wanted) for a, b in mine if a < b]
    want, have = (np.asarray(s, dtype=np.int64).reshape(-1, k) for s, k in ((listed, 3), (some, 2)))
    which, low, high = outside(want[:, 0], want[:, 1], have[:, 0], have[:, 1])
    if len(low):
        k = int(np.argmin(low))
        raise ValueError(
            f"{name}: rows {low[k]}-{high[k] - 1} are wanted by rank {want[which[k], 2]} of the axis, "
            "but no rank has them"
        )


def _check(name: str, x: Tensor, rows: int) -> None:
    if x.shape[0] != rows:
        raise ValueError(f"{name}: {x.shape[0]} rows given, the plan has {rows}")


def _by_rank(rows: Sequence[Rows]) -> list[Message]:
    return [Message(s, r) for s, r in enumerate(rows)]


def _of(messages: Sequence[Message], rank: int) -> Rows:
    """The rows of one rank's message, none where it has none."""
    return next((rows for s, rows in messages if s == rank), NONE)


def _all(rows: Rows, n: int) -> bool:
    """Whether rows are all of n, in order."""
    return isinstance(rows, slice) and (rows.start, rows.stop) == (0, n)


def _add(into: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    if isinstance(rows, slice):
        into[rows] += values
    else:
        into.index_add_(0, rows, values.to(into.dtype))

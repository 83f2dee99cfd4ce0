"""Rows of a packed tensor brought together inside one axis.

Each rank of an axis holds a few stretches of the rows, and needs others beside its own: the keys of a
sequence that goes on elsewhere, the neighbours that a convolution sees, the states of earlier pieces. Who
gives what follows from the stretches, so nothing is agreed at run time; a row travels once to each rank that
wants and lacks it, and its gradient comes back the same way and is summed where the row is held.

    fetch = make_fetch("keys", axes.cp, held, wanted)   # once a batch; pure but for the group
    for layer in layers:
        k = fetch(layer.keys(x))                        # [rows held, ..] to [rows wanted, ..], autograd

All at once, or a round at a time, without autograd: in round i rank r gives to rank r + i and takes from rank
r - i, a ring without forwarding. start(), start_round() and their ways home return at once.

The transport is that of parallel.boundary, its plans are not: there a row may have several holders, and the
backward is a transfer for each further reader of a row, with a result as long as all rows held. Here a row
has one holder: one message a pair of ranks, and what arrives is added to its row in the dtype of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm.linear_map import linear_map
from parallel.comm.pending import Pending
from parallel.comm.transport import Channel, Finish, move, pick, start_all_to_all, start_p2p, tag_of
from parallel.sequence.intervals import NONE, Rows, Span, count, disjoint, outside, overlap, rows_of, size
from parallel.topology.axis import Axis
from parallel.topology.directions import Directions

Message = tuple[int, Rows]  # (rank of the axis, local rows)


@dataclass(frozen=True)
class FetchPlan:
    """One rank's part of a fetch.

    me: rank of the axis; held, wanted: how many rows this rank has, and gets. give[s]: local rows for rank s;
    take[s]: where those of rank s belong among the wanted, both by ascending row; moves: whether any rank
    gives another a row, equal on all.
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
class Fetch:
    """A planned fetch, to be shared by the layers of a batch.

    Calls are collective over the axis: every rank makes them in the same order, those that hold and want no
    rows too. They raise ValueError where rows are not as planned, and RuntimeError, naming whom they waited
    for, where a rank is silent. Results may share memory with what was given, which must not change before
    wait().

    ranks: global ranks of the axis; home: plan.give, on the device; channel: None where no row moves;
    together: one collective for all rows of a start(), else a message a peer.
    """

    plan: FetchPlan
    ranks: tuple[int, ...]
    home: tuple[slice | Tensor, ...]
    channel: Channel | None
    together: bool

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows held here, ..] to [rows wanted here, ..], by ascending row.

        Whether x requires a gradient must be the same on all ranks: no gradient is sent back where it does
        not. Where one is, every rank must run its backward, those with no rows too.
        """
        plan = self.plan
        _check(plan.name, x, plan.held)
        if not plan.moves:
            rows = plan.give[plan.me]
            return x if _all(rows, plan.held) else pick(x, rows)
        return linear_map(x, lambda y: self.start(y).wait(), self._sum_home)

    def _sum_home(self, grad: Tensor) -> Tensor:
        into = grad.new_zeros((self.plan.held, *grad.shape[1:]))
        return self.start_home(grad, into).wait()

    def start(self, x: Tensor) -> Pending:
        """x [rows held here, ..] to [rows wanted here, ..]; no autograd."""
        everyone = list(enumerate(self.plan.give)), list(enumerate(self.plan.take))
        return self._start("forward", x, self.plan.wanted, *everyone, self.together)

    def start_home(self, grad: Tensor, into: Tensor) -> Pending:
        """Gradients [rows wanted here, ..] on their way; wait() adds those that arrive to `into` [rows held
        here, ..], in place and in its dtype, rank by rank, and returns it."""
        everyone = list(enumerate(self.plan.take)), list(enumerate(self.plan.give))
        _check(self.plan.name, grad, self.plan.wanted)
        return self._start_home("backward", grad, into, *everyone, self.together)

    def start_round(self, x: Tensor, i: int) -> Pending:
        """Round i of start(): the rows that come from rank r - i, which are ascending, and no others."""
        to, source = self._neighbours(i)
        rows = count(self.plan.take[source])
        sends, recvs = [(to, self.plan.give[to])], [(source, slice(0, rows))]
        return self._start(f"forward, round {i}", x, rows, sends, recvs, False)

    def start_round_home(self, grad: Tensor, into: Tensor, i: int) -> Pending:
        """The way back of round i, as start_home(): gradients of what start_round(x, i) brought."""
        to, source = self._neighbours(i)
        rows = count(self.plan.take[source])
        _check(self.plan.name, grad, rows)
        sends, recvs = [(source, slice(0, rows))], [(to, self.plan.give[to])]
        return self._start_home(f"backward, round {i}", grad, into, sends, recvs, False)

    def _neighbours(self, i: int) -> Span:
        n, me = len(self.ranks), self.plan.me
        return (me + i) % n, (me - i) % n

    def _start(
        self,
        what: str,
        x: Tensor,
        rows: int,
        gives: Sequence[Message],
        takes: Sequence[Message],
        together: bool,
    ) -> Pending:
        """[held, ..] to [rows, ..]: gives are of x, takes of the result."""
        _check(self.plan.name, x, self.plan.held)
        x = x.contiguous()
        own, place = _of(gives, self.plan.me), _of(takes, self.plan.me)
        same = _all(own, self.plan.held) and _all(place, rows)
        # No other view of x: it would keep all of x in memory for a part.
        out = x if same else x.new_empty((rows, *x.shape[1:]))
        finish = self._depart(what, x, out, gives, takes, together)
        if not same:
            move(out, place, x, own)  # while the others' rows are on their way

        def wait() -> Tensor:
            finish()
            return out

        return Pending(wait)

    def _start_home(
        self,
        what: str,
        grad: Tensor,
        into: Tensor,
        gives: Sequence[Message],
        takes: Sequence[Message],
        together: bool,
    ) -> Pending:
        """gives are of grad, takes of `into`: each a part of plan.give."""
        me = self.plan.me
        _check(self.plan.name, into, self.plan.held)
        grad = grad.contiguous()
        # By rank, each apart: a row may have been read by several.
        ends = np.cumsum([0, *(0 if s == me else count(rows) for s, rows in takes)]).tolist()
        landing = [(s, slice(a, b)) for (s, _), (a, b) in zip(takes, pairwise(ends), strict=True)]
        arriving = grad.new_empty((ends[-1], *grad.shape[1:]))
        finish = self._depart(what, grad, arriving, gives, landing, together)
        own = _of(gives, me)

        def wait() -> Tensor:
            finish()
            for s, at in landing:
                # Rank by rank: one index_add of all would sum a row in any order on accelerators.
                _add(into, self.home[s], pick(grad, own) if s == me else arriving[at])
            return into

        return Pending(wait)

    def _depart(
        self,
        what: str,
        x: Tensor,
        out: Tensor,
        gives: Sequence[Message],
        takes: Sequence[Message],
        together: bool,
    ) -> Finish:
        if self.channel is None:
            return lambda: None
        sends, recvs = (
            [(self.ranks[s], rows) for s, rows in ends if s != self.plan.me and count(rows)]
            for ends in (gives, takes)
        )
        name = f"{self.channel.name}, {what}"
        channel = Channel(name, self.channel.group, self.channel.timeout_s)
        start = start_all_to_all if together else start_p2p
        return start(channel, sends, recvs, x, out, tag_of(name))


def fetch_plan(
    name: str, held: Sequence[Sequence[Span]], wanted: Sequence[Sequence[Span]], me: int
) -> FetchPlan:
    """The part of rank `me` of an axis in a fetch. Pure.

    held: the stretches of rows that each rank holds, in its local order; no row is held twice, some stretches
    may be empty. wanted: the stretches that each wants, ascending and apart. Raises ValueError where a wanted
    row is held by none, or is wanted twice by one rank.
    """
    if len(held) != len(wanted):
        raise ValueError(f"{name}: stretches of {len(held)} ranks are held, but of {len(wanted)} wanted")
    for mine in wanted:
        if not disjoint(mine):
            raise ValueError(f"{name}: the stretches that a rank wants must ascend and not overlap")
    _check_held(name, held, wanted)
    give = tuple(_shared(held[me], theirs, False) for theirs in wanted)
    take = tuple(_shared(wanted[me], theirs, True) for theirs in held)
    moves = any(lacking(held, wanted))
    return FetchPlan(name, me, size(held[me]), size(wanted[me]), give, take, moves)


def make_fetch(
    name: str,
    axis: Axis,
    held: Sequence[Sequence[Span]],
    wanted: Sequence[Sequence[Span]],
    *,
    device: torch.device | str = "cpu",
    timeout_s: float = 120.0,
) -> Fetch:
    """Plan a fetch over `axis`; held and wanted are by rank of the axis, known alike on all (fetch_plan).

    A message a peer where `device` is the host, which wins there, else one collective. timeout_s bounds every
    wait (where the device waits, the group's own does).
    """
    plan = fetch_plan(name, held, wanted, axis.rank)
    home = tuple(g if isinstance(g, slice) else torch.from_numpy(g).to(device) for g in plan.give)
    if not plan.moves:
        return Fetch(plan, tuple(range(axis.size)), home, None, False)
    assert axis.group is not None and len(held) == axis.size, (name, axis)
    ranks = tuple(dist.get_process_group_ranks(axis.group))
    return Fetch(plan, ranks, home, Channel(name, axis.group, timeout_s), torch.device(device).type != "cpu")


def lacking(held: Sequence[Sequence[Span]], wanted: Sequence[Sequence[Span]]) -> list[int]:
    """How many of the rows that it wants each rank does not hold: what it receives. Pure, for costs."""
    return [size(want) - size(overlap(want, mine)) for want, mine in zip(wanted, held, strict=True)]


def _shared(mine: Sequence[Span], others: Sequence[Span], ascending: bool) -> Rows:
    """Places in `mine`, laid end to end, of the rows that are in `others` too, by ascending row."""
    assert not ascending or list(mine) == sorted(mine), mine
    found, at = [], 0
    for start, stop in mine:
        found += [(a, a - start + at, b - a) for a, b in overlap([(start, stop)], others)]
        at += stop - start
    found.sort()
    place, length = (np.asarray([f[k] for f in found], dtype=np.int64) for k in (1, 2))
    return rows_of(place, length)


def _check_held(name: str, held: Sequence[Sequence[Span]], wanted: Sequence[Sequence[Span]]) -> None:
    some = sorted((a, b) for mine in held for a, b in mine if a < b)
    if not disjoint(some):
        raise ValueError(f"{name}: a row is held by two ranks, or twice by one; needed: one holder a row")
    asked = [(a, b, r) for r, mine in enumerate(wanted) for a, b in mine if a < b]
    ask, have = (np.asarray(s, dtype=np.int64).reshape(-1, k) for s, k in ((asked, 3), (some, 2)))
    which, low, high = outside(ask[:, 0], ask[:, 1], have[:, 0], have[:, 1])
    if len(low):
        k = int(np.argmin(low))
        raise ValueError(
            f"{name}: rows {low[k]}-{high[k] - 1} are wanted by rank {ask[which[k], 2]} of the axis, "
            "but no rank has them"
        )


def _check(name: str, x: Tensor, rows: int) -> None:
    if x.shape[0] != rows:
        raise ValueError(f"{name}: {x.shape[0]} rows given, the plan has {rows}")


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

"""Which rank serves whom: formulas of the two maps alone, the same at both ends of every message. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from parallel.boundary.intervals import meet, outside, repeat_groups, spans
from parallel.boundary.rows import RowMap

Rows = slice | np.ndarray  # local rows: a slice where they are consecutive


@dataclass(frozen=True)
class Runs:
    """Stretches of global rows in ascending order; local row = global row + shift."""

    start: np.ndarray
    stop: np.ndarray
    lane: np.ndarray
    shift: np.ndarray

    def take(self, which: np.ndarray) -> Runs:
        return Runs(self.start[which], self.stop[which], self.lane[which], self.shift[which])


def runs_of(m: RowMap, lane: int | None = None) -> Runs:
    """The runs with rows, of all lanes or of one."""
    some = np.flatnonzero((m.length > 0) if lane is None else (m.length > 0) & (m.lane == lane))
    some = some[np.argsort(m.start[some], kind="stable")]
    start = m.start[some]
    return Runs(start, start + m.length[some], m.lane[some], m.local[some] - start)


def split(runs: Runs) -> tuple[Runs, np.ndarray, np.ndarray]:
    """Cut runs at each other's ends: (pieces by row then lane, how many lanes have that row, which of
    these lanes a piece is)."""
    cuts = np.unique(np.concatenate([runs.start, runs.stop]))
    run, _, start, stop = meet(runs.start, runs.stop, cuts[:-1], cuts[1:])
    order = np.lexsort((runs.lane[run], start))
    first = np.flatnonzero(np.diff(start[order], prepend=-1))
    size = np.diff(np.append(first, len(order)))
    nth = np.arange(len(order)) - np.repeat(first, size)
    pieces = Runs(start[order], stop[order], runs.lane[run[order]], runs.shift[run[order]])
    return pieces, np.repeat(size, size), nth


def offers_of(have: RowMap) -> Runs:
    """Who serves each row to ranks that lack it: the lane that has it; where several do, in turn."""
    runs = runs_of(have)
    if np.all(runs.stop[:-1] <= runs.start[1:]):
        return runs
    pieces, holders, nth = split(runs)
    turn = np.cumsum(np.diff(pieces.start, prepend=-1) != 0) - 1
    return pieces.take(np.flatnonzero(nth == turn % holders))


@dataclass(frozen=True)
class _Asks:
    """Ranks that ask a lane for rows: columns in order of asked lane, then of place in `want`.

    A rank is served by the lane's replicas on its own node, or else by all: `size` holders from number `low`
    on. Those that share such a pool take turns at it. With fewer of them than members each is served by
    several, in `parts` equal, consecutive parts of its rows; part c by holder low + (c + turn) % size.
    """

    lane: np.ndarray
    rank: np.ndarray
    rank_lane: np.ndarray  # in `want`
    low: np.ndarray
    size: np.ndarray
    parts: np.ndarray
    turn: np.ndarray

    def take(self, which: np.ndarray) -> _Asks:
        return _Asks(*(getattr(self, f.name)[which] for f in fields(self)))


def _holders(have: RowMap) -> tuple[np.ndarray, np.ndarray]:
    """(rank, lane) of every member of `have`; by rank within a lane, so that a node's are neighbours."""
    rank, lane = members(have.lanes)
    order = np.lexsort((rank, lane))
    return rank[order], lane[order]


def _asks(have: RowMap, want: RowMap, offers: Runs, lanes: np.ndarray, node_size: int | None) -> _Asks:
    """All that ask `lanes` of `have`: the same, in the same order, wherever it is worked out."""
    some = offers.take(np.flatnonzero(np.isin(offers.lane, lanes)))
    runs = runs_of(want)
    i, k, _, _ = meet(runs.start, runs.stop, some.start, some.stop)
    pairs = np.unique(some.lane[k] * len(want.lanes) + runs.lane[i])
    lane, w = pairs // max(1, len(want.lanes)), pairs % max(1, len(want.lanes))
    ranks, rank_lane = members(want.lanes)
    of_lane = np.bincount(rank_lane, minlength=len(want.lanes))
    pair, place = repeat_groups((np.cumsum(of_lane) - of_lane)[w], of_lane[w])
    lane, rank, w = lane[pair], ranks[place], w[pair]
    lacks = lanes_of(have, rank) != lane
    lane, rank, w = lane[lacks], rank[lacks], w[lacks]
    holder, holder_lane = _holders(have)
    low = np.searchsorted(holder_lane, lane, side="left")
    size = np.searchsorted(holder_lane, lane, side="right") - low
    if node_size is not None:
        nodes = 1 + int(max(holder.max(initial=0), rank.max(initial=0))) // node_size
        at, near = holder_lane * nodes + holder // node_size, lane * nodes + rank // node_size
        first, last = (np.searchsorted(at, near, side=s) for s in ("left", "right"))
        low, size = np.where(first < last, first, low), np.where(first < last, last - first, size)
    pool = low * (len(holder) + 1) + size
    order = np.argsort(pool, kind="stable")
    begin = np.flatnonzero(np.diff(pool[order], prepend=-1))
    asking = np.diff(np.append(begin, len(order)))
    nth, each = np.empty_like(pool), np.empty_like(pool)
    nth[order] = np.arange(len(order)) - np.repeat(begin, asking)
    each[order] = np.repeat(asking, asking)
    parts = -(-size // np.minimum(size, each))
    return _Asks(lane, rank, w, low, size, parts, nth * parts)


def receive(
    have: RowMap, want: RowMap, offers: Runs, rank: int, w: int, h: int | None, node_size: int | None
) -> tuple[tuple[Rows, Rows], list[tuple[int, Rows]]]:
    """What `rank`, in lane w of `want` and h of `have`, keeps and receives."""
    mine = runs_of(want, w)
    own = runs_of(have, -1 if h is None else h)
    i, k, start, stop = meet(mine.start, mine.stop, own.start, own.stop)
    keep = spans(start + own.shift[k], stop - start), spans(start + mine.shift[i], stop - start)
    i, start, stop = outside(mine.start, mine.stop, own.start, own.stop)
    shift = mine.shift[i]
    i, k, start, stop = meet(start, stop, offers.start, offers.stop)
    if not len(start):
        return keep, []
    order = np.argsort(offers.lane[k], kind="stable")
    lane, start, length = offers.lane[k][order], start[order], (stop - start)[order]
    local = start + shift[i][order]
    asked, group = np.unique(lane, return_inverse=True)
    asks = _asks(have, want, offers, asked, node_size)
    asks = asks.take(np.flatnonzero(asks.rank == rank))
    assert np.array_equal(asks.lane, asked), "a rank that lacks rows asks for them"
    which, part = repeat_groups(np.zeros_like(asked), asks.parts)
    _, of, local, length = _cut(local, length, group, which, part, asks.parts)
    q = which[of]
    sender = _holders(have)[0][asks.low[q] + (part[of] + asks.turn[q]) % asks.size[q]]
    return keep, _by_peer(sender, local, length, rank)


def send(
    have: RowMap, want: RowMap, offers: Runs, rank: int, h: int, node_size: int | None
) -> list[tuple[int, Rows]]:
    """What `rank`, in lane h of `have`, sends."""
    asks = _asks(have, want, offers, np.asarray([h]), node_size)
    # Those that this rank serves, each with the part that it has to serve.
    holder, holder_lane = _holders(have)
    me = int(np.flatnonzero((holder == rank) & (holder_lane == h))[0]) - asks.low
    part = (me - asks.turn) % asks.size
    served = np.flatnonzero((me >= 0) & (me < asks.size) & (part < asks.parts))
    asks, part = asks.take(served), part[served]
    mine = offers.take(np.flatnonzero(offers.lane == h))
    runs = runs_of(want)
    i, k, start, stop = meet(runs.start, runs.stop, mine.start, mine.stop)
    order = np.argsort(runs.lane[i], kind="stable")
    lane, start, stop, shift = runs.lane[i][order], start[order], stop[order], mine.shift[k][order]
    first, last = (np.searchsorted(lane, asks.rank_lane, side=s) for s in ("left", "right"))
    ask, piece = repeat_groups(first, last - first)
    start, stop, shift = start[piece], stop[piece], shift[piece]
    # Where rows are in several lanes, an asking rank may have some of them itself.
    own = lanes_of(have, asks.rank)
    ask, start, stop, shift = _without_own(have, own, ask, start, stop, shift)
    _, of, local, length = _cut(start + shift, stop - start, ask, np.arange(len(part)), part, asks.parts)
    return _by_peer(asks.rank[of], local, length, rank)


def _without_own(
    have: RowMap,
    lane: np.ndarray,
    ask: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
    shift: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Leave out what the asking rank, in `lane[ask]` of `have` (-1: in none), has itself."""
    size = 1 + int((have.start + have.length).max(initial=0))
    own = np.sort(have.lane * size + have.start), np.sort(have.lane * size + have.start + have.length)
    base = np.where(lane < 0, len(have.lanes), lane)[ask] * size
    i, low, high = outside(base + start, base + stop, *own)
    return ask[i], low - base[i], high - base[i], shift[i]


def _cut(
    local: np.ndarray,
    length: np.ndarray,
    group: np.ndarray,
    which: np.ndarray,
    part: np.ndarray,
    parts: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut stretches, ordered by group, into the equal parts of their group's rows.

    Part k is number part[k] of parts[which[k]] of group which[k]. Returns columns (stretch, part k, local,
    length).
    """
    total = np.zeros(len(parts), dtype=np.int64)
    np.add.at(total, group, length)
    base = (np.cumsum(total) - total)[which]
    n, rows = parts[which], total[which]
    at = np.cumsum(length) - length
    i, k, start, stop = meet(at, at + length, base + rows * part // n, base + rows * (part + 1) // n)
    return i, k, local[i] + start - at[i], stop - start


def _by_peer(peer: np.ndarray, local: np.ndarray, length: np.ndarray, rank: int) -> list[tuple[int, Rows]]:
    """Stretches (ascending for each peer) as one entry a peer; ranks above this one first, so that not all
    ranks start with the same peer."""
    turn = np.where(peer > rank, peer, peer + int(peer.max(initial=0)) + 1 + rank)
    order = np.argsort(turn, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(turn[order])) + 1) if len(order) else []
    return [(int(peer[g[0]]), spans(local[g], length[g])) for g in groups]


def members(lanes: tuple[tuple[int, ...], ...]) -> tuple[np.ndarray, np.ndarray]:
    """(rank, lane) of every member, in order."""
    size = np.asarray([len(ranks) for ranks in lanes], dtype=np.int64)
    rank = np.asarray([r for ranks in lanes for r in ranks], dtype=np.int64)
    return rank, np.repeat(np.arange(len(lanes)), size)


def lanes_of(m: RowMap, ranks: np.ndarray) -> np.ndarray:
    """The lane of each rank, -1 where it is in none."""
    rank, lane = members(m.lanes)
    if not len(rank):
        return np.full(len(ranks), -1)
    order = np.argsort(rank)
    k = order[np.minimum(np.searchsorted(rank[order], ranks), len(rank) - 1)]
    return np.where(rank[k] == ranks, lane[k], -1)

"""Which rank serves whom: formulas of the two maps alone, the same at both ends of every message. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from parallel.boundary.rows import RowMap, Runs
from parallel.sequence.intervals import (
    NONE,
    Rows,
    before,
    meet,
    outside,
    repeat_groups,
    rows_of,
    share_start,
    sums,
)


def runs_of(m: RowMap, lane: int) -> Runs:
    """The runs of one lane."""
    return m.runs.take(np.flatnonzero(m.runs.lane == lane))


def distinct_pairs(a: np.ndarray, b: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs (a, b), 0 <= b < n, each once, in ascending order: two columns."""
    return np.divmod(np.unique(a * n + b), max(1, n))


def places(group: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns (k, place) of all places where `group`, which ascends, is wanted[k]."""
    first, last = (np.searchsorted(group, wanted, side=s) for s in ("left", "right"))
    return repeat_groups(first, last - first)


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
    return one_each(have.runs)


def one_each(runs: Runs) -> Runs:
    """Each row once: where several lanes have a row, they take turns. Disjoint and ascending."""
    if np.all(runs.stop[:-1] <= runs.start[1:]):
        return runs
    pieces, holders, nth = split(runs)
    turn = np.cumsum(np.diff(pieces.start, prepend=-1) != 0) - 1
    return pieces.take(np.flatnonzero(nth == turn % holders))


@dataclass(frozen=True)
class _Asks:
    """Ranks that ask a lane for rows: columns in order of asked lane, then of place in `want`.

    A rank is served by the lane's replicas, `size` holders from number `low` on, which take turns. With fewer
    that ask than replicas each is served by several, in `parts` equal, consecutive parts of its rows; part c
    by holder low + (c + turn) % size.
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
    """(rank, lane) of every member of `have`, by rank within a lane."""
    rank, lane = have.members
    order = np.lexsort((rank, lane))
    return rank[order], lane[order]


def _asks(have: RowMap, want: RowMap, offers: Runs, lanes: np.ndarray) -> _Asks:
    """All that ask `lanes` of `have`: the same, in the same order, wherever it is worked out."""
    some = offers.take(np.flatnonzero(np.isin(offers.lane, lanes)))
    runs = want.runs
    i, k, _, _ = meet(runs.start, runs.stop, some.start, some.stop)
    lane, w = distinct_pairs(some.lane[k], runs.lane[i], len(want.lanes))
    ranks, rank_lane = want.members
    of_lane = np.bincount(rank_lane, minlength=len(want.lanes))
    pair, place = repeat_groups(before(of_lane)[w], of_lane[w])
    lane, rank, w = lane[pair], ranks[place], w[pair]
    lacks = have.lanes_of(rank) != lane
    lane, rank, w = lane[lacks], rank[lacks], w[lacks]
    holder_lane = _holders(have)[1]
    low = np.searchsorted(holder_lane, lane, side="left")
    size = np.searchsorted(holder_lane, lane, side="right") - low
    begin = np.flatnonzero(np.diff(lane, prepend=-1))
    asking = np.diff(np.append(begin, len(lane)))
    nth, each = np.arange(len(lane)) - np.repeat(begin, asking), np.repeat(asking, asking)
    parts = -(-size // np.minimum(size, each))
    return _Asks(lane, rank, w, low, size, parts, nth * parts)


@dataclass(frozen=True)
class Routes:
    """What a rank keeps, as (rows of the input, rows of the output), sends and receives: one entry a peer."""

    keep: tuple[Rows, Rows]
    sends: list[tuple[int, Rows]]
    recvs: list[tuple[int, Rows]]


def direct(have: RowMap, want: RowMap, rank: int) -> Routes:
    """The part of `rank` in bringing every rank of `want` the rows that it lacks, each in one message hop.

    Rows that no rank has are left out.
    """
    offers = offers_of(have)
    h, w = have.lane_of(rank), want.lane_of(rank)
    keep, recvs = ((NONE, NONE), []) if w is None else _receive(have, want, offers, rank, w, h)
    return Routes(keep, [] if h is None else _send(have, want, offers, rank, h), recvs)


def _receive(
    have: RowMap, want: RowMap, offers: Runs, rank: int, w: int, h: int | None
) -> tuple[tuple[Rows, Rows], list[tuple[int, Rows]]]:
    """What `rank`, in lane w of `want` and h of `have`, keeps and receives."""
    mine = runs_of(want, w)
    own = runs_of(have, -1 if h is None else h)
    i, k, start, stop = meet(mine.start, mine.stop, own.start, own.stop)
    keep = rows_of(start + own.shift[k], stop - start), rows_of(start + mine.shift[i], stop - start)
    i, start, stop = outside(mine.start, mine.stop, own.start, own.stop)
    shift = mine.shift[i]
    i, k, start, stop = meet(start, stop, offers.start, offers.stop)
    if not len(start):
        return keep, []
    order = np.argsort(offers.lane[k], kind="stable")
    lane, start, length = offers.lane[k][order], start[order], (stop - start)[order]
    local = start + shift[i][order]
    asked, group = np.unique(lane, return_inverse=True)
    asks = _asks(have, want, offers, asked)
    asks = asks.take(np.flatnonzero(asks.rank == rank))
    assert np.array_equal(asks.lane, asked), "a rank that lacks rows asks for them"
    which, part = repeat_groups(np.zeros_like(asked), asks.parts)
    _, of, local, length = cut(local, length, group, which, part, asks.parts)
    q = which[of]
    sender = _holders(have)[0][asks.low[q] + (part[of] + asks.turn[q]) % asks.size[q]]
    return keep, _by_peer(sender, local, length, rank)


def _send(have: RowMap, want: RowMap, offers: Runs, rank: int, h: int) -> list[tuple[int, Rows]]:
    """What `rank`, in lane h of `have`, sends."""
    asks = _asks(have, want, offers, np.asarray([h]))
    # Those that this rank serves, each with the part that it has to serve.
    holder, holder_lane = _holders(have)
    me = int(np.flatnonzero((holder == rank) & (holder_lane == h))[0]) - asks.low
    part = (me - asks.turn) % asks.size
    served = np.flatnonzero((me >= 0) & (me < asks.size) & (part < asks.parts))
    asks, part = asks.take(served), part[served]
    mine = offers.take(np.flatnonzero(offers.lane == h))
    runs = want.runs
    i, k, start, stop = meet(runs.start, runs.stop, mine.start, mine.stop)
    order = np.argsort(runs.lane[i], kind="stable")
    lane, start, stop, shift = runs.lane[i][order], start[order], stop[order], mine.shift[k][order]
    ask, piece = places(lane, asks.rank_lane)
    start, stop, shift = start[piece], stop[piece], shift[piece]
    # Where rows are in several lanes, an asking rank may have some of them itself.
    own = have.lanes_of(asks.rank)
    ask, start, stop, shift = _without_own(have, own, ask, start, stop, shift)
    _, of, local, length = cut(start + shift, stop - start, ask, np.arange(len(part)), part, asks.parts)
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
    size = 1 + have.reach
    base = np.where(lane < 0, len(have.lanes), lane)[ask] * size
    i, low, high = outside(base + start, base + stop, *have.by_lane(size))
    return ask[i], low - base[i], high - base[i], shift[i]


def cut(
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
    total = sums(length, group, len(parts))
    base = before(total)[which]
    n, rows = parts[which], total[which]
    at = before(length)
    i, k, start, stop = meet(
        at, at + length, base + share_start(rows, n, part), base + share_start(rows, n, part + 1)
    )
    return i, k, local[i] + start - at[i], stop - start


def _by_peer(peer: np.ndarray, local: np.ndarray, length: np.ndarray, rank: int) -> list[tuple[int, Rows]]:
    """Stretches (ascending for each peer) as one entry a peer; ranks above this one first, so that not all
    ranks start with the same peer."""
    turn = np.where(peer > rank, peer, peer + int(peer.max(initial=0)) + 1 + rank)
    order = np.argsort(turn, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(turn[order])) + 1) if len(order) else []
    return [(int(peer[g[0]]), rows_of(local[g], length[g])) for g in groups]

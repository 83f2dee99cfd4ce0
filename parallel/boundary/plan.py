"""Boundary plans: from who has and who wants which rows to what one rank sends, receives and keeps. Pure.

Every wanted row that a rank does not have arrives exactly once, from one of the ranks that have it; a row
that a rank has already stays. That is the information minimum (design law 5). A rank's part is worked out
from the two maps alone, so all ranks agree without a word. Runs are sorted once and then met by binary
search: O(n log n) time and O(n) memory in n = runs + ranks + the stretches that this rank has a part in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parallel.boundary.intervals import meet, outside, repeat_groups, spans
from parallel.boundary.rows import RowMap

Rows = slice | np.ndarray  # local rows: a slice where they are consecutive
NONE = slice(0, 0)


@dataclass(frozen=True)
class Transfer:
    """One direction of an edge as one rank sees it.

    rows_in, rows_out: local rows before and after. keep: (rows of the input, rows of the output) that stay.
    sends, recvs: (peer rank, rows of the input / output), in order of global row for each peer, one entry a
    peer. covered: whether every output row is kept or received; the others are zero. moves: whether any rank
    of the edge sends anything, equal on all ranks (a collective transport needs all of them to agree).
    """

    rank: int
    rows_in: int
    rows_out: int
    keep: tuple[Rows, Rows]
    sends: tuple[tuple[int, Rows], ...]
    recvs: tuple[tuple[int, Rows], ...]
    covered: bool
    moves: bool

    @property
    def received_rows(self) -> int:
        """Rows that come from other ranks."""
        return sum(count(rows) for _, rows in self.recvs)

    @property
    def view(self) -> slice | None:
        """Where the output is a stretch of the input, that stretch."""
        source, dest = self.keep
        if self.recvs or not self.covered or not isinstance(source, slice) or not isinstance(dest, slice):
            return None
        return source if dest.start == 0 else None

    @property
    def identity(self) -> bool:
        """Whether the output is the input, and nothing is sent."""
        return not self.sends and self.view == slice(0, self.rows_in)


@dataclass(frozen=True)
class EdgePlan:
    """Both directions of an edge for one rank. The results of the backward transfers are added up: there is
    one for each time that a row has a further, distinct consumer."""

    name: str
    forward: Transfer
    backward: tuple[Transfer, ...]


def count(rows: Rows) -> int:
    """How many rows."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def received_rows(plan: EdgePlan) -> tuple[int, int]:
    """Rows that this rank receives from others, (forward, backward)."""
    return plan.forward.received_rows, sum(t.received_rows for t in plan.backward)


def plan_edge(
    name: str, source: RowMap, dest: RowMap, rank: int, *, node_size: int | None = None
) -> EdgePlan:
    """Plan both directions of an edge for `rank`.

    Forward: every destination lane gets the rows it wants. Backward: every source replica gets the gradient
    of its rows. Ranks of one destination lane hold equal gradients, of which one is taken; distinct lanes
    that consumed the same row are added. node_size: ranks a node, so that senders nearby are preferred.
    Raises ValueError where a wanted row is on no rank.
    """
    forward = plan_transfer(source, dest, rank, node_size=node_size)
    backward = tuple(
        plan_transfer(layer, source, rank, node_size=node_size, partial=True) for layer in _layers(dest)
    )
    return EdgePlan(name, forward, backward)


def plan_transfer(
    have: RowMap, want: RowMap, rank: int, *, node_size: int | None = None, partial: bool = False
) -> Transfer:
    """What `rank` sends, receives and keeps so that every rank of `want` gets its rows.

    A row in several lanes of `have` is taken from one of them. Raises ValueError where a wanted row is in no
    lane of `have`; with `partial`, such rows become zero instead.
    """
    offers = _offers(have)
    found = _check_held(want, offers, partial)
    holders = _Holders(have, want, offers, found, node_size)
    h, w = have.lane_of(rank), want.lane_of(rank)
    keep: tuple[Rows, Rows] = (NONE, NONE)
    recvs: list[tuple[int, Rows]] = []
    if w is not None:
        keep, recvs = _receive(have, want, holders, offers, rank, w, h)
    sends = [] if h is None else _send(have, want, holders, offers, rank, h)
    rows_in = 0 if h is None else int(have.rows[h])
    rows_out = 0 if w is None else int(want.rows[w])
    covered = count(keep[1]) + sum(count(r) for _, r in recvs) == rows_out
    moves = bool(sends or recvs) or _moves(have, want, found)
    return Transfer(rank, rows_in, rows_out, keep, tuple(sends), tuple(recvs), covered, moves)


@dataclass(frozen=True)
class _Runs:
    """Disjoint stretches of global rows in ascending order; local row = global row + shift."""

    start: np.ndarray
    stop: np.ndarray
    lane: np.ndarray
    shift: np.ndarray

    def take(self, which: np.ndarray) -> _Runs:
        return _Runs(self.start[which], self.stop[which], self.lane[which], self.shift[which])


def _runs(m: RowMap, lane: int | None = None) -> _Runs:
    some = np.flatnonzero((m.length > 0) if lane is None else (m.length > 0) & (m.lane == lane))
    some = some[np.argsort(m.start[some], kind="stable")]
    start = m.start[some]
    return _Runs(start, start + m.length[some], m.lane[some], m.local[some] - start)


def _split(runs: _Runs) -> tuple[_Runs, np.ndarray, np.ndarray]:
    """Cut runs at each other's ends: (pieces by row then lane, how many lanes have that row, which of
    these lanes a piece is)."""
    cuts = np.unique(np.concatenate([runs.start, runs.stop]))
    run, _, start, stop = meet(runs.start, runs.stop, cuts[:-1], cuts[1:])
    order = np.lexsort((runs.lane[run], start))
    first = np.flatnonzero(np.diff(start[order], prepend=-1))
    size = np.diff(np.append(first, len(order)))
    nth = np.arange(len(order)) - np.repeat(first, size)
    pieces = _Runs(start[order], stop[order], runs.lane[run[order]], runs.shift[run[order]])
    return pieces, np.repeat(size, size), nth


def _offers(have: RowMap) -> _Runs:
    """Who serves each row to ranks that lack it: the lane that has it; where several do, in turn."""
    runs = _runs(have)
    if np.all(runs.stop[:-1] <= runs.start[1:]):
        return runs
    pieces, holders, nth = _split(runs)
    turn = np.cumsum(np.diff(pieces.start, prepend=-1) != 0) - 1
    return pieces.take(np.flatnonzero(nth == turn % holders))


def _check_held(want: RowMap, offers: _Runs, partial: bool) -> np.ndarray:
    """Rows of each run of `want` that some rank has, int64 [runs]."""

    def before(row: np.ndarray) -> np.ndarray:
        """Held rows below `row`."""
        k = np.searchsorted(offers.start, row, side="right") - 1
        inside = np.minimum(row - offers.start[k], length[k])
        return np.where(k < 0, 0, total[k] + inside)

    length = offers.stop - offers.start
    total = np.cumsum(length) - length
    stop = want.start + want.length
    found = before(stop) - before(want.start) if len(length) else np.zeros_like(want.length)
    if not partial and int(found.sum()) < int(want.length.sum()):
        run, low, high = outside(want.start, stop, offers.start, offers.stop)
        k = int(np.argmin(low))
        asking = want.lanes[int(want.lane[run[k]])]
        raise ValueError(f"rows {low[k]}-{high[k] - 1} are wanted by ranks {asking}, but no rank has them")
    return found


@dataclass(frozen=True)
class _Pools:
    """Who serves whom, for asking ranks and the lanes that they ask: a formula, the same at both ends.

    The pool of (rank, lane) is the lane's replicas on the rank's own node, or else all of them: `size`
    holders from `low` on. It serves the rank in `parts` equal, consecutive parts, as many as it has members
    to spare; part c comes from member (c + turn) % size.
    """

    low: np.ndarray
    size: np.ndarray
    parts: np.ndarray
    turn: np.ndarray


class _Holders:
    """The ranks of `have`, lane by lane, and the pools that they form."""

    def __init__(self, have: RowMap, want: RowMap, offers: _Runs, found: np.ndarray, node_size: int | None):
        rank, lane = _flat(have.lanes)
        order = np.lexsort((rank, lane))  # by rank within a lane, so that a node's ranks are neighbours
        self.rank, self.lane = rank[order], lane[order]
        self.node_size = node_size
        self.members = np.bincount(lane, minlength=len(have.lanes))
        # Asking ranks a lane, on average: with fewer of them than replicas, each is served by several.
        asking = np.unique(want.lane[found > 0])
        ranks = sum(len(want.lanes[int(k)]) for k in asking)
        self.each = max(1, ranks // max(1, len(np.unique(offers.lane))))

    def pools(self, lane: np.ndarray, rank: np.ndarray, place: np.ndarray) -> _Pools:
        """For the `place`-th rank of `want` asking `lane`."""
        first = np.cumsum(self.members) - self.members
        low, size = first[lane], self.members[lane]
        if self.node_size is not None:
            nodes = 1 + max(int(self.rank.max()), int(rank.max())) // self.node_size if len(rank) else 1
            at = self.lane * nodes + self.rank // self.node_size
            near = lane * nodes + rank // self.node_size
            a, b = np.searchsorted(at, near, side="left"), np.searchsorted(at, near, side="right")
            low, size = np.where(a < b, a, low), np.where(a < b, b - a, size)
        parts = -(-size // np.minimum(size, self.each))
        # Ranks take turns by their place; the second term keeps those a multiple of `size` apart from
        # all falling on one member.
        return _Pools(low, size, parts, place + place // size)


def _receive(
    have: RowMap, want: RowMap, holders: _Holders, offers: _Runs, rank: int, w: int, h: int | None
) -> tuple[tuple[Rows, Rows], list[tuple[int, Rows]]]:
    """What `rank`, in lane w of `want` and h of `have`, keeps and receives."""
    mine = _runs(want, w)
    own = _runs(have, -1 if h is None else h)
    i, k, start, stop = meet(mine.start, mine.stop, own.start, own.stop)
    keep = spans(start + own.shift[k], stop - start), spans(start + mine.shift[i], stop - start)
    i, start, stop = outside(mine.start, mine.stop, own.start, own.stop)
    shift = mine.shift[i]
    i, k, start, stop = meet(start, stop, offers.start, offers.stop)
    order = np.argsort(offers.lane[k], kind="stable")
    lane, start, length = offers.lane[k][order], start[order], (stop - start)[order]
    local = start + shift[i][order]
    asked, group = np.unique(lane, return_inverse=True)
    place = sum(len(ranks) for ranks in want.lanes[:w]) + want.lanes[w].index(rank)
    pool = holders.pools(asked, np.full(len(asked), rank), np.full(len(asked), place))
    which, part = repeat_groups(np.zeros(len(asked), dtype=np.int64), pool.parts)
    _, of, local, length = _cut(local, length, group, which, part, pool.parts)
    q = which[of]
    sender = holders.rank[pool.low[q] + (part[of] + pool.turn[q]) % pool.size[q]]
    return keep, _by_peer(sender, local, length, rank)


def _send(
    have: RowMap, want: RowMap, holders: _Holders, offers: _Runs, rank: int, h: int
) -> list[tuple[int, Rows]]:
    """What `rank`, in lane h of `have`, sends."""
    mine = offers.take(np.flatnonzero(offers.lane == h))
    if not len(mine.start):
        return []
    runs = _runs(want)
    i, k, start, stop = meet(runs.start, runs.stop, mine.start, mine.stop)
    order = np.argsort(runs.lane[i], kind="stable")
    lane, start, stop, shift = runs.lane[i][order], start[order], stop[order], mine.shift[k][order]
    # The ranks that ask this lane and are served by this rank, with the part that is its.
    peer, peer_lane = _flat(want.lanes)
    member_of = _lane_lookup(have, peer)
    asks = np.flatnonzero(np.isin(peer_lane, lane) & (member_of != h))
    pool = holders.pools(np.full(len(asks), h), peer[asks], asks)
    me = int(np.flatnonzero((holders.rank == rank) & (holders.lane == h))[0]) - pool.low
    part = (me - pool.turn) % pool.size
    served = np.flatnonzero((me >= 0) & (me < pool.size) & (part < pool.parts))
    asks, part, parts = asks[served], part[served], pool.parts[served]
    first, last = (np.searchsorted(lane, peer_lane[asks], side=s) for s in ("left", "right"))
    ask, piece = repeat_groups(first, last - first)
    start, stop, shift = start[piece], stop[piece], shift[piece]
    # Where rows are in several lanes, an asking rank may have some of them itself.
    ask, start, stop, shift = _without_own(have, member_of[asks], ask, start, stop, shift)
    _, of, local, length = _cut(start + shift, stop - start, ask, np.arange(len(asks)), part, parts)
    return _by_peer(peer[asks][of], local, length, rank)


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


def _flat(lanes: tuple[tuple[int, ...], ...]) -> tuple[np.ndarray, np.ndarray]:
    """(rank, lane) of every member, in order."""
    size = np.asarray([len(ranks) for ranks in lanes], dtype=np.int64)
    rank = np.asarray([r for ranks in lanes for r in ranks], dtype=np.int64)
    return rank, np.repeat(np.arange(len(lanes)), size)


def _lane_lookup(m: RowMap, ranks: np.ndarray) -> np.ndarray:
    """The lane of each rank, -1 where it is in none."""
    rank, lane = _flat(m.lanes)
    if not len(rank):
        return np.full(len(ranks), -1)
    order = np.argsort(rank)
    k = order[np.minimum(np.searchsorted(rank[order], ranks), len(rank) - 1)]
    return np.where(rank[k] == ranks, lane[k], -1)


def _moves(have: RowMap, want: RowMap, found: np.ndarray) -> bool:
    """Whether any rank lacks a row that it wants and another has."""
    needed, held = np.zeros(len(want.lanes), dtype=np.int64), np.zeros(len(have.lanes), dtype=np.int64)
    np.add.at(needed, want.lane, found)
    np.add.at(held, have.lane, have.length)
    rank, w = _flat(want.lanes)
    rank, w = rank[needed[w] > 0], w[needed[w] > 0]
    h = _lane_lookup(have, rank)
    if np.any(h < 0) or np.any(held[h] < needed[w]):
        return True
    # Every lane that wants rows, against each lane of `have` that its ranks are in.
    pairs = np.unique(w * len(have.lanes) + h)
    w, h = pairs // max(1, len(have.lanes)), pairs % max(1, len(have.lanes))
    runs = _runs(want)
    order = np.argsort(runs.lane, kind="stable")
    first, last = (np.searchsorted(runs.lane[order], w, side=s) for s in ("left", "right"))
    pair, k = repeat_groups(first, last - first)
    size = 1 + int(max((want.start + want.length).max(initial=0), (have.start + have.length).max(initial=0)))
    own = np.sort(have.lane * size + have.start), np.sort(have.lane * size + have.start + have.length)
    at = h[pair] * size + runs.start[order[k]]
    i, _, start, stop = meet(at, at + (runs.stop - runs.start)[order[k]], *own)
    kept = np.zeros(len(pairs), dtype=np.int64)
    np.add.at(kept, pair[i], stop - start)
    return bool(np.any(kept < needed[w]))


def _layers(dest: RowMap) -> list[RowMap]:
    """Split a map into ones in which every row is in one lane at most; one layer in the usual case."""
    runs = _runs(dest)
    if np.all(runs.stop[:-1] <= runs.start[1:]):
        return [dest]
    pieces, _, nth = _split(runs)
    return [
        RowMap(dest.lanes, p.start, p.stop - p.start, p.lane, p.start + p.shift, dest.rows)
        for p in (pieces.take(np.flatnonzero(nth == k)) for k in range(int(nth.max()) + 1))
    ]

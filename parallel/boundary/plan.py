"""Boundary plans: from who has and who wants which rows to what one rank sends, receives and keeps. Pure.

Every wanted row that a rank does not have arrives exactly once, from one of the ranks that have it; a row
that a rank has already stays. That is the information minimum (design law 5). A rank's part is worked out
from the two maps alone, so all ranks agree without a word, and costs O((runs + ranks) log runs).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parallel.boundary.rows import RowMap

Rows = slice | np.ndarray  # local rows: a slice where they are consecutive


@dataclass(frozen=True)
class Transfer:
    """One direction of an edge as one rank sees it.

    rows_in, rows_out: local rows before and after. keep: (rows of the input, rows of the output) that stay.
    sends, recvs: (peer rank, rows of the input / output), in order of global row for each peer.
    covered: whether every output row is kept or received; the others are zero.
    moves: whether any rank of the edge sends anything.
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
    def identity(self) -> bool:
        """Whether the output is the input."""
        kept = all(isinstance(rows, slice) and rows == slice(0, self.rows_in) for rows in self.keep)
        return not self.sends and not self.recvs and self.rows_in == self.rows_out and kept


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


def plan_edge(
    name: str, source: RowMap, dest: RowMap, rank: int, *, node_size: int | None = None
) -> EdgePlan:
    """Plan both directions of an edge for `rank`.

    Forward: every destination lane gets the rows it wants. Backward: every source replica gets the gradient
    of its rows. Ranks of one destination lane hold equal gradients, of which one is taken; distinct lanes
    that consumed the same row are added. node_size: ranks a node, so that senders nearby are preferred.
    """
    forward = plan_transfer(source, dest, rank, node_size=node_size)
    backward = tuple(
        plan_transfer(layer, source, rank, node_size=node_size, partial=True) for layer in _layers(dest)
    )
    return EdgePlan(name, forward, backward)


def plan_transfer(
    have: RowMap, want: RowMap, rank: int, *, node_size: int | None = None, partial: bool = False
) -> Transfer:
    """What `rank` sends, receives and keeps so that every lane of `want` gets its rows.

    Raises ValueError where a wanted row is in no lane of `have` (unless partial) or in several of them.
    """
    own_have, own_want = have.lane_of(rank), want.lane_of(rank)
    holders = _sorted_runs(have)
    ends = holders.start + holders.length
    if np.any(ends[:-1] > holders.start[1:]):
        k = int(np.flatnonzero(ends[:-1] > holders.start[1:])[0])
        raise ValueError(f"rows from {holders.start[k + 1]} on are held by two lanes; make them one lane")
    pairs = _overlaps(want, holders)
    covered = _covered(want, pairs, holders, partial)
    # Whether a pair stays: the wanting rank is one of the ranks that have it. Judged lane by lane.
    lane_pairs = np.unique(np.stack([pairs.have_lane, pairs.want_lane]), axis=1).T
    moves = any(not set(want.lanes[w]) <= set(have.lanes[h]) for h, w in lane_pairs)

    keep: tuple[Rows, Rows] = (slice(0, 0), slice(0, 0))
    recvs: list[tuple[int, Rows]] = []
    if own_want is not None:
        mine = pairs.take(pairs.want_lane == own_want)
        stays = mine.have_lane == (-1 if own_have is None else own_have)
        kept = mine.take(stays)
        keep = _spans(kept.have_local, kept.length), _spans(kept.want_local, kept.length)
        come = mine.take(~stays)
        replica = want.lanes[own_want].index(rank)
        senders = np.asarray(
            [_sender(have.lanes[h], rank, own_want + replica, node_size) for h in range(len(have.lanes))]
        )[come.have_lane]
        recvs = _by_peer(senders, come.want_local, come.length)
    sends: list[tuple[int, Rows]] = []
    if own_have is not None and moves:
        mine = pairs.take(pairs.have_lane == own_have)
        sends = _sends(mine, have.lanes[own_have], want, rank, node_size)
    rows_in = 0 if own_have is None else int(have.rows[own_have])
    rows_out = 0 if own_want is None else int(want.rows[own_want])
    full = covered or own_want is None or count(keep[1]) + sum(count(r) for _, r in recvs) == rows_out
    return Transfer(rank, rows_in, rows_out, keep, tuple(sends), tuple(recvs), full, moves)


@dataclass(frozen=True)
class _Pairs:
    """Stretches of rows that a run of `want` and a run of `have` share, in order of global row."""

    start: np.ndarray
    length: np.ndarray
    have_lane: np.ndarray
    want_lane: np.ndarray
    have_local: np.ndarray
    want_local: np.ndarray

    def take(self, which: np.ndarray) -> _Pairs:
        return _Pairs(
            *(
                getattr(self, f)[which]
                for f in ("start", "length", "have_lane", "want_lane", "have_local", "want_local")
            )
        )


def _sorted_runs(m: RowMap) -> RowMap:
    some = np.flatnonzero(m.length > 0)
    return m.select(some[np.argsort(m.start[some], kind="stable")])


def _overlaps(want: RowMap, holders: RowMap) -> _Pairs:
    """All overlaps of want's runs with the sorted, disjoint runs of holders."""
    w = _sorted_runs(want)
    low = np.searchsorted(holders.start + holders.length, w.start, side="right")
    high = np.searchsorted(holders.start, w.start + w.length, side="left")
    n = np.maximum(high - low, 0)
    wi = np.repeat(np.arange(len(n)), n)
    hi = np.arange(len(wi)) - np.repeat(np.cumsum(n) - n, n) + np.repeat(low, n)
    start = np.maximum(w.start[wi], holders.start[hi])
    stop = np.minimum(w.start[wi] + w.length[wi], holders.start[hi] + holders.length[hi])
    return _Pairs(
        start,
        stop - start,
        holders.lane[hi],
        w.lane[wi],
        holders.local[hi] + start - holders.start[hi],
        w.local[wi] + start - w.start[wi],
    )


def _covered(want: RowMap, pairs: _Pairs, holders: RowMap, partial: bool) -> bool:
    if int(pairs.length.sum()) == int(want.length.sum()):
        return True
    if not partial:
        held: set[int] = set()
        for s, n in zip(holders.start, holders.length, strict=True):
            held.update(range(int(s), int(s + n)))
        lost = [
            r for s, n in zip(want.start, want.length, strict=True) for r in range(s, s + n) if r not in held
        ]
        raise ValueError(f"rows {lost[0]}-{lost[-1]} ({len(lost)} of them) are wanted but no rank has them")
    return False


def _sender(holders: tuple[int, ...], rank: int, turn: int, node_size: int | None) -> int:
    """Which of the ranks with equal copies serves `rank`: a near one, and each in its turn.

    A formula of the two lanes alone, so both ends find the same answer without looking at other ranks.
    """
    if node_size is not None:
        near = [h for h in holders if h // node_size == rank // node_size]
        if near:
            return near[turn % len(near)]
    return holders[turn % len(holders)]


def _sends(
    mine: _Pairs, replicas: tuple[int, ...], want: RowMap, rank: int, node_size: int | None
) -> list[tuple[int, Rows]]:
    """What this rank sends of the rows that it shares with `replicas`."""
    peers: list[np.ndarray] = []
    which: list[np.ndarray] = []
    for lane in np.unique(mine.want_lane):
        rows = np.flatnonzero(mine.want_lane == lane)
        for i, peer in enumerate(want.lanes[lane]):
            if peer not in replicas and _sender(replicas, peer, int(lane) + i, node_size) == rank:
                peers.append(np.full(len(rows), peer))
                which.append(rows)
    if not peers:
        return []
    chosen = np.concatenate(which)
    return _by_peer(np.concatenate(peers), mine.have_local[chosen], mine.length[chosen])


def _by_peer(peer: np.ndarray, local: np.ndarray, length: np.ndarray) -> list[tuple[int, Rows]]:
    """Group stretches (in global order) by peer, keeping their order."""
    out = []
    order = np.argsort(peer, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(peer[order])) + 1):
        if len(group):
            out.append((int(peer[group[0]]), _spans(local[group], length[group])))
    return out


def _spans(local: np.ndarray, length: np.ndarray) -> Rows:
    """Local rows of consecutive stretches, as a slice where they follow each other."""
    if len(local) == 0:
        return slice(0, 0)
    if np.all(local[:-1] + length[:-1] == local[1:]):
        return slice(int(local[0]), int(local[-1] + length[-1]))
    before = np.cumsum(length) - length
    return np.arange(int(length.sum())) - np.repeat(before, length) + np.repeat(local, length)


def _layers(dest: RowMap) -> list[RowMap]:
    """Split a map into ones in which every row is in one lane at most; one layer in the usual case."""
    runs = np.flatnonzero(dest.length > 0)
    runs = runs[np.argsort(dest.start[runs], kind="stable")]
    ends = dest.start[runs] + dest.length[runs]
    if np.all(ends[:-1] <= dest.start[runs][1:]):
        return [dest]
    layers: list[list[int]] = []
    last: list[int] = []
    for run, end in zip(runs, ends, strict=True):
        free = next((k for k, e in enumerate(last) if e <= dest.start[run]), None)
        if free is None:
            layers.append([])
            last.append(0)
            free = len(last) - 1
        layers[free].append(int(run))
        last[free] = int(end)
    return [dest.select(np.asarray(layer)) for layer in layers]

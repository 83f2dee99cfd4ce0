"""Boundary plans: from who has and who wants which rows to what one rank sends, receives and keeps. Pure.

Every wanted row that a rank does not have arrives exactly once, from one of the ranks that have it; a row
that a rank has already stays. That is the information minimum (design law 5). A rank's part is worked out
from the two maps alone, so all ranks agree without a word. Runs are sorted once and then met by binary
search: O(n log n) time and O(n) memory in n = runs + ranks + the stretches that this rank has a part in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parallel.boundary.nodes import Relay, by_nodes
from parallel.boundary.routes import direct, offers_of, places, split
from parallel.boundary.rows import RowMap, Runs
from parallel.sequence.intervals import Rows, before, count, meet, outside, sums
from parallel.topology.directions import Directions


@dataclass(frozen=True)
class Transfer:
    """One direction of an edge as one rank sees it.

    rows_in, rows_out: local rows before and after. keep: (rows of the input, rows of the output) that stay.
    sends, recvs: (peer rank, rows of the input / output), in order of global row for each peer, one entry a
    peer. relay: the hop after these, from rows of the output to rows of the output, None on all ranks or on
    none. covered: whether every output row is kept or received; the others are zero. moves: whether any rank
    of the edge sends anything, equal on all ranks (a collective transport needs all of them to agree).
    """

    rank: int
    rows_in: int
    rows_out: int
    keep: tuple[Rows, Rows]
    sends: tuple[tuple[int, Rows], ...]
    recvs: tuple[tuple[int, Rows], ...]
    relay: Relay | None
    covered: bool
    moves: bool

    @property
    def received_rows(self) -> int:
        """Rows that come from other ranks."""
        relayed = self.relay.recvs if self.relay else ()
        return sum(count(rows) for _, rows in (*self.recvs, *relayed))

    @property
    def view(self) -> slice | None:
        """Where the output is a stretch of the input, that stretch."""
        source, dest = self.keep
        if (
            self.received_rows
            or not self.covered
            or not isinstance(source, slice)
            or not isinstance(dest, slice)
        ):
            return None
        return source if dest.start == 0 else None

    @property
    def identity(self) -> bool:
        """Whether the output is the input, and nothing is sent."""
        return not self.sends and self.view == slice(0, self.rows_in)


@dataclass(frozen=True)
class EdgePlan:
    """Both directions of an edge for one rank. The results of the backward transfers are added up: there is
    one for each time that a row has a further, distinct consumer. row_shape: of one row, where known."""

    name: str
    forward: Transfer
    backward: tuple[Transfer, ...]
    row_shape: tuple[int, ...] | None = None


def plan_edge(
    name: str,
    source: RowMap,
    dest: RowMap,
    rank: int,
    *,
    node_size: int | None = None,
    row_shape: tuple[int, ...] | None = None,
) -> EdgePlan:
    """Plan both directions of an edge for `rank`.

    Forward: every destination lane gets the rows it wants. Backward: every source replica gets the gradient
    of its rows. Ranks of one destination lane hold equal gradients, of which one is taken; distinct lanes
    that consumed the same row are added. node_size: ranks a node, where links inside a node are faster: a row
    then crosses to each node once, however many of its ranks want it. row_shape: trailing dims of the
    tensors, to have them checked: two ranks that disagree would break off in the transport, without a word.
    Raises ValueError where a wanted row is on no rank.
    """
    forward = plan_transfer(source, dest, rank, node_size=node_size)
    backward = tuple(
        plan_transfer(layer, source, rank, node_size=node_size, partial=True) for layer in _layers(dest)
    )
    return EdgePlan(name, forward, backward, row_shape)


def plan_transfer(
    have: RowMap, want: RowMap, rank: int, *, node_size: int | None = None, partial: bool = False
) -> Transfer:
    """What `rank` sends, receives and keeps so that every rank of `want` gets its rows.

    A row in several lanes of `have` is taken from one of them. Raises ValueError where a wanted row is in no
    lane of `have`; with `partial`, such rows become zero instead.
    """
    if node_size is not None and node_size < 1:
        raise ValueError(f"node_size is {node_size}; needed: ranks a node, or None where all links are alike")
    found = _check_held(want, offers_of(have), partial)
    if node_size is None:
        routes, relay = direct(have, want, rank), None
    else:
        routes, relay = by_nodes(have, want, rank, node_size)
    h, w = have.lane_of(rank), want.lane_of(rank)
    rows_in = 0 if h is None else int(have.rows[h])
    rows_out = 0 if w is None else int(want.rows[w])
    arriving = (*routes.recvs, *(relay.recvs if relay else ()))
    covered = count(routes.keep[1]) + sum(count(r) for _, r in arriving) == rows_out
    moves = bool(routes.sends or routes.recvs) or _moves(have, want, found)
    sends, recvs = tuple(routes.sends), tuple(routes.recvs)
    return Transfer(rank, rows_in, rows_out, routes.keep, sends, recvs, relay, covered, moves)


def edge_rows(source: RowMap, dest: RowMap) -> Directions[int]:
    """Rows that all ranks of an edge together receive in each direction: the sums over ranks of
    Transfer.received_rows. O(n log n) in runs and ranks; raises as plan_edge() does."""
    gradients = (
        _received(layer, source, _check_held(source, offers_of(layer), True)) for layer in _layers(dest)
    )
    return Directions(
        forward=_received(source, dest, _check_held(dest, offers_of(source), False)),
        backward=sum(gradients),
    )


def _received(have: RowMap, want: RowMap, found: np.ndarray) -> int:
    """Rows that all ranks of `want` lack, of those that some rank has; found: _check_held()."""
    needed = sums(found, want.lane, len(want.lanes))
    _, w = want.members
    _, _, ranks, shared = _shared(have, want, np.ones_like(w, dtype=bool))
    return int(needed[w].sum() - (ranks * shared).sum())


def _shared(
    have: RowMap, want: RowMap, which: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of those members of `want` that are in a lane of `have` too: columns (lane of `want`, lane of `have`,
    how many ranks are in both, rows that both lanes have), each pair of lanes once. which: of which members.
    """
    rank, w = (column[which] for column in want.members)
    h = have.lanes_of(rank)
    lanes = max(1, len(have.lanes))
    pairs, ranks = np.unique(w[h >= 0] * lanes + h[h >= 0], return_counts=True)
    w, h = np.divmod(pairs, lanes)
    runs = want.runs
    order = np.argsort(runs.lane, kind="stable")
    pair, k = places(runs.lane[order], w)
    size = 1 + max(want.reach, have.reach)
    at = h[pair] * size + runs.start[order[k]]
    i, _, start, stop = meet(at, at + (runs.stop - runs.start)[order[k]], *have.by_lane(size))
    return w, h, ranks, sums(stop - start, pair[i], len(w))


def _check_held(want: RowMap, offers: Runs, partial: bool) -> np.ndarray:
    """Rows of each run of `want` that some rank has, int64 [runs]."""

    def below(row: np.ndarray) -> np.ndarray:
        """Held rows below `row`."""
        k = np.searchsorted(offers.start, row, side="right") - 1
        inside = np.minimum(row - offers.start[k], length[k])
        return np.where(k < 0, 0, total[k] + inside)

    length = offers.stop - offers.start
    total = before(length)
    found = below(want.stop) - below(want.start) if len(length) else np.zeros_like(want.length)
    if not partial and int(found.sum()) < int(want.length.sum()):
        run, low, high = outside(want.start, want.stop, offers.start, offers.stop)
        k = int(np.argmin(low))
        asking = want.lanes[int(want.lane[run[k]])]
        raise ValueError(f"rows {low[k]}-{high[k] - 1} are wanted by ranks {asking}, but no rank has them")
    return found


def _moves(have: RowMap, want: RowMap, found: np.ndarray) -> bool:
    """Whether any rank lacks a row that it wants and another has."""
    needed, held = sums(found, want.lane, len(want.lanes)), sums(have.length, have.lane, len(have.lanes))
    rank, w = want.members
    some = needed[w] > 0
    h = have.lanes_of(rank[some])
    if np.any(h < 0) or np.any(held[h] < needed[w[some]]):
        return True
    w, _, _, shared = _shared(have, want, some)
    return bool(np.any(shared < needed[w]))


def _layers(dest: RowMap) -> list[RowMap]:
    """Split a map into ones in which every row is in one lane at most; one layer in the usual case."""
    runs = dest.runs
    if np.all(runs.stop[:-1] <= runs.start[1:]):
        return [dest]
    pieces, _, nth = split(runs)
    return [
        RowMap(dest.lanes, p.start, p.stop - p.start, p.lane, p.start + p.shift, dest.rows)
        for p in (pieces.take(np.flatnonzero(nth == k)) for k in range(int(nth.max()) + 1))
    ]

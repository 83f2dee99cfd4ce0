"""Boundary plans: from who holds and who wants which rows to what one rank sends, receives and keeps. Pure.

Every wanted row that a rank does not hold arrives exactly once, from one of the ranks that hold it; a row
that a rank holds already stays. These are the fewest bytes that any exchange needs (law 5). A rank computes
its part from the two maps alone, so nothing is agreed at run time (law 4). Runs are sorted once and then met
by binary search: O(n log n) time and O(n) memory in n = runs + ranks + stretches that this rank sends,
receives or keeps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parallel.boundary.nodes import Hops, Relay, by_nodes
from parallel.boundary.repeats import Repeats, repeats_of
from parallel.boundary.routes import Kept, Own, direct_all, offers_of
from parallel.boundary.rows import RowMap
from parallel.boundary.runs import Runs, indices_of, split_at_ends
from parallel.comm.transport import Message
from parallel.sequence.intervals import Column, before, count, meet, outside, sums
from parallel.topology.directions import Directions


@dataclass(frozen=True)
class Transfer:
    """One direction of an edge as one rank sees it.

    rank: the global rank whose part this is.
    rows_in, rows_out: local rows before and after.
    keep: rows of the input that stay, and where they go in the output.
    sends, recvs: rows of the input that leave and rows of the output that arrive, one message a peer, each in
        ascending order of global row.
    relay: a second hop after these, from rows of the output to rows of the output. None on all ranks or on
        none.
    covered: whether every output row is kept or received; the others are zero.
    moves: whether any rank of the edge sends anything. Equal on all ranks, as collective transports need.
    """

    rank: int
    rows_in: int
    rows_out: int
    keep: Kept
    sends: tuple[Message, ...]
    recvs: tuple[Message, ...]
    relay: Relay | None
    covered: bool
    moves: bool

    @property
    def received_rows(self) -> int:
        """Rows that come from other ranks."""
        relayed = self.relay.recvs if self.relay else ()
        return sum(count(message.rows) for message in (*self.recvs, *relayed))

    @property
    def view(self) -> slice | None:
        """The stretch of the input that is the whole output; None where there is no such stretch."""
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
        """Whether the output is the input, and this rank sends nothing."""
        return not self.sends and self.view == slice(0, self.rows_in)


@dataclass(frozen=True)
class EdgePlan:
    """Both directions of an edge for one rank.

    name: what errors call the edge.
    forward: rows from the source's layout to the destination's.
    backward: gradients back. One transfer for each further, distinct consumer of a row; their results are
        added in this order.
    row_shape: trailing dims of the tensors, where known.
    repeats: rows of the destination that this rank reads at several places; None without any. Transfers know
        their first places only: the others are copied from these after `forward`, and their gradients are
        added to these before `backward`.
    """

    name: str
    forward: Transfer
    backward: tuple[Transfer, ...]
    row_shape: tuple[int, ...] | None = None
    repeats: Repeats | None = None


def plan_edge(
    name: str,
    source: RowMap,
    dest: RowMap,
    rank: int,
    *,
    node_size: int | None = None,
    spares: float = 0.0,
    row_shape: tuple[int, ...] | None = None,
) -> EdgePlan:
    """Plan both directions of an edge for `rank`.

    Forward: every destination lane gets the rows that it wants, each once, however often it reads it.
    Backward: every source replica gets the gradient of its rows. Ranks of one destination lane hold equal
    gradients, and one of them is taken; the gradients of distinct lanes that consumed the same row are added.

    node_size: ranks a node, where links inside a node are faster: a row then crosses to each node once,
    however many of its ranks want it. spares: the least share of the rows crossing to nodes that this must
    spare; else rows go straight to each rank that wants them. row_shape: trailing dims of the tensors, which
    are then checked before anything is sent; otherwise a shape mismatch between two ranks fails inside the
    transport with no useful error. Raises ValueError where a wanted row is on no rank, or a source lane holds
    a row twice.
    """
    if source.copies is not None:
        ranks, place = source.lanes[int(source.copies.lane[0])], int(source.copies.to[0])
        raise ValueError(
            f"edge {name}: ranks {ranks} hold a row twice, the second time as local row {place}; "
            "needed: each row once in a lane of the source"
        )
    plan = functools.partial(plan_transfer, rank=rank, node_size=node_size, spares=spares)
    forward = plan(source, dest)
    backward = tuple(plan(layer, source, partial=True) for layer in layers_of(dest))
    repeats = repeats_of(dest.copies, dest.lanes_of(np.asarray([rank])))[0]
    return EdgePlan(name=name, forward=forward, backward=backward, row_shape=row_shape, repeats=repeats)


def plan_transfer(
    have: RowMap,
    want: RowMap,
    rank: int,
    *,
    node_size: int | None = None,
    spares: float = 0.0,
    partial: bool = False,
) -> Transfer:
    """What `rank` sends, receives and keeps so that every rank of `want` gets its rows.

    A row in several lanes of `have` is taken from one of them. Raises ValueError where a wanted row is in no
    lane of `have`; with `partial`, such rows become zero instead. Copies within a lane are no part of this.
    """
    if node_size is not None and node_size < 1:
        raise ValueError(f"node_size is {node_size}; needed: ranks a node, or None where all links are alike")
    found = check_held(want, offers_of(have), partial)
    own = transfers(have, want, Own.alone(rank), node_size=node_size, spares=spares)[0]
    return replace(own, moves=bool(own.sends or own.recvs) or bool(moves(have, want, found)[0]))


def transfers(
    have: RowMap,
    want: RowMap,
    own: Own,
    *,
    node_size: int | None = None,
    spares: float = 0.0,
    relayed: Sequence[bool] | None = None,
    moving: Sequence[bool] | None = None,
) -> list[Transfer]:
    """The transfer of each rank of `own`. spares, relayed: as in by_nodes(). moving: by rank, Transfer.moves;
    None leaves it False."""
    if node_size is None:
        hops = [Hops(routes, None) for routes in direct_all(have, want, own)]
    else:
        hops = by_nodes(have, want, own, node_size, spares, relayed)
    rows_in, rows_out = have.rows_on_all(own.rank).tolist(), want.rows_on_all(own.rank).tolist()
    out = []
    for k, (routes, relay) in enumerate(hops):
        arriving = (*routes.recvs, *(relay.recvs if relay else ()))
        out.append(
            Transfer(
                rank=int(own.rank[k] - own.base[k]),
                rows_in=rows_in[k],
                rows_out=rows_out[k],
                keep=routes.keep,
                sends=tuple(routes.sends),
                recvs=tuple(routes.recvs),
                relay=relay,
                covered=count(routes.keep.dest) + sum(count(m.rows) for m in arriving) == rows_out[k],
                moves=moving is not None and moving[k],
            )
        )
    return out


def edge_rows(source: RowMap, dest: RowMap) -> Directions[int]:
    """Rows that all ranks of an edge together receive in each direction: the sums over ranks of
    Transfer.received_rows. O(n log n) in runs and ranks; raises as plan_edge() does."""
    gradients = (
        _received(layer, source, check_held(source, offers_of(layer), True)) for layer in layers_of(dest)
    )
    return Directions(
        forward=_received(source, dest, check_held(dest, offers_of(source), False)),
        backward=sum(gradients),
    )


def _received(have: RowMap, want: RowMap, found: Column) -> int:
    """Rows that all ranks of `want` lack, of those that some rank holds; found: of check_held()."""
    needed = sums(found, want.lane, len(want.lanes))
    _, lane = want.members
    common = _common(have, want, np.arange(len(lane)))
    return int(needed[lane].sum() - (common.ranks * common.rows).sum())


class _Common(NamedTuple):
    """Lanes of `want` and `have` with ranks in common, a line a pair of lanes.

    want, have: the lanes. ranks: how many ranks are in both. rows: how many rows are in both.
    """

    want: Column
    have: Column
    ranks: Column
    rows: Column


def _common(have: RowMap, want: RowMap, members: Column) -> _Common:
    """What lanes have in common, as far as the members of `want` with these indices are concerned."""
    rank, w = (column[members] for column in want.members)
    h = have.lanes_of(rank)
    lanes = max(1, len(have.lanes))
    pairs, ranks = np.unique(w[h >= 0] * lanes + h[h >= 0], return_counts=True)
    w, h = np.divmod(pairs, lanes)
    # The runs of each pair's wanting lane, met with those of its holding lane.
    runs = want.runs
    order = np.argsort(runs.lane, kind="stable")
    pair, index = indices_of(runs.lane[order], w)
    run = order[index]
    size = 1 + max(want.reach, have.reach)
    at = h[pair] * size + runs.start[run]
    i, _, start, stop = meet(at, at + runs.stop[run] - runs.start[run], *have.by_lane(size))
    return _Common(want=w, have=h, ranks=ranks, rows=sums(stop - start, pair[i], len(w)))


def check_held(want: RowMap, offers: Runs, partial: bool) -> Column:
    """How many rows of each run of `want` some rank holds, [runs]; offers: those of the holding side.

    Raises ValueError where a row is on no rank, unless `partial`.
    """

    def below(row: Column) -> Column:
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
        readers = want.lanes[int(want.lane[run[k]])]
        raise ValueError(f"rows {low[k]}-{high[k] - 1} are wanted by ranks {readers}, but no rank has them")
    return found


def moves(have: RowMap, want: RowMap, found: Column, stack: Column | None = None) -> NDArray[np.bool_]:
    """Whether any rank lacks a row that it wants and another holds, of each of several maps stacked as one.

    found: of each run of `want`, how many rows some rank holds. stack: of each member of `want`, the number
    of its map; None for one map.
    """
    needed, held = sums(found, want.lane, len(want.lanes)), sums(have.length, have.lane, len(have.lanes))
    rank, lane = want.members
    own = np.zeros_like(rank) if stack is None else stack
    out = np.zeros(1 + int(own.max(initial=0)), dtype=bool)
    some = np.flatnonzero(needed[lane] > 0)
    h = have.lanes_of(rank[some])
    short = h < 0
    short[~short] = held[h[~short]] < needed[lane[some[~short]]]
    out[own[some[short]]] = True
    rest = some[~out[own[some]]]
    if len(rest):
        common = _common(have, want, rest)
        lacking = common.want[common.rows < needed[common.want]]
        out[own[np.isin(lane, lacking) & (needed[lane] > 0) & ~out[own]]] = True
    return out


def layers_of(dest: RowMap, layers: int = 1) -> list[RowMap]:
    """Split a map into maps in which every row is in one lane at most; one map in the usual case. layers: how
    many maps at least; the last ones may be empty."""
    if layers == 1 and dest.runs.disjoint:
        return [dest]
    pieces = split_at_ends(dest.runs)
    n = max(layers, int(pieces.copies.max(initial=1)))
    return [dest.with_runs(pieces.runs.take(np.flatnonzero(pieces.nth == k))) for k in range(n)]

"""Two hops where nodes are known: rows cross the slow link once for each node, then spread inside it. Pure.

A rank gets a row from its own node if any rank there holds it. Every other row that a node wants enters the
node at one of the ranks that want it, in equal shares, and goes on from there to the rest of them. Every rank
computes the entries of all nodes; a run counts once for each node that its lane is on.

A second hop spares the slow link the rows that several ranks of a node want, and costs every rank that takes
part a second message, which starts only when the first has come. Where it would spare nothing, or less than
an asked share of what crosses, each rank gets its rows straight from afar. All ranks decide alike, since the
decision counts the rows of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from parallel.boundary.routes import Routes, Shares, Stretches, direct, split_shares
from parallel.boundary.rows import RowMap
from parallel.boundary.runs import Runs, each_row_once
from parallel.comm.transport import Message
from parallel.sequence.intervals import Column, before, meet, outside, repeat_groups, union


@dataclass(frozen=True)
class Relay:
    """The second hop of a rank, from rows of the output to rows of the output, once the first hop is done.
    One message a peer."""

    sends: tuple[Message, ...]
    recvs: tuple[Message, ...]


class Hops(NamedTuple):
    """One rank's part of both hops. relay: None on all ranks, or on none."""

    routes: Routes
    relay: Relay | None


def by_nodes(have: RowMap, want: RowMap, rank: int, node_size: int, spares: float = 0.0) -> Hops:
    """The part of `rank` where node k is ranks k node_size .. (k + 1) node_size - 1.

    spares: the least share of the rows that cross without a second hop which one must spare.
    """
    nodes = np.concatenate([have.members[0], want.members[0]]) // node_size
    if np.all(nodes == nodes[:1]):
        return Hops(direct(have, want, rank), None)
    entries = _entries(have, want, node_size, spares)
    low = rank // node_size * node_size
    near_have, near_want = (m.on_ranks(low, low + node_size) for m in (have, want))
    near, far = direct(near_have, near_want, rank), direct(have, entries.at, rank)
    routes = Routes(keep=near.keep, sends=[*near.sends, *far.sends], recvs=[*near.recvs, *far.recvs])
    if not entries.spread:
        return Hops(routes, None)
    spread = direct(entries.at.on_ranks(low, low + node_size), _without(near_want, near_have), rank)
    return Hops(routes, Relay(tuple(spread.sends), tuple(spread.recvs)))


class _Entries(NamedTuple):
    """Rows that nodes want and do not hold. at: the ranks at which each enters each node, with local rows
    of `want`: one of them where rows spread, else all that want it. spread: whether rows go on to others of
    their node."""

    at: RowMap
    spread: bool


def _entries(have: RowMap, want: RowMap, node_size: int, spares: float) -> _Entries:
    cells = _Cells.of(want, node_size)
    # Rows of all nodes on one line, node after node.
    size = 1 + max(want.reach, have.reach)
    wanted = _on_nodes(want, cells, size)
    wanted = _held_anywhere(wanted, *union(have.start, have.stop), size)
    held = _on_nodes(have, _Cells.of(have, node_size), size)
    i, start, stop = outside(wanted.start, wanted.stop, *union(held.start, held.stop))
    order = np.argsort(start, kind="stable")
    lacking = Runs(
        start=start[order], stop=stop[order], lane=wanted.lane[i][order], shift=wanted.shift[i][order]
    )
    entering = each_row_once(lacking)
    readers = int(((lacking.stop - lacking.start) * cells.size[lacking.lane]).sum())
    spared = readers - int((entering.stop - entering.start).sum())
    if not spared or spared < spares * readers:
        members = np.split(cells.rank, np.cumsum(cells.size)[:-1])
        straight = RowMap(
            lanes=tuple(tuple(ranks.tolist()) for ranks in members),
            start=lacking.start % size,
            length=lacking.stop - lacking.start,
            lane=lacking.lane,
            local=lacking.start + lacking.shift,
            rows=want.rows[cells.lane],
        )
        return _Entries(straight, spread=False)
    # Each cell's rows in equal shares to its members.
    entering = entering.take(np.argsort(entering.lane, kind="stable"))
    local = entering.start + entering.shift
    shares = Shares.all(cells.size)
    part = split_shares(Stretches(entering.lane, local, entering.stop - entering.start), shares)
    at = RowMap(
        lanes=tuple((rank,) for rank in cells.rank.tolist()),
        start=(entering.start[part.stretch] + part.local - local[part.stretch]) % size,
        length=part.length,
        lane=part.share,
        local=part.local,
        rows=want.rows[cells.lane[shares.group]],
    )
    return _Entries(at, spread=True)


@dataclass(frozen=True)
class _Cells:
    """The ranks of one lane on one node are a cell. Columns; cells are in order of lane, then of node.

    lane, node, size: of each cell, size being its number of ranks. rank: the ranks of all cells, cell after
    cell. of_lane, first: by lane, how many cells it has and the index of its first.
    """

    lane: Column
    node: Column
    size: Column
    rank: Column
    of_lane: Column
    first: Column

    @staticmethod
    def of(m: RowMap, node_size: int) -> _Cells:
        rank, lane = m.members
        nodes = 1 + int(rank.max(initial=0)) // node_size
        order = np.lexsort((rank, lane))
        rank = rank[order]
        cell, size = np.unique(lane[order] * nodes + rank // node_size, return_counts=True)
        of_lane = np.bincount(cell // nodes, minlength=len(m.lanes))
        return _Cells(
            lane=cell // nodes,
            node=cell % nodes,
            size=size,
            rank=rank,
            of_lane=of_lane,
            first=before(of_lane),
        )


def _on_nodes(m: RowMap, cells: _Cells, size: int) -> Runs:
    """The runs of each cell, whose index stands as `lane`: row r of node n is at n size + r."""
    runs = m.runs
    i, cell = repeat_groups(cells.first[runs.lane], cells.of_lane[runs.lane])
    base = cells.node[cell] * size
    return Runs(start=runs.start[i] + base, stop=runs.stop[i] + base, lane=cell, shift=runs.shift[i] - base)


def _held_anywhere(runs: Runs, start: Column, stop: Column, size: int) -> Runs:
    """The part of runs on nodes that is in the rows [start, stop) (disjoint, ascending) of any node."""
    base = runs.start // size * size
    i, _, low, high = meet(runs.start - base, runs.stop - base, start, stop)
    return Runs(start=low + base[i], stop=high + base[i], lane=runs.lane[i], shift=runs.shift[i])


def _without(m: RowMap, others: RowMap) -> RowMap:
    """The map without the rows that `others` has anywhere; local rows keep their numbers."""
    i, low, high = outside(m.start, m.stop, *union(others.start, others.stop))
    return RowMap(
        lanes=m.lanes,
        start=low,
        length=high - low,
        lane=m.lane[i],
        local=m.local[i] + low - m.start[i],
        rows=m.rows,
    )

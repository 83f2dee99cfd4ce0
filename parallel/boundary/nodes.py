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

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parallel.boundary.routes import Own, Routes, Shares, Stretches, direct_all, split_shares
from parallel.boundary.rows import RowMap
from parallel.boundary.runs import Runs, each_row_once
from parallel.comm.transport import Message
from parallel.sequence.intervals import Column, before, meet, outside, repeat_groups, sums, union

Flags = NDArray[np.bool_]


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


def by_nodes(
    have: RowMap,
    want: RowMap,
    own: Own,
    node_size: int,
    spares: float = 0.0,
    relayed: Sequence[bool] | None = None,
) -> list[Hops]:
    """The part of each rank of `own`, each on a node of its own, where node k is ranks k node_size ..
    (k + 1) node_size - 1.

    spares: the least share of the rows that cross without a second hop which one must spare. relayed: by
    rank, whether its map takes second hops; None where the maps are whole, from which it follows.
    """
    nodes = np.unique(np.concatenate([have.members[0], want.members[0]]) // node_size)
    if len(nodes) <= 1 and not any(relayed or ()):
        return [Hops(routes, None) for routes in direct_all(have, want, own)]
    lacking, first_node = _Lacking.of(have, want, node_size), own.base // node_size
    if relayed is None:
        relayed = lacking.spare(first_node, spares).tolist()
    at = lacking.entries(want, np.asarray(relayed)[_map_of(lacking.cells.node, first_node)])
    here = own.rank // node_size
    near_have, near_want = (m.on_nodes(here, node_size) for m in (have, want))
    near, far = direct_all(near_have, near_want, own), direct_all(have, at, own)
    routes = [
        Routes(keep=n.keep, sends=[*n.sends, *f.sends], recvs=[*n.recvs, *f.recvs])
        for n, f in zip(near, far, strict=True)
    ]
    if not any(relayed):
        return [Hops(one, None) for one in routes]
    spread = direct_all(at.on_nodes(here, node_size), _without(near_want, near_have), own)
    return [
        Hops(one, Relay(tuple(on.sends), tuple(on.recvs)) if relay else None)
        for one, on, relay in zip(routes, spread, relayed, strict=True)
    ]


def second_hops(have: RowMap, want: RowMap, node_size: int, spares: float, base: Column) -> Flags:
    """Whether by_nodes() takes second hops, by map, for whole maps that are stacked as one. base: first rank
    of each, ascending."""
    return _Lacking.of(have, want, node_size).spare(base // node_size, spares)


def spare_enough(spared: Column, readers: Column, spares: float) -> Flags:
    """Whether second hops spare some rows, and at least the share `spares` of those that `readers` ranks
    would get from afar."""
    return (spared > 0) & (spared >= spares * readers)


@dataclass(frozen=True)
class _Lacking:
    """Rows that nodes want and do not hold, all nodes on one line: row r of node n is n size + r.

    cells: of the wanting side. runs: what each cell lacks, its index standing as `lane`. once: the same rows,
    each once a node.
    """

    cells: _Cells
    runs: Runs
    once: Runs
    size: int

    @staticmethod
    def of(have: RowMap, want: RowMap, node_size: int) -> _Lacking:
        cells = _Cells.of(want, node_size)
        size = 1 + max(want.reach, have.reach)
        wanted = _on_nodes(want, cells, size)
        wanted = _held_anywhere(wanted, *union(have.start, have.stop), size)
        held = _on_nodes(have, _Cells.of(have, node_size), size)
        i, start, stop = outside(wanted.start, wanted.stop, *union(held.start, held.stop))
        order = np.argsort(start, kind="stable")
        runs = Runs(
            start=start[order], stop=stop[order], lane=wanted.lane[i][order], shift=wanted.shift[i][order]
        )
        return _Lacking(cells, runs, each_row_once(runs), size)

    def spare(self, first_node: Column, spares: float) -> Flags:
        """By map, whether second hops spare enough. first_node: of each map, ascending."""
        n, runs, once = len(first_node), self.runs, self.once
        ranks = (runs.stop - runs.start) * self.cells.size[runs.lane]
        readers = sums(ranks, _map_of(runs.start // self.size, first_node), n)
        entering = sums(once.stop - once.start, _map_of(once.start // self.size, first_node), n)
        return spare_enough(readers - entering, readers, spares)

    def entries(self, want: RowMap, spread: Flags) -> RowMap:
        """The ranks at which rows enter nodes, with local rows of `want`. spread: by cell, whether rows enter
        at one of its ranks, in equal shares; else at all of them."""
        cells = self.cells
        entering = self.once if spread.any() else self.runs
        if self.once is not self.runs and not spread.all():
            # Of several maps that are stacked as one, only some take second hops.
            entering = self.once.take(np.flatnonzero(spread[self.once.lane]))
            entering = entering.join(self.runs.take(np.flatnonzero(~spread[self.runs.lane])))
        entering = entering.take(np.argsort(entering.lane, kind="stable"))
        local = entering.start + entering.shift
        shares = Shares.all(np.where(spread, cells.size, 1))
        part = split_shares(Stretches(entering.lane, local, entering.stop - entering.start), shares)
        ends = np.cumsum(np.where(spread, 1, cells.size)[shares.group]).tolist()
        ranks = cells.rank.tolist()
        return RowMap(
            lanes=tuple(tuple(ranks[a:b]) for a, b in pairwise([0, *ends])),
            start=(entering.start[part.stretch] + part.local - local[part.stretch]) % self.size,
            length=part.length,
            lane=part.share,
            local=part.local,
            rows=want.rows[cells.lane[shares.group]],
        )


def _map_of(node: Column, first_node: Column) -> Column:
    """The map that each node is of, where maps are stacked as one. first_node: of each map, ascending."""
    return np.searchsorted(first_node, node, side="right") - 1


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

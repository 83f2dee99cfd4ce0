"""Two hops where nodes are known: rows cross the slow link once for each node, then spread inside it. Pure.

A rank gets a row from its own node if any rank there has it. Of the others that its node wants, each enters
the node at one of the ranks that want it, in equal shares, and goes on from there to the rest of them. Every
rank works out the entries of all nodes: each run counts once for each node that its lane is on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parallel.boundary.routes import Routes, cut, direct, one_each
from parallel.boundary.rows import RowMap, Runs
from parallel.sequence.intervals import Rows, before, meet, outside, repeat_groups, union


@dataclass(frozen=True)
class Relay:
    """The second hop of a rank: (peer rank, rows of the output), one entry a peer, after its own are in."""

    sends: tuple[tuple[int, Rows], ...]
    recvs: tuple[tuple[int, Rows], ...]


def by_nodes(have: RowMap, want: RowMap, rank: int, node_size: int) -> tuple[Routes, Relay | None]:
    """The part of `rank` in the first and the second hop; the latter is None on all ranks, or on none.

    Node k is ranks k node_size .. (k + 1) node_size - 1.
    """
    everyone = np.concatenate([have.members[0], want.members[0]]) // node_size
    if np.all(everyone == everyone[:1]):
        return direct(have, want, rank), None
    entry, spreads = _entries(have, want, node_size)
    low = rank // node_size * node_size
    near_have, near_want = (m.on_ranks(low, low + node_size) for m in (have, want))
    near, far = direct(near_have, near_want, rank), direct(have, entry, rank)
    routes = Routes(near.keep, [*near.sends, *far.sends], [*near.recvs, *far.recvs])
    if not spreads:
        return routes, None
    again = direct(entry.on_ranks(low, low + node_size), _without(near_want, near_have), rank)
    return routes, Relay(tuple(again.sends), tuple(again.recvs))


def _entries(have: RowMap, want: RowMap, node_size: int) -> tuple[RowMap, bool]:
    """Where each row enters each node that wants it and has it not: each rank a lane of its own, with the
    local rows of `want`. And whether any of these rows goes on to another rank of the node."""
    cells, held = _Cells(want, node_size), _Cells(have, node_size)
    # Rows of all nodes on one line, node after node.
    size = 1 + max(want.reach, have.reach)
    runs = _on_nodes(want, cells, size)
    runs = _meeting(runs, *union(have.start, have.stop), size)
    there = _on_nodes(have, held, size)
    i, start, stop = outside(runs.start, runs.stop, *union(there.start, there.stop))
    order = np.argsort(start, kind="stable")
    asked = Runs(start[order], stop[order], runs.lane[i][order], runs.shift[i][order])
    once = one_each(asked)
    # Each cell's rows in equal shares to its members.
    order = np.argsort(once.lane, kind="stable")
    cell, first = once.lane[order], once.start[order]
    length = once.stop[order] - first
    local = first + once.shift[order]
    which, part = repeat_groups(np.zeros_like(cells.size), cells.size)
    i, k, place, length = cut(local, length, cell, which, part, cells.size)
    start = (first[i] + place - local[i]) % size
    wanted = int(((asked.stop - asked.start) * cells.size[asked.lane]).sum())
    rows = want.rows[cells.lane[which]]
    lanes = tuple((r,) for r in cells.rank.tolist())
    return RowMap(lanes, start, length, k, place, rows), wanted > int(length.sum())


class _Cells:
    """The ranks of one lane on one node are a cell. lane, node, size: of each; rank: all members, cell after
    cell; of_lane, first: how many cells a lane has, and which is its first."""

    def __init__(self, m: RowMap, node_size: int) -> None:
        rank, lane = m.members
        nodes = 1 + int(rank.max(initial=0)) // node_size
        order = np.lexsort((rank, lane))
        self.rank = rank[order]
        cell, self.size = np.unique(lane[order] * nodes + self.rank // node_size, return_counts=True)
        self.lane, self.node = cell // nodes, cell % nodes
        self.of_lane = np.bincount(self.lane, minlength=len(m.lanes))
        self.first = before(self.of_lane)


def _on_nodes(m: RowMap, cells: _Cells, size: int) -> Runs:
    """The runs of each cell: row r of node n is at n size + r; `lane` is the cell."""
    runs = m.runs
    i, cell = repeat_groups(cells.first[runs.lane], cells.of_lane[runs.lane])
    base = cells.node[cell] * size
    return Runs(runs.start[i] + base, runs.stop[i] + base, cell, runs.shift[i] - base)


def _meeting(runs: Runs, start: np.ndarray, stop: np.ndarray, size: int) -> Runs:
    """What runs on nodes share with the rows start .. stop (disjoint, ascending) of any node."""
    base = runs.start // size * size
    i, _, low, high = meet(runs.start - base, runs.stop - base, start, stop)
    return Runs(low + base[i], high + base[i], runs.lane[i], runs.shift[i])


def _without(m: RowMap, others: RowMap) -> RowMap:
    """The map without the rows that are anywhere in `others`; local places stay."""
    i, low, high = outside(m.start, m.stop, *union(others.start, others.stop))
    return RowMap(m.lanes, low, high - low, m.lane[i], m.local[i] + low - m.start[i], m.rows)

"""Row maps: which ranks hold, or want, which rows of a boundary tensor. Pure.

Rows of one edge and micro-batch are numbered globally. A lane is a set of ranks that hold, or want, identical
rows: the tp group of an encoder, or a single rank where the destination is sequence-sharded. A run is a
stretch of consecutive global rows that are consecutive local rows of one lane too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from parallel.boundary.repeats import Copies, once_a_lane
from parallel.boundary.runs import Runs
from parallel.sequence.intervals import Column, before, column, sums


@dataclass(frozen=True, eq=False)
class RowMap:
    """One side of an edge: who holds, or who wants, which global rows. Arrays are int64.

    lanes: by lane, the global ranks with identical copies.
    start, length, lane, local: by run. Run k is global rows [start[k], start[k] + length[k]); they are the
        local rows from local[k] on of every rank of lane[k].
    rows: by lane, how many local rows its ranks have; local rows outside every run and copy carry nothing.
    copies: further local rows of a lane with rows that are in its runs already; None where there are none.

    A row may be in several lanes, and is in the runs of each once.
    """

    lanes: tuple[tuple[int, ...], ...]
    start: Column
    length: Column
    lane: Column
    local: Column
    rows: Column
    copies: Copies | None = None

    @staticmethod
    def of_runs(
        lanes: Sequence[Sequence[int]],
        start: Sequence[int] | Column,
        length: Sequence[int] | Column,
        lane: Sequence[int] | Column,
        local: Sequence[int] | Column | None = None,
        rows: Sequence[int] | Column | None = None,
    ) -> RowMap:
        """A map of any runs. Without `local`, each lane's runs lie end to end in the order given. Without
        `rows`, each lane has as many local rows as its runs reach. Where runs of a lane have a row in common,
        the first of its local rows stays in the runs and the others become copies.

        Raises ValueError for a map that contradicts itself: see check().
        """
        tuples = tuple(tuple(int(r) for r in ranks) for ranks in lanes)
        starts, lengths, owner = (column(a) for a in (start, length, lane))
        if not len(starts) == len(lengths) == len(owner):
            raise ValueError(
                f"runs of unequal count: {len(starts)} starts, {len(lengths)} lengths, {len(owner)} lanes"
            )
        _check_lanes(tuples, owner)
        if local is None:
            order = np.argsort(owner, kind="stable")
            at = np.empty_like(lengths)
            at[order] = before(lengths[order]) - before(sums(lengths, owner, len(tuples)))[owner[order]]
        else:
            at = column(local)
        if rows is None:
            reach = np.zeros(len(tuples), dtype=np.int64)
            np.maximum.at(reach, owner, at + lengths)
        else:
            reach = column(rows)
        made = RowMap(lanes=tuples, start=starts, length=lengths, lane=owner, local=at, rows=reach)
        made.check()
        return made.once()

    @staticmethod
    def of_items(
        lanes: Sequence[Sequence[int]],
        item_rows: Sequence[int] | Column,
        item_lane: Sequence[int] | Column,
    ) -> RowMap:
        """A map of whole items: item i, of item_rows[i] rows, is in lane item_lane[i].

        Global rows are numbered item after item. The items of a lane lie end to end in it.
        """
        rows = column(item_rows)
        return RowMap.of_runs(lanes, before(rows), rows, item_lane)

    def check(self) -> None:
        """Raise ValueError where the map contradicts itself: arrays of unequal length, a lane that does not
        exist, a rank in two lanes, a negative count, runs past their lane's rows, two runs in one local
        row."""
        if not len(self.start) == len(self.length) == len(self.lane) == len(self.local):
            raise ValueError("the columns of the runs have unequal lengths")
        if len(self.rows) != len(self.lanes):
            raise ValueError(f"{len(self.lanes)} lanes, but row counts of {len(self.rows)}")
        _check_lanes(self.lanes, self.lane)
        for name, values in (("start", self.start), ("length", self.length), ("local", self.local)):
            if len(values) and values.min() < 0:
                raise ValueError(f"run {int(values.argmin())} has a negative {name}, {values.min()}")
        over = np.flatnonzero(self.local + self.length > self.rows[self.lane])
        if len(over):
            k, lane = over[0], int(self.lane[over[0]])
            raise ValueError(
                f"lane {lane} (ranks {self.lanes[lane]}) has {self.rows[lane]} local rows, but run {k} "
                f"reaches to {self.local[k] + self.length[k]}"
            )
        some = np.flatnonzero(self.length)
        order = some[np.lexsort((self.local[some], self.lane[some]))]
        end = self.local[order] + self.length[order]
        same = self.lane[order][1:] == self.lane[order][:-1]
        twice = np.flatnonzero(same & (end[:-1] > self.local[order][1:]))
        if len(twice):
            k = order[twice[0] + 1]
            raise ValueError(
                f"local row {self.local[k]} is twice in lane {self.lane[k]} "
                f"(ranks {self.lanes[int(self.lane[k])]}); a local row holds one row"
            )

    def once(self) -> RowMap:
        """The map with each row once in the runs of a lane, and its further places as copies."""
        found = once_a_lane(self.start, self.stop, self.lane, self.local)
        if found is None:
            return self
        return self.with_runs(*found)

    def with_runs(self, runs: Runs, copies: Copies | None = None) -> RowMap:
        """A map of the same lanes and local rows, with these runs and copies instead."""
        return RowMap(
            lanes=self.lanes,
            start=runs.start,
            length=runs.stop - runs.start,
            lane=runs.lane,
            local=runs.start + runs.shift,
            rows=self.rows,
            copies=copies,
        )

    @cached_property
    def stop(self) -> Column:
        """The global row after each run."""
        return self.start + self.length

    @cached_property
    def reach(self) -> int:
        """The global row after the last of all runs."""
        return int(self.stop.max(initial=0))

    @cached_property
    def runs(self) -> Runs:
        """The runs that have rows, by first row."""
        some = np.flatnonzero(self.length)
        some = some[np.argsort(self.start[some], kind="stable")]
        start = self.start[some]
        return Runs(start, self.stop[some], self.lane[some], self.local[some] - start)

    @cached_property
    def lane_order(self) -> tuple[Column, Column]:
        """Indices of `runs` by lane and then by first row, and the lanes in that order."""
        order = np.argsort(self.runs.lane, kind="stable")
        return order, self.runs.lane[order]

    def by_lane(self, size: int) -> tuple[Column, Column]:
        """Columns (start, stop), ascending, of the runs of all lanes on one line: row r of lane k is number
        k size + r. size: more than any global row."""
        base = self.lane * size
        return np.sort(base + self.start), np.sort(base + self.stop)

    @cached_property
    def members(self) -> tuple[Column, Column]:
        """Columns (rank, lane), a line for each rank of each lane, in order of lane."""
        size = np.asarray([len(ranks) for ranks in self.lanes], dtype=np.int64)
        rank = np.fromiter((r for ranks in self.lanes for r in ranks), np.int64, int(size.sum()))
        return rank, np.repeat(np.arange(len(self.lanes)), size)

    def lane_of(self, rank: int) -> int | None:
        """The lane of a rank, None where it is in none."""
        at = np.flatnonzero(self.members[0] == rank)
        return int(self.members[1][at[0]]) if len(at) else None

    def rows_on(self, rank: int) -> int:
        """How many local rows a rank has."""
        lane = self.lane_of(rank)
        return 0 if lane is None else int(self.rows[lane])

    def rows_on_all(self, ranks: Column) -> Column:
        """How many local rows each rank has."""
        lane = self.lanes_of(ranks)
        return np.append(self.rows, 0)[lane]

    def lanes_of(self, ranks: Column) -> Column:
        """The lane of each rank, -1 where it is in none."""
        rank, lane = self._by_rank
        if not len(rank):
            return np.full(len(ranks), -1)
        k = np.minimum(np.searchsorted(rank, ranks), len(rank) - 1)
        return np.where(rank[k] == ranks, lane[k], -1)

    @cached_property
    def _by_rank(self) -> tuple[Column, Column]:
        """`members` in order of rank."""
        rank, lane = self.members
        order = np.argsort(rank)
        return rank[order], lane[order]

    def on_nodes(self, nodes: Column, node_size: int) -> RowMap:
        """The part of the map on these nodes: node k is ranks k node_size .. (k + 1) node_size - 1. Lanes
        without any are left out."""
        rank, lane = self.members
        here = np.flatnonzero(np.isin(rank // node_size, nodes))
        kept = np.unique(lane[here])
        new = np.full(len(self.lanes), -1)
        new[kept] = np.arange(len(kept))
        lanes = np.split(rank[here], np.flatnonzero(np.diff(lane[here])) + 1) if len(here) else []
        runs = np.flatnonzero(new[self.lane] >= 0)
        return RowMap(
            lanes=tuple(tuple(ranks.tolist()) for ranks in lanes),
            start=self.start[runs],
            length=self.length[runs],
            lane=new[self.lane[runs]],
            local=self.local[runs],
            rows=self.rows[kept],
        )


def _check_lanes(lanes: tuple[tuple[int, ...], ...], owner: Column) -> None:
    everyone = [r for ranks in lanes for r in ranks]
    if len(set(everyone)) < len(everyone):
        raise ValueError(f"a rank is in two lanes of one side: {lanes}; a rank holds one boundary tensor")
    if not all(lanes):
        raise ValueError(f"lane {lanes.index(())} has no ranks")
    for bad in owner[(owner < 0) | (owner >= len(lanes))]:
        raise ValueError(f"a run is in lane {bad}, but there are lanes 0-{len(lanes) - 1}")

"""An edge whose rows all stay where they are: each rank's part follows from its own items alone. Pure.

So it is where each item is computed by the very ranks that read it, and these do not split its rows: on one
rank always, and with equal layouts wherever items are dealt with their samples. No maps have to meet then:
a plan takes O(items) time in one column, and O(n log n) in those of the rank.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from parallel.boundary.plan import EdgePlan, Transfer
from parallel.boundary.routes import Kept
from parallel.boundary.sides import lane_ranks
from parallel.sequence.intervals import Column, before, repeat_groups, rows_of_each, sums
from parallel.topology.layout import Layout


class Reads(NamedTuple):
    """The items that one rank reads, in order of micro-batch. rows: of each. position: of its first row in
    its packed stream. batches: how many micro-batches there are."""

    batch: Column
    rows: Column
    position: Column
    batches: int

    @property
    def turn(self) -> Column:
        """Indices of the items in the order in which a rank reads them."""
        return np.lexsort((self.position, self.batch))

    @property
    def total(self) -> Column:
        """By micro-batch, how many rows are read."""
        return sums(self.rows, self.batch, self.batches)


def whole_streams(layout: Layout) -> bool:
    """Whether each rank has all rows of its dp rank."""
    return layout.cp * layout.token_shards == 1


@lru_cache(maxsize=16)
def partners(source: Layout, dest: Layout, stage: int) -> Column | None:
    """By dp rank of dest, that of the source which is on the same ranks, in the stages where rows leave and
    enter; -1 where there is none, None where there can be none."""
    if not whole_streams(source) or not whole_streams(dest) or source.tp != dest.tp:
        return None
    held, read = (
        [tuple(sorted(ranks)) for ranks in lane_ranks(layout, [at]).tolist()]
        for layout, at in ((source, source.pp - 1), (dest, stage))
    )
    number = {ranks: dp for dp, ranks in enumerate(held)}
    return np.asarray([number.get(ranks, -1) for ranks in read], dtype=np.int64)


def still_plans(
    name: str, rank: int, reads: Reads, row_shape: tuple[int, ...] | None
) -> tuple[EdgePlan, ...]:
    """By micro-batch, plan_edge() of a rank that holds the items that it reads, and moves nothing."""
    batch, rows, total = reads.batch, reads.rows, reads.total
    bounds = np.searchsorted(batch, np.arange(reads.batches + 1)).tolist()
    first = before(total)[batch]
    source, dest, turn = before(rows) - first, np.empty_like(rows), reads.turn
    dest[turn] = before(rows[turn])
    held, read = (rows_of_each(at, rows, bounds) for at in (source, dest - first))
    return tuple(
        EdgePlan(
            name,
            forward=_stays(rank, n, Kept(own, place)),
            backward=(_stays(rank, n, Kept(place, own)),),
            row_shape=row_shape,
        )
        for n, own, place in zip(total.tolist(), held, read, strict=True)
    )


def _stays(rank: int, rows: int, keep: Kept) -> Transfer:
    return Transfer(rank, rows, rows, keep, (), (), relay=None, covered=True, moves=False)


def whole_positions(reads: Reads) -> tuple[Column, ...]:
    """By micro-batch, the token positions of the rows that a rank reads of whole streams, in their order."""
    turn = reads.turn
    token = repeat_groups(reads.position[turn], reads.rows[turn])[1]
    return tuple(np.split(token, np.cumsum(reads.total)[:-1]))

"""Which ranks have, or want, which rows of a boundary tensor. Pure.

Rows of one edge and micro-batch are numbered globally. A lane is a set of ranks with identical copies: the
tp group of an encoder, or a single rank where the destination is sequence-sharded. A run is a stretch of
consecutive global rows that lies in consecutive local rows of one lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowMap:
    """lanes: lane -> global ranks. Run k: global rows start[k] .. start[k] + length[k] are the local rows
    from local[k] on of lane[k]. rows: local row count of each lane. All arrays int64.
    """

    lanes: tuple[tuple[int, ...], ...]
    start: np.ndarray
    length: np.ndarray
    lane: np.ndarray
    local: np.ndarray
    rows: np.ndarray

    @staticmethod
    def of_runs(
        lanes: Sequence[Sequence[int]],
        start: Sequence[int] | np.ndarray,
        length: Sequence[int] | np.ndarray,
        lane: Sequence[int] | np.ndarray,
    ) -> RowMap:
        """Each lane's runs laid end to end in the order given. Raises ValueError for lanes that do not exist
        or that share a rank."""
        tuples = tuple(tuple(int(r) for r in ranks) for ranks in lanes)
        everyone = [r for ranks in tuples for r in ranks]
        if len(set(everyone)) < len(everyone):
            raise ValueError(
                f"a rank is in two lanes of one side: {tuples}; a rank holds one boundary tensor"
            )
        starts, lengths, owner = (np.asarray(a, dtype=np.int64).reshape(-1) for a in (start, length, lane))
        if not len(starts) == len(lengths) == len(owner):
            raise ValueError(
                f"runs of unequal count: {len(starts)} starts, {len(lengths)} lengths, {len(owner)} lanes"
            )
        if len(owner) and not (owner.min() >= 0 and owner.max() < len(tuples)):
            raise ValueError(f"a run is in lane {owner.max()}, but there are lanes 0-{len(tuples) - 1}")
        if len(lengths) and lengths.min() < 0:
            raise ValueError(f"a run has {lengths.min()} rows")
        # Local offsets: cumulative lengths within each lane, kept in the given order.
        order = np.argsort(owner, kind="stable")
        before = np.cumsum(lengths[order]) - lengths[order]
        rows = np.bincount(owner, weights=lengths, minlength=len(tuples)).astype(np.int64)
        first = np.cumsum(rows) - rows
        local = np.empty_like(lengths)
        local[order] = before - first[owner[order]]
        return RowMap(tuples, starts, lengths, owner, local, rows)

    @staticmethod
    def of_items(
        lanes: Sequence[Sequence[int]], item_rows: Sequence[int], item_lane: Sequence[int]
    ) -> RowMap:
        """Whole items dealt to lanes: item i has item_rows[i] rows, numbered on from those before it."""
        rows = np.asarray(item_rows, dtype=np.int64)
        return RowMap.of_runs(lanes, np.cumsum(rows) - rows, rows, item_lane)

    def lane_of(self, rank: int) -> int | None:
        """The lane a rank is in, None where it is on neither."""
        return next((i for i, ranks in enumerate(self.lanes) if rank in ranks), None)

    def select(self, runs: np.ndarray) -> RowMap:
        """The same lanes with some of the runs only; local places stay."""
        return RowMap(
            self.lanes, self.start[runs], self.length[runs], self.lane[runs], self.local[runs], self.rows
        )

"""Runs: stretches of consecutive global rows, many at once, as columns of a table. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from parallel.sequence.intervals import Column, meet, repeat_groups


@dataclass(frozen=True)
class Runs:
    """Stretches of global rows in ascending order of `start`. Columns of one length, a line a run.

    start, stop: global rows [start, stop). lane: which lane holds, or wants, them. shift: what to add to a
    global row to get the lane's local row.
    """

    start: Column
    stop: Column
    lane: Column
    shift: Column

    def take(self, which: Column) -> Runs:
        """The runs with these indices, in this order."""
        return Runs(self.start[which], self.stop[which], self.lane[which], self.shift[which])

    def of_lane(self, lane: int) -> Runs:
        """The runs of one lane."""
        return self.take(np.flatnonzero(self.lane == lane))

    def join(self, other: Runs) -> Runs:
        """These runs and then those of `other`, in no order."""
        columns = (np.concatenate([getattr(one, f.name) for one in (self, other)]) for f in fields(self))
        return Runs(*columns)

    @property
    def disjoint(self) -> bool:
        """Whether no row is in two runs."""
        return bool(np.all(self.stop[:-1] <= self.start[1:]))


class Pieces(NamedTuple):
    """Runs split so that two pieces have equal rows or none in common.

    runs: the pieces, by first row and then by lane. copies: how many pieces have the rows of this one.
    nth: which of these a piece is, 0 <= nth < copies.
    """

    runs: Runs
    copies: Column
    nth: Column


def split_at_ends(runs: Runs) -> Pieces:
    """Split every run where another one starts or stops."""
    ends = np.unique(np.concatenate([runs.start, runs.stop]))
    run, _, start, stop = meet(runs.start, runs.stop, ends[:-1], ends[1:])
    order = np.lexsort((runs.lane[run], start))
    first = np.flatnonzero(np.diff(start[order], prepend=-1))
    size = np.diff(np.append(first, len(order)))
    nth = np.arange(len(order)) - np.repeat(first, size)
    pieces = Runs(
        start=start[order], stop=stop[order], lane=runs.lane[run[order]], shift=runs.shift[run[order]]
    )
    return Pieces(pieces, np.repeat(size, size), nth)


def each_row_once(runs: Runs) -> Runs:
    """Disjoint runs of the same rows: where several lanes have a row, they take turns.

    Whose turn it is follows from the local row in the first of these lanes alone, so that a rank that has
    only some runs of a map finds what all others find; scattered bits of it make turns even.
    """
    if runs.disjoint:
        return runs
    pieces, copies, nth = split_at_ends(runs)
    first = np.arange(len(nth)) - nth
    local = (pieces.start + pieces.shift)[first]
    return pieces.take(np.flatnonzero(nth == (local * 0x9E3779B1 >> 16) % copies))


def indices_of(ascending: Column, wanted: Column) -> tuple[Column, Column]:
    """Columns (k, index) of all indices at which `ascending` is wanted[k], in order of k."""
    first = np.searchsorted(ascending, wanted, side="left")
    last = np.searchsorted(ascending, wanted, side="right")
    return repeat_groups(first, last - first)

"""Which rows of a data-parallel lane's items each context- and tensor-parallel rank has. Pure.

The items of a lane lie end to end; their rows are numbered through. The cp ranks cut them into contiguous
stretches without regard to items, so that items longer than a stretch and lanes of fewer items than ranks are
as even as any. With sequence parallelism the tp ranks cut each stretch further.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from parallel.sequence.intervals import Span, shares
from parallel.topology.axis import Axes


def encoder_row_spans(
    rows_per_item: Sequence[int], cp: int, tp: int = 1, sequence_parallel: bool = False
) -> tuple[tuple[Span, ...], ...]:
    """Rows [start, stop) of a lane that each rank gives, as spans[cp rank][tp rank].

    Rows are split by intervals.shares(), over cp first; parallel.boundary.source_side() computes the same.
    Without sequence parallelism the tp ranks of one cp rank give equal rows.
    """
    out = []
    for a, b in shares(sum(rows_per_item), cp):
        out.append(shares(b - a, tp, a) if sequence_parallel else ((a, b),) * tp)
    return tuple(out)


@dataclass(frozen=True)
class Piece:
    """The rows [start, stop) of item number `item`, counted from the item's first row."""

    item: int
    start: int
    stop: int


def pieces(lengths: Sequence[int], span: Span) -> list[Piece]:
    """The parts of items of these lengths, end to end, that lie in `span`; items without a row in it are
    left out."""
    first = (0, *accumulate(lengths))
    a, b = span
    if b <= a:
        return []
    low, high = bisect_right(first, a) - 1, bisect_left(first, b)
    found = ((i, max(a, first[i]) - first[i], min(b, first[i + 1]) - first[i]) for i in range(low, high))
    return [Piece(i, start, stop) for i, start, stop in found if stop > start]


def reach(lengths: Sequence[int], span: Span, n: int | None = None) -> Span:
    """`span` and n tokens on either side of it, not beyond the items that have a token in it (None: all of
    these items)."""
    touched = pieces(lengths, span)
    if not touched:
        return span
    first = (0, *accumulate(lengths))
    low, high = first[touched[0].item], first[touched[-1].item + 1]
    return (low, high) if n is None else (max(low, span[0] - n), min(high, span[1] + n))


@dataclass(frozen=True)
class Share:
    """What one rank has of a lane, in tokens: `unit` of them make a row.

    lengths: tokens of each item; spans: the stretch of each cp rank; own: this cp rank's; parts: what each of
    its tp ranks keeps of it between blocks, all of it without sequence parallelism; part: this rank's.
    """

    lengths: tuple[int, ...]
    spans: tuple[Span, ...]
    own: Span
    parts: tuple[Span, ...]
    part: Span

    @staticmethod
    def of(rows_per_item: Sequence[int], axes: Axes, unit: int = 1) -> Share:
        """The share of the rank at axes.cp, axes.tp."""
        rows = encoder_row_spans(rows_per_item, axes.cp.size, axes.tp.size, axes.sequence_parallel)
        tokens = [tuple((unit * a, unit * b) for a, b in parts) for parts in rows]
        spans = tuple((parts[0][0], parts[-1][1]) for parts in tokens)
        parts = tokens[axes.cp.rank]
        lengths = tuple(unit * n for n in rows_per_item)
        return Share(lengths, spans, spans[axes.cp.rank], parts, parts[axes.tp.rank])

    @property
    def tokens(self) -> int:
        """Tokens of this cp rank."""
        return self.own[1] - self.own[0]

    @property
    def kept(self) -> int:
        """Tokens that this tp rank keeps of them."""
        return self.part[1] - self.part[0]

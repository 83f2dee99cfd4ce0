"""Which rows of the items of a dp rank each context- and tensor-parallel rank has. Pure.

The items of a dp rank lie end to end and their rows are numbered from the first to the last. The rows are
split over the cp ranks into contiguous spans, whatever items these cross: the split is even also for one long
item, and for fewer items than ranks. With sequence parallelism each span is split over the tp ranks too.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from parallel.sequence.intervals import Span, shares
from parallel.topology.axis import Axes


def encoder_row_spans(
    rows_per_item: Sequence[int], cp: int, tp: int = 1, sequence_parallel: bool = False
) -> tuple[tuple[Span, ...], ...]:
    """Rows [start, stop) of a dp rank that each rank outputs, as spans[cp rank][tp rank].

    Rows are split by intervals.shares(), over cp first; parallel.boundary.source_side() computes the same.
    Without sequence parallelism all tp ranks of a cp rank output its rows.
    """
    out = []
    for a, b in shares(sum(rows_per_item), cp):
        out.append(shares(b - a, tp, a) if sequence_parallel else ((a, b),) * tp)
    return tuple(out)


class Piece(NamedTuple):
    """Tokens [start, stop) of item number `item`, counted from the item's first token."""

    item: int
    start: int
    stop: int


def pieces(lengths: Sequence[int], span: Span) -> list[Piece]:
    """The pieces of items of these lengths, end to end, that lie in `span`; an item without a token in it has
    no piece."""
    a, b = span
    if b <= a:
        return []
    first = (0, *accumulate(lengths))
    low, high = _touched(first, span)
    found = ((i, max(a, first[i]) - first[i], min(b, first[i + 1]) - first[i]) for i in range(low, high))
    return [Piece(i, start, stop) for i, start, stop in found if stop > start]


def _touched(first: Sequence[int], span: Span) -> Span:
    """The first item with a token in a span that has some, and the one after the last. first: of each item
    its first token, then their end."""
    return bisect_right(first, span[0]) - 1, bisect_left(first, span[1])


def reach(lengths: Sequence[int], span: Span, n: int | None = None) -> Span:
    """`span` extended by n tokens on either side, but not beyond the items that have a token in `span`. None:
    to the ends of these items."""
    if span[1] <= span[0]:
        return span
    first = (0, *accumulate(lengths))
    low, high = (first[item] for item in _touched(first, span))
    return (low, high) if n is None else (max(low, span[0] - n), min(high, span[1] + n))


@dataclass(frozen=True)
class Share:
    """What one rank has of the items of a dp rank. Spans are [start, stop) in the tokens of all items.

    lengths: tokens of each item.
    spans: the span of each cp rank.
    own: the span of this cp rank.
    parts: what each of its tp ranks keeps of it between blocks: all without sequence parallelism.
    part: what this rank keeps.
    """

    lengths: tuple[int, ...]
    spans: tuple[Span, ...]
    own: Span
    parts: tuple[Span, ...]
    part: Span

    @staticmethod
    def of(
        rows_per_item: Sequence[int], axes: Axes, unit: int = 1, prefix: int = 0, tails: Sequence[int] = ()
    ) -> Share:
        """The share of the rank at axes.cp, axes.tp.

        unit: tokens that make one row. prefix: further tokens of each item, before those of its rows; they
        are where the item's first row is, so that each rank has one stretch of tokens whatever it has of
        rows. tails: by item, further tokens after those of its rows, which are where its last row is.
        """
        rows = encoder_row_spans(rows_per_item, axes.cp.size, axes.tp.size, axes.sequence_parallel)
        tails = tails or (0,) * len(rows_per_item)
        token = _token_numbers(rows_per_item, unit, prefix, tails)
        tokens = [tuple((token(a), token(b)) for a, b in parts) for parts in rows]
        spans = tuple((parts[0][0], parts[-1][1]) for parts in tokens)
        parts = tokens[axes.cp.rank]
        lengths = tuple(unit * n + prefix + tail for n, tail in zip(rows_per_item, tails, strict=True))
        return Share(lengths, spans, spans[axes.cp.rank], parts, parts[axes.tp.rank])

    @property
    def tokens(self) -> int:
        """Tokens of this cp rank."""
        return self.own[1] - self.own[0]

    @property
    def kept(self) -> int:
        """Tokens that this rank keeps between blocks."""
        return self.part[1] - self.part[0]


def _token_numbers(
    rows_per_item: Sequence[int], unit: int, prefix: int, tails: Sequence[int]
) -> Callable[[int], int]:
    """By row number, the token that a share which begins with the row begins with; see Share.of()."""
    if prefix == 0 and not any(tails):
        return lambda row: unit * row
    # An item without rows would have a prefix, or a tail, on no rank.
    assert all(n > 0 for n in rows_per_item), rows_per_item
    first = (0, *accumulate(rows_per_item))
    after = (0, *accumulate(tails))

    def number(row: int) -> int:
        items = bisect_left(first, row)  # that begin before the row
        ended = bisect_right(first, row) - 1
        return unit * row + prefix * items + after[ended]

    return number

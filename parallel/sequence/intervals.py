"""Arithmetic on half-open intervals of whole numbers. Pure.

A few intervals, such as the stretches of one rank, are a list of spans. Many, such as the runs of a boundary,
are columns: int64 arrays of one length, an entry an interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]  # [start, stop)
Column = NDArray[np.int64]  # [n]
Rows = slice | Column  # numbers to index with: a slice where they are consecutive

NONE = slice(0, 0)


def count(rows: Rows) -> int:
    """How many rows."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def size(spans: Sequence[Span]) -> int:
    """How many numbers are in disjoint spans."""
    return sum(stop - start for start, stop in spans)


def numbers(spans: Sequence[Span]) -> Column:
    """The numbers in spans, one after another: int64."""
    return np.concatenate([np.arange(*s, dtype=np.int64) for s in spans] or [np.zeros(0, np.int64)])


@overload
def share_start(n: int, parts: int, k: int) -> int: ...
@overload
def share_start(n: Column, parts: int | Column, k: int | Column) -> Column: ...
def share_start(n: int | Column, parts: int | Column, k: int | Column) -> int | Column:
    """Where share number k begins when n things are split into `parts` contiguous shares: k n // parts.

    Share k is [share_start(n, parts, k), share_start(n, parts, k + 1)). Sizes differ by at most one, for any
    n and parts. Arguments are ints, or int64 arrays that broadcast. Ranks that exchange rows compute both
    ends of a share on their own, so every split of rows, items or samples must use this formula (law 4).
    """
    return k * n // parts


def shares(n: int, parts: int, start: int = 0) -> tuple[Span, ...]:
    """All shares of the n numbers from `start` on, by share_start()."""
    bounds = [start + share_start(n, parts, k) for k in range(parts + 1)]
    return tuple(pairwise(bounds))


def disjoint(spans: Sequence[Span]) -> bool:
    """Whether spans ascend and do not overlap; empty ones may be anywhere."""
    some = [(start, stop) for start, stop in spans if start < stop]
    return all(stop <= start for (_, stop), (start, _) in pairwise(some))


def overlap(a: Sequence[Span], b: Sequence[Span]) -> list[Span]:
    """The intersection of two lists of disjoint spans, ascending."""
    both = [(max(x[0], y[0]), min(x[1], y[1])) for x in a for y in b]
    return sorted((start, stop) for start, stop in both if start < stop)


def join(spans: Sequence[Span]) -> list[Span]:
    """The union of spans, as disjoint, ascending spans that do not touch."""
    out: list[Span] = []
    for start, stop in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        elif start < stop:
            out.append((start, stop))
    return out


def column(values: Sequence[int] | Column) -> Column:
    """Whole numbers as a column: int64 [n]."""
    return np.asarray(values, dtype=np.int64).reshape(-1)


def before(values: Column) -> Column:
    """Exclusive prefix sums: where intervals of these lengths start when they lie end to end."""
    return np.cumsum(values) - values


def sums(values: Column, group: Column, groups: int) -> Column:
    """The sum of the values of each group: [groups]. group: of each value, 0 <= group < groups."""
    out = np.zeros(groups, dtype=np.int64)
    np.add.at(out, group, values)
    return out


def repeat_groups(first: Column, size: Column) -> tuple[Column, Column]:
    """Columns (k, first[k] + j) for each k and each 0 <= j < size[k], in order of k and then of j."""
    k = np.repeat(np.arange(len(size)), size)
    return k, np.arange(len(k)) - np.repeat(before(size) - first, size)


def meet(
    start: Column, stop: Column, others_start: Column, others_stop: Column
) -> tuple[Column, Column, Column, Column]:
    """Intersections of intervals with `others`, which are disjoint, ascending and may be empty.

    Returns columns (interval, other, start, stop), in order of interval and then ascending. O((n + m) log m)
    for n intervals and m others, plus the length of the result.
    """
    low = np.searchsorted(others_stop, start, side="right")
    high = np.searchsorted(others_start, stop, side="left")
    i, k = repeat_groups(low, np.maximum(high - low, 0))
    a, b = np.maximum(start[i], others_start[k]), np.minimum(stop[i], others_stop[k])
    some = np.flatnonzero(a < b)  # others may be empty
    return i[some], k[some], a[some], b[some]


def outside(
    start: Column, stop: Column, others_start: Column, others_stop: Column
) -> tuple[Column, Column, Column]:
    """Intervals without `others`, which are disjoint and ascending.

    Returns columns (interval, start, stop), in order of interval and then ascending.
    """
    low = np.searchsorted(others_stop, start, side="right")
    high = np.searchsorted(others_start, stop, side="left")
    # An interval has a gap before each other interval that it meets, and one after the last.
    i, k = repeat_groups(low, np.maximum(high - low, 0) + 1)
    ends = np.concatenate([[np.iinfo(np.int64).min], others_stop])  # of the other before k
    begins = np.concatenate([others_start, [np.iinfo(np.int64).max]])
    a, b = np.maximum(start[i], ends[k]), np.minimum(stop[i], begins[k])
    some = np.flatnonzero(a < b)
    return i[some], a[some], b[some]


def union(start: Column, stop: Column) -> tuple[Column, Column]:
    """The union of intervals, as disjoint, ascending intervals that do not touch."""
    some = np.flatnonzero(start < stop)
    some = some[np.argsort(start[some], kind="stable")]
    start, reach = start[some], np.maximum.accumulate(stop[some])
    begins = np.flatnonzero(np.append(True, start[1:] > reach[:-1])) if len(start) else some
    return start[begins], reach[np.append(begins[1:], len(start)) - 1] if len(start) else reach


def rows_of(start: Column, length: Column) -> Rows:
    """The numbers in intervals, one after another: a slice where each begins at the end of the last."""
    if len(start) == 0:
        return NONE
    if np.all(start[:-1] + length[:-1] == start[1:]):
        return slice(int(start[0]), int(start[-1] + length[-1]))
    return repeat_groups(start, length)[1]


def join_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, one part after another."""
    start = np.concatenate([[rows.start] if isinstance(rows, slice) else rows for rows in parts])
    length = np.concatenate(
        [[count(rows)] if isinstance(rows, slice) else np.ones_like(rows) for rows in parts]
    )
    some = np.flatnonzero(length)
    return rows_of(start[some], length[some])

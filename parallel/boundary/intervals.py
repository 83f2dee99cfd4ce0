"""Arithmetic on half-open intervals of whole numbers, as columns of int64. Pure."""

from __future__ import annotations

import numpy as np


def repeat_groups(first: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(k, first[k]), (k, first[k] + 1), .. size[k] of them, for each k: two columns."""
    k = np.repeat(np.arange(len(size)), size)
    return k, np.arange(len(k)) - np.repeat(np.cumsum(size) - size - first, size)


def meet(
    start: np.ndarray, stop: np.ndarray, others_start: np.ndarray, others_stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What intervals share with `others`, which are disjoint, ascending and may be empty.

    Returns columns (interval, other, start, stop), in order of interval, then ascending.
    """
    low = np.searchsorted(others_stop, start, side="right")
    high = np.searchsorted(others_start, stop, side="left")
    i, k = repeat_groups(low, np.maximum(high - low, 0))
    a, b = np.maximum(start[i], others_start[k]), np.minimum(stop[i], others_stop[k])
    some = np.flatnonzero(a < b)  # others may be empty
    return i[some], k[some], a[some], b[some]


def outside(
    start: np.ndarray, stop: np.ndarray, others_start: np.ndarray, others_stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What intervals do not share with `others`, which are disjoint and ascending.

    Returns columns (interval, start, stop), in order of interval, then ascending.
    """
    low = np.searchsorted(others_stop, start, side="right")
    high = np.searchsorted(others_start, stop, side="left")
    # The gap before each other that an interval meets, and the one after the last.
    i, k = repeat_groups(low, np.maximum(high - low, 0) + 1)
    ends = np.concatenate([[np.iinfo(np.int64).min], others_stop])  # of the other before k
    begins = np.concatenate([others_start, [np.iinfo(np.int64).max]])
    a, b = np.maximum(start[i], ends[k]), np.minimum(stop[i], begins[k])
    some = np.flatnonzero(a < b)
    return i[some], a[some], b[some]


def union(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers in any of the intervals, as disjoint, ascending intervals that do not touch."""
    some = np.flatnonzero(start < stop)
    some = some[np.argsort(start[some], kind="stable")]
    start, reach = start[some], np.maximum.accumulate(stop[some])
    begins = np.flatnonzero(np.append(True, start[1:] > reach[:-1])) if len(start) else some
    return start[begins], reach[np.append(begins[1:], len(start)) - 1] if len(start) else reach


def spans(start: np.ndarray, length: np.ndarray) -> slice | np.ndarray:
    """The numbers of consecutive intervals: a slice where each begins where the last ended, else an index."""
    if len(start) == 0:
        return slice(0, 0)
    if np.all(start[:-1] + length[:-1] == start[1:]):
        return slice(int(start[0]), int(start[-1] + length[-1]))
    return repeat_groups(start, length)[1]

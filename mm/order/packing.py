"""Samples packed into sequences of bounded length, best fit decreasing. Pure.

The longest sample comes first, and each goes to the fullest sequence that has room for it. That needs at most
11/9 of the fewest sequences, and four more (D. S. Johnson, 1973). With a long tail nearly nothing stays
empty: short samples fill what long ones leave.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from mm.order.shuffle import key_of, keyed
from parallel.sequence.intervals import Column

SPARE = 64


def best_fit(lengths: Column, capacity: int) -> Column:
    """By sample, the number of its sequence; sequences count from 0 as they are begun. O(n log n).

    lengths: at most `capacity`, in tokens.
    """
    out = np.empty(len(lengths), dtype=np.int64)
    room: list[tuple[int, int]] = []  # of each sequence, and its number, ascending
    begun = 0
    order = np.argsort(-lengths, kind="stable")
    for j, n in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(room, (n, -1))
        if at == len(room):
            left, k = capacity, begun
            begun += 1
        else:
            left, k = room.pop(at)
        out[j] = k
        insort(room, (left - n, k))
    return out


def pack(lengths: Column, capacity: int, key: int) -> Column:
    """best_fit() with the sequences in a random order, by a key: otherwise long samples came first.

    A 64th of each stays empty, unless one sample takes it: the room that dealing has to even out costs
    (mm/plan/dealing.py).
    """
    full = capacity - capacity // SPARE
    found = best_fit(np.minimum(lengths, full), full)
    count = int(found.max(initial=-1)) + 1
    place = np.empty(count, dtype=np.int64)
    place[np.argsort(keyed(key, np.arange(count)), kind="stable")] = np.arange(count)
    return place[found]


def window_key(seed: int, window: int) -> int:
    """The key of a window's order."""
    return key_of(seed, "window", window)

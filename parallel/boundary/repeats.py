"""Rows that one lane reads at several places: each is sent once, and copied or summed by its reader. Pure.

A repeated picture, or two samples of one rank that share an item, read the same rows at several places. The
first place is the one that rows are sent to, and that their gradients leave from. Forward, the receiver
copies it to the others. Backward, it first adds their gradients to it, in the order of their local rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from parallel.boundary.runs import Runs, split_at_ends
from parallel.sequence.intervals import Column, repeat_groups


class Copies(NamedTuple):
    """Further places of rows, a line a stretch: local rows [to, to + length) of the ranks of `lane` are the
    same rows as their local rows [of, of + length), which are the first places."""

    lane: Column
    of: Column
    to: Column
    length: Column


class Round(NamedTuple):
    """One further place each of some repeated rows. which: indices into Repeats.first, each once. of: these
    first places. to: the further place."""

    which: Column
    of: Column
    to: Column


@dataclass(frozen=True)
class Repeats:
    """The rows that one rank reads at several places, as local rows.

    first: of each, its first place, ascending. rounds: the further places, of each row in ascending order.
    """

    first: Column
    rounds: tuple[Round, ...]


def once_a_lane(start: Column, stop: Column, lane: Column, local: Column) -> tuple[Runs, Copies] | None:
    """Runs in which each row is once in a lane, at its first local row, and its other places as copies; None
    where no row is twice in a lane. O(n log n) in runs."""
    some = np.flatnonzero(stop > start)
    size = 1 + int(stop.max(initial=0))
    base = lane[some] * size
    order = np.argsort(base + start[some], kind="stable")
    some, base = some[order], base[order]
    low, high, at = base + start[some], base + stop[some], local[some]
    if np.all(np.maximum.accumulate(high)[:-1] <= low[1:]):
        return None
    turn = np.empty_like(at)
    turn[np.argsort(at, kind="stable")] = np.arange(len(at))  # pieces of one row come in this order
    pieces, _, nth = split_at_ends(Runs(low, high, turn, at - low))
    again = np.flatnonzero(nth)
    first = again - nth[again]
    place, of_lane = pieces.start + pieces.shift, pieces.start // size
    copies = Copies(
        lane=of_lane[again],
        of=place[first],
        to=place[again],
        length=(pieces.stop - pieces.start)[again],
    )
    kept = np.flatnonzero(nth == 0)
    base = of_lane[kept] * size
    runs = Runs(pieces.start[kept] - base, pieces.stop[kept] - base, of_lane[kept], pieces.shift[kept] + base)
    return runs, copies


def repeats_of(copies: Copies | None, lane: Column) -> list[Repeats | None]:
    """Of ranks in these lanes, -1 where a rank is in none: None where a rank has no row twice."""
    if copies is None:
        return [None] * len(lane)
    return [_of_lane(copies, np.flatnonzero(copies.lane == one)) for one in lane.tolist()]


def _of_lane(copies: Copies, which: Column) -> Repeats | None:
    if not len(which):
        return None
    length = copies.length[which]
    of, to = (repeat_groups(place[which], length)[1] for place in (copies.of, copies.to))
    order = np.lexsort((to, of))
    of, to = of[order], to[order]
    first, begin, index = np.unique(of, return_index=True, return_inverse=True)
    nth = np.arange(len(of)) - begin[index]
    rounds = (np.flatnonzero(nth == k) for k in range(int(nth.max()) + 1))
    return Repeats(first, tuple(Round(index[k], of[k], to[k]) for k in rounds))

"""Portions of long samples in columns: which numbers they have, and which tokens. Pure.

A sample that is split has as many numbers as portions, one after another, in its place among the others. What
a portion is says mm/plan/truncate.py; here all are found at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm.data.sample import Index, Selection
from parallel.sequence.intervals import Column, before, column, repeat_groups

Bools = NDArray[np.bool_]


class Found(NamedTuple):
    """Samples by number. sample: as the index has them, without portions. portion: which of all portions it
    is, -1 for a whole sample."""

    sample: Column
    portion: Column


@dataclass(frozen=True, eq=False)
class Portions:
    """The portions of some samples; all others are whole.

    sample: those that have portions, ascending, without counting portions. first: of each its first portion,
    and at the end how many there are. start, stop: by portion its tokens, counted behind the begin marker.
    split: whether the portions of a sample are all of it; else each sample has one, its beginning.
    """

    sample: Column
    first: Column
    start: Column
    stop: Column
    split: bool

    @staticmethod
    def none() -> Portions:
        """All samples are whole."""
        empty = np.empty(0, dtype=np.int64)
        return Portions(empty, np.zeros(1, dtype=np.int64), empty, empty, False)

    @staticmethod
    def joined(parts: Sequence[Portions]) -> Portions:
        """Those of consecutive samples together."""
        counts = np.concatenate([np.diff(p.first) for p in parts])
        sample, start, stop = (
            np.concatenate([getattr(p, name) for p in parts]) for name in ("sample", "start", "stop")
        )
        return Portions(sample, column(np.append(before(counts), counts.sum())), start, stop, parts[0].split)

    @cached_property
    def count(self) -> Column:
        """By sample that has portions, how many."""
        return column(np.diff(self.first))

    @cached_property
    def numbers(self) -> Column:
        """By sample that has portions, the number of its first one."""
        return self.sample + self.first[:-1] - np.arange(len(self.sample))

    @property
    def more(self) -> int:
        """How many more numbers there are than samples."""
        return int(self.first[-1]) - len(self.sample)

    def find(self, which: Column) -> Found:
        """What the samples with these numbers are."""
        if not len(self.sample):
            return Found(which, np.full_like(which, -1))
        k = np.searchsorted(self.numbers, which, side="right")
        last = np.maximum(k - 1, 0)
        nth = which - self.numbers[last]
        inside = (k > 0) & (nth < self.count[last])
        sample = np.where(inside, self.sample[last], which - self.first[k] + k)
        return Found(column(sample), column(np.where(inside, self.first[last] + nth, -1)))

    def number(self, sample: Column) -> Column:
        """By sample as the index has it, its number, or that of its first portion."""
        k = np.searchsorted(self.sample, sample)
        return column(sample + self.first[k] - k)

    def counts(self, first: int, stop: int) -> Column:
        """By sample first .. stop - 1 as the index has them, how many numbers it has."""
        out = np.ones(stop - first, dtype=np.int64)
        a, b = np.searchsorted(self.sample, [first, stop])
        out[self.sample[a:b] - first] = self.count[a:b]
        return out

    @property
    def every(self) -> Column:
        """The numbers of all portions."""
        return repeat_groups(self.numbers, self.count)[1]

    def nth(self, portion: Column) -> Column:
        """By portion, which of its sample's it is, from 0 on."""
        return column(portion - self.first[np.searchsorted(self.first, portion, side="right") - 1])

    def place(self, portion: int) -> tuple[int, int]:
        """Which of its sample's a portion is, from 1 on, and how many there are."""
        k = int(np.searchsorted(self.first, portion, side="right")) - 1
        return portion - int(self.first[k]) + 1, int(self.count[k])

    def fingerprint(self, first: int, stop: int) -> bytes:
        """What samples first .. stop - 1, as the index has them, have for portions, where they are split."""
        a, b = self.first[np.searchsorted(self.sample, [first, stop])].tolist() if self.split else (0, 0)
        return self.start[a:b].astype("<i8").tobytes() + self.stop[a:b].astype("<i8").tobytes()

    def renumbered(self, index: Index) -> tuple[tuple[int, ...], tuple[Selection, ...]]:
        """The firsts and the selections of an index, by these numbers."""
        firsts = self.number(column(index.firsts)).tolist()
        return tuple(firsts), tuple(map(self._selection, index.selections))

    def _selection(self, old: Selection) -> Selection:
        end = old.first + old.size
        first, stop = self.number(column([old.first, end])).tolist()
        bits = old.bits
        if bits is not None and self.more:
            taken = np.unpackbits(bits, count=old.size)
            bits = np.packbits(np.repeat(taken, self.counts(old.first, end)))
        return Selection(old.name, first, stop - first, bits)


@dataclass(frozen=True, eq=False)
class Lengths:
    """The texts and items of some samples, a line each, in order of sample.

    sample: which of them. size: tokens. item, learned: which are items, and which texts with a loss. By
    sample: markers.
    """

    sample: Column
    size: Column
    item: Bools
    learned: Bools
    markers: Bools


def split(which: Column, lines: Lengths, context: int) -> Portions:
    """The portions of samples with these numbers, ascending, of which something is learned. A sample without
    any is left out: an item of it is longer than the context.

    O(lines), and a round for each portion of the sample that has most of them up to its last item.
    """
    of, start, stop = _spans(lines, context)
    learns = _learned(of, start, stop, lines) > 0
    of, start, stop = of[learns], start[learns], stop[learns]
    base = _bases(lines)[of]
    count = np.bincount(of, minlength=len(which))
    has = count > 0
    first = np.append(before(count[has]), len(of))
    return Portions(which[has], column(first), start - base, stop - base, True)


def beginnings(which: Column, lines: Lengths, context: int) -> Portions:
    """The first portions of samples with these numbers, ascending, where something of it is learned."""
    base, room = _bases(lines), context - 2 * lines.markers
    stop, whole = _next(base, base + room, _Items.of(lines))
    own = np.arange(len(which))
    learns = whole & (_learned(own, base, stop, lines) > 0)
    count = np.arange(int(learns.sum()) + 1)
    return Portions(which[learns], count, np.zeros_like(base[learns]), (stop - base)[learns], False)


class _Items(NamedTuple):
    """Items that have tokens: the first token of each, and the one behind it, of all samples end to end."""

    start: Column
    stop: Column

    @staticmethod
    def of(lines: Lengths) -> _Items:
        here = lines.item & (lines.size > 0)
        start = before(lines.size)[here]
        return _Items(start, start + lines.size[here])


def _next(start: Column, stop: Column, items: _Items) -> tuple[Column, Bools]:
    """Where portions end that begin at `start` and have room up to `stop`, and whether they have a token."""
    if not len(items.start):
        return stop, np.ones(len(stop), dtype=bool)
    k = np.maximum(np.searchsorted(items.start, stop) - 1, 0)
    inside = (items.start[k] < stop) & (stop < items.stop[k])
    end = np.where(inside, items.start[k], stop)
    return column(end), end > start


def _spans(lines: Lengths, context: int) -> tuple[Column, Column, Column]:
    """By portion, in order: of which sample, its first token, and the one behind it, of all samples end to
    end."""
    base, items = _bases(lines), _Items.of(lines)
    end = base + np.bincount(lines.sample, lines.size, len(base)).astype(np.int64)
    room = context - 2 * lines.markers
    last = base.copy()  # behind the last item; text alone follows
    np.maximum.at(last, lines.sample[lines.item & (lines.size > 0)], items.stop)
    fits = np.ones(len(base), dtype=bool)
    found: list[tuple[Column, Column, Column]] = []
    own, at = np.arange(len(base)), base
    while len(own := own[more := at < last[own]]):
        at = at[more]
        limit = np.minimum(at + room[own], end[own])
        stop, some = _next(at, limit, items)
        fits[own[~some]] = False
        own, at, stop = own[some], at[some], stop[some]
        found.append((own, at, stop))
        at = stop
    begun = base.copy()
    for own, _, stop in found:
        begun[own] = stop
    # Of text alone, each portion fills the context.
    count = -(-(end - begun) // room)
    own, nth = repeat_groups(np.zeros_like(count), count)
    at = begun[own] + nth * room[own]
    found.append((own, at, np.minimum(at + room[own], end[own])))
    of, start, stop = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order = np.lexsort((start, of))
    order = order[fits[of[order]]]
    return of[order], start[order], stop[order]


def _bases(lines: Lengths) -> Column:
    """By sample, its first token, of all samples end to end."""
    return before(np.bincount(lines.sample, lines.size, len(lines.markers)).astype(np.int64))


def _learned(of: Column, start: Column, stop: Column, lines: Lengths) -> Column:
    """By portion, how many of its tokens carry loss, and whether its end marker does."""
    first = before(lines.size)
    seen = np.append(before(lines.size * lines.learned), (lines.size * lines.learned).sum())

    def up_to(at: Column) -> Column:
        k = np.searchsorted(first, at, side="right") - 1
        inside = np.minimum(at - first[k], lines.size[k]) * lines.learned[k]
        return column(seen[k] + inside)

    end = _bases(lines) + np.bincount(lines.sample, lines.size, len(lines.markers)).astype(np.int64)
    marker = lines.markers[of] & (stop == end[of])
    alone = ~lines.markers[of] & (stop > start)  # nothing comes before its first token
    return column(up_to(stop) - up_to(start) - alone * (up_to(start + 1) - up_to(start)) + marker)

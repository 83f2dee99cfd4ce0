"""Which source each position of a blend takes, exact in any stretch of positions and found in O(1).

Weights are whole numbers, w of each source and D together. Over D positions a source is taken w times, and
after any p positions it has been taken floor(w p / D) or ceil(w p / D) times (its quota). So in any window
of L positions a source with share s is taken less than 2 more or fewer times than s L.

That every source can be kept in its quota is a theorem on schedules of unit jobs: take number j of a source
must come at a position in [floor((j - 1) D / w), ceil(j D / w)). Shares of the jobs at each position fill all
windows exactly, so whole jobs can fill them too (bipartite matchings are integral), and earliest deadline
first finds such a schedule where there is one (Liu and Layland, J. ACM 20, 1973; Horn, 1974).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from parallel.sequence.intervals import Column, before

MOST = 1 << 16  # positions of a period


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers without a common divisor, in the same proportions as the decimals given.

    Where these would add up to more than MOST, the nearest shares with that sum. Raises ValueError where a
    weight is then 0, negative, or all are 0.
    """
    exact = [Fraction(str(w)) for w in weights]
    if min(exact) < 0 or not any(exact):
        raise ValueError(f"weights are {list(weights)}; needed: numbers of at least 0, and one above it")
    unit = math.lcm(*(w.denominator for w in exact))
    whole = [int(w * unit) for w in exact]
    divisor = math.gcd(*whole)
    whole = [w // divisor for w in whole]
    if sum(whole) <= MOST:
        return whole
    total = sum(exact)
    parts = [w * MOST / total for w in exact]
    found = [int(part) for part in parts]
    largest = sorted(range(len(parts)), key=lambda k: found[k] - parts[k])
    for k in largest[: MOST - sum(found)]:
        found[k] += 1
    for given, w in zip(exact, found, strict=True):
        if given and not w:
            raise ValueError(f"a weight of {float(given):g} is less than 1/{MOST} of all; needed: more")
    return found


class Period(NamedTuple):
    """Positions that repeat. source: by position, the number of the source, [D]. nth: how often that source
    is taken before it, [D]. takes: by source, how often it is taken in all."""

    source: Column
    nth: Column
    takes: Column

    @staticmethod
    def of(weights: Sequence[int]) -> Period:
        """The period of these whole weights, O(D log sources)."""
        source = _earliest_deadline_first(weights)
        takes = np.asarray(weights, dtype=np.int64)
        order, nth = np.argsort(source, kind="stable"), np.empty_like(source)
        nth[order] = np.arange(len(source)) - np.repeat(before(takes), takes)
        return Period(source, nth, takes)

    def after(self, source: int, takes: int) -> int:
        """The number of positions up to and with take number `takes`, from 1 on, of a source."""
        periods, rest = divmod(takes - 1, int(self.takes[source]))
        at = int(np.flatnonzero(self.source == source)[rest])
        return periods * len(self.source) + at + 1

    def taken(self, positions: int) -> Column:
        """By source, how often it is taken in the first positions."""
        periods, rest = divmod(positions, len(self.source))
        return periods * self.takes + np.bincount(self.source[:rest], minlength=len(self.takes))


def _earliest_deadline_first(weights: Sequence[int]) -> Column:
    total = sum(weights)
    waiting = [(0, k, 1) for k, w in enumerate(weights) if w]  # (release, source, number of the take)
    ready: list[tuple[int, int, int]] = []  # (deadline, source, number of the take)
    out = np.empty(total, dtype=np.int64)
    for position in range(total):
        while waiting and waiting[0][0] <= position:
            _, k, j = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-j * total // weights[k]), k, j))
        _, k, j = heapq.heappop(ready)
        out[position] = k
        heapq.heappush(waiting, (j * total // weights[k], k, j + 1))
    return out


class Stretch(NamedTuple):
    """Positions from `start` on under one set of weights. before: by source, takes in front of it."""

    start: int
    period: Period
    before: Column
    weights: tuple[int, ...]


class Blend(NamedTuple):
    """Stretches in order. end: the number of positions there are; None: without end."""

    stretches: tuple[Stretch, ...]
    end: int | None

    @staticmethod
    def of(
        weights: Mapping[int, Sequence[float]], most: Sequence[int | None], until: int | None = None
    ) -> Blend:
        """The blend of these weights by first position, which must have 0. most: by source, how often it can
        be taken. A source that has been taken so often is left out from then on, and the others share its
        part. until: positions that are of interest; None for all. Raises ValueError (whole_weights).
        """
        starts, out = sorted(weights), list[Stretch]()
        taken, at, left = np.zeros(len(most), dtype=np.int64), 0, list(most)
        for given, stop in zip(starts, [*starts[1:], None], strict=True):
            while (stop is None or at < stop) and (until is None or at < until):
                gone = [n is not None and taken[k] >= n for k, n in enumerate(left)]
                now = [0.0 if g else w for g, w in zip(gone, weights[given], strict=True)]
                if not any(now):
                    if any(weights[given]):
                        return Blend(tuple(out), at)
                    whole_weights(weights[given])  # raises
                whole = whole_weights(now)
                period = Period.of(whole)
                out.append(Stretch(at, period, taken, tuple(whole)))
                ends = [
                    at + period.after(k, n - int(taken[k]))
                    for k, n in enumerate(left)
                    if n is not None and whole[k]
                ]
                ends += [] if stop is None else [stop]
                if not ends:
                    return Blend(tuple(out), None)
                taken, at = taken + period.taken(min(ends) - at), min(ends)
        return Blend(tuple(out), None)

    def at(self, positions: Column) -> tuple[Column, Column]:
        """By position, the number of its source, and how often that has been taken before."""
        starts = np.asarray([s.start for s in self.stretches])
        which = np.searchsorted(starts, positions, side="right") - 1
        source, nth = np.empty_like(positions), np.empty_like(positions)
        for k in np.unique(which).tolist():
            here, (start, period, taken, _) = which == k, self.stretches[k]
            periods, rest = np.divmod(positions[here] - start, len(period.source))
            own = period.source[rest]
            source[here] = own
            nth[here] = taken[own] + periods * period.takes[own] + period.nth[rest]
        return source, nth

    def taken(self, position: int) -> Column:
        """By source, how often it is taken before a position."""
        found = self._stretch(position)
        return found.before + found.period.taken(position - found.start)

    def weights_at(self, position: int) -> tuple[int, ...]:
        """By source, the weights that hold at a position, those of sources that have ended being 0."""
        return self._stretch(position).weights

    def _stretch(self, position: int) -> Stretch:
        return [s for s in self.stretches if s.start <= position][-1]

"""The samples of a run, position after position: a function of (seed, position, sources) and nothing else.

A blend says which source a position takes and how often that was taken before; the source's shuffle of that
epoch says which of its samples comes then. So every sample of a source comes once an epoch, whatever the
other sources and their weights are, and any position is found in O(1) and O(sources).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mm.errors import DataError
from mm.order.blend import Blend
from mm.order.chosen import Chosen, Range
from mm.order.shuffle import Hashes, key_of, keyed, shuffled
from parallel.sequence.intervals import Column

DRAWS = 64  # draws in the place of a sample before all are tried in order


@dataclass(frozen=True)
class Source:
    """A part of a data set. samples: those that it has. epochs: how often each can come; None: without end.
    name: its shuffle depends on it, and on nothing else of the config."""

    name: str
    samples: Chosen
    epochs: int | None = None


@dataclass(frozen=True)
class Stream:
    """seed: of the run. blend: its numbers of sources are those of `sources`."""

    seed: int
    sources: tuple[Source, ...]
    blend: Blend

    @staticmethod
    def of(
        seed: int, sources: Sequence[Source], weights: Mapping[int, Sequence[float]] | None = None
    ) -> Stream:
        """The stream of sources. weights: by first position, those of all sources; None for one source alone.

        Raises ValueError (Blend.of)."""
        most = [None if s.epochs is None else s.epochs * len(s.samples) for s in sources]
        return Stream(seed, tuple(sources), Blend.of(weights or {0: [1.0]}, most))

    @staticmethod
    def whole(seed: int, samples: int) -> Stream:
        """All samples of a data set as one source."""
        return Stream.of(seed, [Source("", Chosen.of([Range(0, samples)]))])

    @cached_property
    def _keys(self) -> tuple[int, ...]:
        return tuple(key_of(self.seed, source.name) for source in self.sources)

    def at(self, positions: Column) -> tuple[Column, Column]:
        """By position, the id of its sample and the number of its source. Raises DataError behind the end."""
        end = self.blend.end
        if end is not None and len(positions) and int(positions.max()) >= end:
            raise DataError(f"the sources end after {end} samples; needed: more epochs or fewer steps")
        source, nth = self.blend.at(positions)
        ids = np.empty_like(positions)
        for k in np.unique(source).tolist():
            here, samples = source == k, self.sources[k].samples
            epoch, entry = np.divmod(nth[here], len(samples))
            ids[here] = samples.ids(shuffled(keyed(self._keys[k], epoch), len(samples), entry))
        return ids, source

    def mended(self, positions: Column, ids: Column, source: Column, bad: Column) -> Column:
        """ids with each one in `bad` (ascending) replaced by another of its source.

        That is drawn from the seed and the position alone, so a sample that is found to be bad moves no
        other. Raises DataError where a source has no other.
        """
        out, turn = ids.copy(), 0
        while len(wrong := np.flatnonzero(_in(out, bad))):
            if turn == DRAWS:
                return self._searched(out, source, wrong, bad)
            for k in np.unique(source[wrong]).tolist():
                own, samples = wrong[source[wrong] == k], self.sources[k].samples
                hashes = keyed(key_of(self._keys[k], "in the place of", turn), positions[own])
                out[own] = samples.ids(_below(hashes, len(samples)))
            turn += 1
        return out

    def _searched(self, ids: Column, source: Column, wrong: Column, bad: Column) -> Column:
        """The next good sample of its source in the place of each wrong one, where nearly all are bad."""
        for k in np.unique(source[wrong]).tolist():
            every = self.sources[k].samples.ids(np.arange(len(self.sources[k].samples)))
            good = every[~_in(every, bad)]
            if not len(good):
                what = f" of source {self.sources[k].name}" if self.sources[k].name else ""
                raise DataError(f"all {len(every)} samples{what} are unreadable or left out")
            own = wrong[source[wrong] == k]
            ids[own] = good[np.searchsorted(good, ids[own]) % len(good)]
        return ids


def _in(values: Column, among: Column) -> np.ndarray:
    """Which values are among others, which ascend."""
    if not len(among):
        return np.zeros(len(values), dtype=bool)
    at = np.minimum(np.searchsorted(among, values), len(among) - 1)
    return np.asarray(among[at] == values)


def _below(hashes: Hashes, n: int) -> Column:
    return (hashes % np.uint64(n)).astype(np.int64)

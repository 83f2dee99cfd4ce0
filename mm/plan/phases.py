"""A curriculum by length: up to a sample of the run, only short samples are drawn. Pure.

A phase is a stretch of positions under one bound, and the last one has none. Each source is a source of its
own in each phase: the samples of it that are short enough, with shuffles and epochs of their own. The blend
gives weights to the sources of one phase at a time. So any position is found in O(1) as without phases, and
within a phase every sample of a source comes once an epoch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mm.config.sources import LengthsConfig
from mm.data.sample import Index, Sample, Selection
from mm.errors import DataError
from mm.order.chosen import Chosen, Range
from mm.order.stream import Source
from mm.plan.fitted import CHUNK, Fitted
from mm.plan.inputs import PlanInputs, sample_length
from parallel.sequence.intervals import Column, column

Bits = NDArray[np.uint8]  # one bit a sample (numpy.packbits)


def short_samples(
    index: Index, inputs: PlanInputs, lengths: Sequence[LengthsConfig]
) -> tuple[tuple[Bits, ...], ...]:
    """By entry of data.lengths and selection (none: all samples), a bit for each sample that is short enough.

    index: one that select() has gone through; lengths are those of truncated samples, and what is left out is
    in no phase with a bound. O(samples), and a bit for each sample and entry.
    """
    if not lengths:
        return ()
    chosen = index.selections or (Selection("", 0, len(index.samples)),)
    left_out = np.sort(np.fromiter(index.skipped, dtype=np.int64, count=len(index.skipped)))
    by_selection = [_short(index.samples, s, left_out, inputs, [e.longest for e in lengths]) for s in chosen]
    return tuple(zip(*by_selection, strict=True))


def _short(
    samples: Sequence[Sample], own: Selection, left_out: Column, inputs: PlanInputs, bounds: Sequence[int]
) -> list[Bits]:
    fits = np.zeros((len(bounds), own.size), dtype=bool)
    for start in range(0, own.size, CHUNK):
        which = own.first + np.arange(start, min(start + CHUNK, own.size))
        which = which[~np.isin(which, left_out)]
        fits[:, which - own.first] = _lengths(samples, which, inputs) <= column(bounds)[:, None]
    return [np.packbits(row) for row in fits]


def _lengths(samples: Sequence[Sample], which: Column, inputs: PlanInputs) -> Column:
    """The lengths of samples that fit, in tokens."""
    if isinstance(samples, Fitted):
        return samples.lines(which).length
    return column([sample_length(samples[i], inputs) for i in which.tolist()])


def in_phases(
    sources: Sequence[Source],
    weights: Mapping[int, Sequence[float]],
    lengths: Sequence[LengthsConfig],
    short: Sequence[Sequence[Bits]],
) -> tuple[list[Source], dict[int, Sequence[float]]]:
    """The sources of all phases, those of a phase together, and by first position the weights of all of them.

    weights: by first position, those of `sources`. short: by entry of data.lengths and range of the sources'
    samples. Raises DataError where a source that has a weight in a phase has no sample that is short enough.
    """
    phases = [
        [*map(_bounded, sources, _by_source(sources, bits), [e.longest] * len(sources))]
        for e, bits in zip(lengths, short, strict=True)
    ]
    phases.append([*sources])
    starts, out = [0, *(e.until for e in lengths)], dict[int, Sequence[float]]()
    for position in sorted({*weights, *starts}):
        here = bisect_right(starts, position) - 1
        now = weights[max(p for p in weights if p <= position)]
        for source, drawn, weight in zip(sources, phases[here], now, strict=True):
            if weight and not len(drawn.samples):
                raise DataError(
                    f"source {source.name or 'of data.train'} has no sample of at most "
                    f"{lengths[here].longest} tokens, but data.lengths draws from it at sample {position} of "
                    "the run; needed: a larger longest, or for a source with a weight 0 there (data.weights)"
                )
        out[position] = [w for k in range(len(phases)) for w in (now if k == here else [0.0] * len(now))]
    return [source for own in phases for source in own], out


def _by_source(sources: Sequence[Source], bits: Sequence[Bits]) -> list[list[Bits]]:
    left = iter(bits)
    return [[next(left) for _ in s.samples.ranges] for s in sources]


def _bounded(source: Source, bits: Sequence[Bits], longest: int) -> Source:
    """The samples of a source that are short enough; its name says so, as shuffles depend on the name."""
    ranges = [
        Range(r.first, r.size, own if r.bits is None else own & r.bits)
        for r, own in zip(source.samples.ranges, bits, strict=True)
    ]
    name = f"{source.name} up to {longest} tokens".strip()
    return Source(name, Chosen.of(ranges), source.epochs)

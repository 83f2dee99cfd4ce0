"""Which samples of a data set a source has, and the id of the nth of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parallel.sequence.intervals import Column, column

BLOCK = 512  # samples whose bits are counted at once


class Range(NamedTuple):
    """Samples first .. first + size - 1; bits: which of them, one bit each (numpy.packbits), None for all."""

    first: int
    size: int
    bits: NDArray[np.uint8] | None = None


@dataclass(frozen=True, eq=False)
class Chosen:
    """Samples of ranges, in order. bounds: by range and at the end, how many come before it. blocks: by range
    with bits, how many come before each block of it. Takes a bit a sample where a range has bits, else
    nothing."""

    ranges: tuple[Range, ...]
    bounds: Column
    blocks: tuple[Column | None, ...]

    @staticmethod
    def of(ranges: Sequence[Range]) -> Chosen:
        """The samples of these ranges. O(samples) where they have bits."""
        blocks = tuple(None if r.bits is None else _before(r.bits) for r in ranges)
        count = [r.size if b is None else int(b[-1]) for r, b in zip(ranges, blocks, strict=True)]
        return Chosen(tuple(ranges), np.concatenate([[0], np.cumsum(count, dtype=np.int64)]), blocks)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def ids(self, nth: Column) -> Column:
        """The ids of the samples with these numbers, 0 <= nth < len(self)."""
        which = np.searchsorted(self.bounds, nth, side="right") - 1
        out = nth - self.bounds[which]
        for k in np.unique(which).tolist():
            here, (first, _, bits), blocks = which == k, self.ranges[k], self.blocks[k]
            if bits is not None and blocks is not None:
                out[here] = _select(bits, blocks, out[here])
            out[here] += first
        return out


def _before(bits: NDArray[np.uint8]) -> Column:
    """By block and at the end, how many bits before it are set."""
    count = np.bitwise_count(bits).astype(np.int64)
    starts = np.arange(0, len(bits), BLOCK // 8)
    found = np.add.reduceat(count, starts) if len(bits) else count
    return np.concatenate([[0], np.cumsum(found)])


def _select(bits: NDArray[np.uint8], blocks: Column, nth: Column) -> Column:
    """The places of the set bits with these numbers."""
    block = np.searchsorted(blocks, nth, side="right") - 1
    width = BLOCK // 8
    index = block[:, None] * width + np.arange(width)
    taken = np.where(index < len(bits), bits[np.minimum(index, len(bits) - 1)], 0)
    seen = np.cumsum(np.unpackbits(taken.astype(np.uint8), axis=1), axis=1, dtype=np.int64)
    inside = (seen <= (nth - blocks[block])[:, None]).sum(axis=1)
    return column(block * BLOCK + inside)

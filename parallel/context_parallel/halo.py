"""Causal convolution over a split stream: the rows before a piece come from the ranks that hold them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from parallel.comm.fetch import Fetch, lacking
from parallel.context_parallel.packing import ContextPacking, Continued
from parallel.sequence.host import to_device
from parallel.sequence.intervals import Span, join, numbers
from parallel.sequence.packed import depthwise_conv


@dataclass(frozen=True)
class Halo:
    """The rows before continued fragments that a kernel of K taps reads.

    fetch: the exchange of these rows; they arrive by ascending row of the stream.
    take: int64 [m], the arrived rows in the order of the fragments. Two fragments may read one row.
    slots: int64 [m], where these rows go in spread(x, fragments, K - 1, 0).
    """

    fetch: Fetch
    take: Tensor
    slots: Tensor


def _read(fragment: Continued, width: int) -> Span:
    """The rows of its own document that a fragment reads before itself, at most `width`."""
    start, stop = fragment.before
    return max(start, stop - width), stop


def wanted_rows(packing: ContextPacking, width: int) -> list[list[Span]]:
    """By cp rank, the rows that its fragments read before themselves, at most `width` each. Pure."""
    return [join([_read(c, width) for c in packing.continued_of(r)]) for r in range(packing.cp.size)]


def halo_rows(packing: ContextPacking, kernel: int) -> int:
    """Rows received for a kernel of this many taps, on the rank that receives most. Pure."""
    return max(lacking(packing.spans, wanted_rows(packing, kernel - 1)), default=0)


def plan_halo(packing: ContextPacking, kernel: int) -> Halo | None:
    """The halo for a kernel of this many taps, None where no rank reads a row of another fragment.

    Every rank derives its part of the exchange; this call does not communicate.
    """
    width = kernel - 1
    wanted = wanted_rows(packing, width)
    if not any(wanted):
        return None
    fetch = packing.fetch("rows before a convolution", wanted)
    arrived = numbers(wanted[packing.cp.rank])
    take, slots = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for c in packing.continued:
        rows = np.arange(*_read(c, width))
        take.append(np.searchsorted(arrived, rows))
        # In spread() every fragment has a margin of `width` slots before its own rows.
        start = c.rows[0] + width * (c.fragment + 1)
        slots.append(np.arange(start - len(rows), start))
    device = packing.device
    return Halo(
        fetch,
        to_device(np.concatenate(take), device),
        to_device(np.concatenate(slots), device),
    )


def context_conv(x: Tensor, weight: Tensor, bias: Tensor | None, packing: ContextPacking) -> Tensor:
    """Causal depthwise convolution within each document of a split stream; a collective over packing.cp.

    x: [T, C], this rank's rows; weight: [C, K]; bias: [C] or None. Returns [T, C].
    """
    kernel = weight.shape[1]
    halo = packing.once(("halo", kernel), lambda: plan_halo(packing, kernel))
    before = None
    if halo is not None:
        before = (halo.fetch(x).index_select(0, halo.take), halo.slots)
    return depthwise_conv(x, weight, bias, packing.fragments, causal=True, before=before)

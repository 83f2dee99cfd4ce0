"""The rows before a piece that a causal convolution reads, from the ranks that hold them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parallel.comm.fetch import Fetch, lacking
from parallel.context_parallel.packing import ContextPacking, Continued
from parallel.sequence.intervals import Span, join, numbers
from parallel.sequence.packed import depthwise_conv


@dataclass(frozen=True)
class Halo:
    """fetch: rows that precede fragments, ascending; take [m]: which of them, fragment by fragment (two may
    share rows); place [m]: where they go in spread(x, fragments, K - 1, 0)."""

    fetch: Fetch
    take: Tensor
    place: Tensor


def _read(fragment: Continued, width: int) -> Span:
    """The rows before a fragment that it reads: up to `width`, of its own document."""
    start, stop = fragment.before
    return max(start, stop - width), stop


def _wanted(packing: ContextPacking, width: int) -> list[list[Span]]:
    return [join([_read(c, width) for c in packing.continued_of(r)]) for r in range(packing.cp.size)]


def halo_rows(packing: ContextPacking, kernel: int) -> int:
    """How many rows the worst-off rank receives for a kernel of this many taps. Pure."""
    return max(lacking(packing.spans, _wanted(packing, kernel - 1)), default=0)


def plan_halo(packing: ContextPacking, kernel: int) -> Halo | None:
    """None where no rank needs a row. Pure but for the group in packing.cp."""
    width = kernel - 1
    wanted = _wanted(packing, width)
    if not any(wanted):
        return None
    fetch = packing.fetch("rows before a convolution", wanted)
    arrived = numbers(wanted[packing.cp.rank])
    take, place = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for c in packing.continued:
        rows = np.arange(*_read(c, width))
        take.append(np.searchsorted(arrived, rows))
        # A fragment's own rows start behind those before it and one margin for each fragment up to it.
        start = c.rows[0] + width * (c.fragment + 1)
        place.append(np.arange(start - len(rows), start))
    device = packing.device
    return Halo(
        fetch,
        torch.from_numpy(np.concatenate(take)).to(device),
        torch.from_numpy(np.concatenate(place)).to(device),
    )


def context_conv(x: Tensor, weight: Tensor, bias: Tensor | None, packing: ContextPacking) -> Tensor:
    """Causal depthwise convolution within each document of a cut stream; a collective over packing.cp.

    x [T, C] are this rank's rows, weight [C, K], bias [C] or None; returns [T, C].
    """
    kernel = weight.shape[1]
    halo = packing.once(("halo", kernel), lambda: plan_halo(packing, kernel))
    before = None
    if halo is not None:
        before = (halo.fetch(x).index_select(0, halo.take), halo.place)
    return depthwise_conv(x, weight, bias, packing.fragments, causal=True, before=before)

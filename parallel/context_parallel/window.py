"""Windowed attention over documents that are split over context-parallel ranks.

A token sees the last `window` keys of its document. So a fragment that continues a document reads at most
window - 1 keys before it, and a rank fetches those alone, in one exchange, as the rows before a convolution.
They count at most `window` rows for each piece, whatever the lengths of documents and cp are; no ring is
needed to bound them. Between the exchange and the output everything is local and recorded by autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parallel.comm.fetch import Fetch
from parallel.context_parallel.packing import ContextPacking, Continued
from parallel.sequence.buckets import Limits, Pairing, attend
from parallel.sequence.host import to_device
from parallel.sequence.intervals import Span, join, numbers


@dataclass(frozen=True)
class _Plan:
    """What all layers with one window derive from one packing.

    fetch: the exchange of keys, None where no rank wants any.
    order: int64 [Tk], of the own rows followed by those that arrived, in the order in which each fragment's
        rows come after those that it reads before itself.
    pairing: this rank's queries with these keys.
    """

    fetch: Fetch | None
    order: Tensor | None
    pairing: Pairing


def _read(c: Continued, window: int) -> Span:
    """The rows of the stream before the fragment whose keys it reads."""
    start, stop = c.before
    return max(start, stop - (window - 1)), stop


def _plan(packing: ContextPacking, window: int) -> _Plan:
    """Every rank derives its part, without communication."""
    own = packing.fragments
    wanted = [join([_read(c, window) for c in packing.continued_of(r)]) for r in range(packing.cp.size)]
    if not any(wanted):
        return _Plan(None, None, own.windowed(window))
    arrived = numbers(wanted[packing.cp.rank])
    keys, order, done = list(own.lengths), [np.zeros(0, np.int64)], 0
    for c in packing.continued:
        low, high = np.searchsorted(arrived, _read(c, window))
        keys[c.fragment] += int(high - low)
        order += [np.arange(done, c.rows[0]), packing.total + np.arange(low, high)]
        done = c.rows[0]
    order.append(np.arange(done, packing.total))
    return _Plan(
        packing.fetch("keys before a window", wanted),
        to_device(np.concatenate(order), packing.device),
        Pairing.windowed(own.lengths, keys, window, packing.device),
    )


def window_attention(
    q: Tensor,
    rows: Tensor,
    packing: ContextPacking,
    expand: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    scale: float | None,
    limits: Limits,
) -> Tensor:
    """Causal attention of each query to the last keys of its document; a collective over packing.cp.

    q: [T, H, D], this rank's rows. rows: [T, ..], what travels of each token. expand: these of any tokens to
    their keys and values [n, H_kv, D], with H_kv dividing H. Returns [T, H, D].
    scale, limits: as of parallel.sequence.buckets.attend(), with a window.
    """
    window = limits.window
    assert window is not None
    plan = packing.once(("window", window), lambda: _plan(packing, window))
    if plan.fetch is not None:
        assert plan.order is not None
        rows = torch.cat([rows, plan.fetch(rows)]).index_select(0, plan.order)
    k, v = expand(rows)
    return attend(q, k, v, plan.pairing, causal=True, scale=scale, limits=limits)

"""Attention and convolution of a context-parallel rank, which fetches the keys and neighbours it lacks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from encoders.share import Share, pieces, reach
from parallel.comm.fetch import Fetch, make_fetch
from parallel.sequence.buckets import Pairing, attend
from parallel.sequence.intervals import Span
from parallel.sequence.packed import Packing, depthwise_conv
from parallel.topology.axis import Axis


@dataclass(frozen=True)
class ItemAttention:
    """Attention of a rank's tokens to all tokens of their items, whichever cp rank has these.

    fetch: brings the keys and values.
    pairing: which of the fetched keys each token attends to.
    """

    fetch: Fetch
    pairing: Pairing

    @staticmethod
    def of(share: Share, axis: Axis, device: torch.device, timeout_s: float) -> ItemAttention:
        """Make it once a batch, on every rank of `axis`, which is cp. timeout_s: longest wait for another
        rank's rows, in seconds."""
        wanted = [reach(share.lengths, span) for span in share.spans]
        own = pieces(share.lengths, share.own)
        pairing = Pairing.of([p.stop - p.start for p in own], [share.lengths[p.item] for p in own], device)
        return ItemAttention(_fetch("keys of an encoder", share, wanted, axis, device, timeout_s), pairing)

    def __call__(self, q: Tensor, kv: Tensor) -> Tensor:
        """q [T, H, D] and kv [T, 2, H, D] (keys, values) of this rank's T tokens to [T, H, D]. A collective
        over cp."""
        k, v = self.fetch(kv).unbind(1)
        return attend(q, k, v, self.pairing)


@dataclass(frozen=True)
class ItemConvolution:
    """Centred depthwise convolution along each item, with zeros beyond its ends.

    fetch: brings the neighbours.
    packing: the lengths of the pieces of items that the rank then has.
    before: how many fetched rows come before its own.
    """

    fetch: Fetch
    packing: Packing
    before: int

    @staticmethod
    def of(share: Share, axis: Axis, kernel: int, device: torch.device, timeout_s: float) -> ItemConvolution:
        """Make it once a batch, on every rank of `axis`, which is cp. Up to kernel // 2 neighbours on either
        side are fetched, from as many ranks as have them. kernel: taps, odd; timeout_s: longest wait for
        another rank's rows, in seconds."""
        wanted = [reach(share.lengths, span, kernel // 2) for span in share.spans]
        mine = wanted[axis.rank]
        seen = [p.stop - p.start for p in pieces(share.lengths, mine)]
        fetch = _fetch("neighbours of an encoder's rows", share, wanted, axis, device, timeout_s)
        return ItemConvolution(fetch, Packing.of(seen, device), share.own[0] - mine[0])

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, C] of this rank's tokens and weight [C, kernel] to [T, C]. A collective over cp."""
        # Outputs at fetched rows lack neighbours and are wrong: they are dropped.
        wide = depthwise_conv(self.fetch(x), weight, None, self.packing, causal=False)
        return wide.narrow(0, self.before, x.shape[0])


def _fetch(
    name: str, share: Share, wanted: list[Span], axis: Axis, device: torch.device, timeout_s: float
) -> Fetch:
    held, spans = ([[span] for span in side] for side in (share.spans, wanted))
    return make_fetch(name, axis, held, spans, device=device, timeout_s=timeout_s)

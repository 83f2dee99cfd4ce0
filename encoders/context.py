"""What a context-parallel rank fetches for its share of a batch: keys of its items, neighbours of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from encoders.share import Share, pieces, reach
from parallel.comm.fetch import Fetch, Span, make_fetch
from parallel.sequence.buckets import Pairing, attend
from parallel.sequence.packed import Packing, depthwise_conv
from parallel.topology.axis import Axis


@dataclass(frozen=True)
class ItemAttention:
    """Attention of a rank's tokens to all tokens of their items, wherever these are."""

    fetch: Fetch
    pairing: Pairing

    @staticmethod
    def of(share: Share, axis: Axis, device: torch.device, timeout_s: float) -> ItemAttention:
        """Make it once a batch; `axis` is cp. Every rank fetches the items that its own tokens touch."""
        wanted = [reach(share.lengths, span) for span in share.spans]
        own = pieces(share.lengths, share.own)
        pairing = Pairing.of([p.stop - p.start for p in own], [share.lengths[p.item] for p in own], device)
        return ItemAttention(_fetch("keys of an encoder", share, wanted, axis, device, timeout_s), pairing)

    def __call__(self, q: Tensor, kv: Tensor) -> Tensor:
        """q [T, H, D], kv [T, 2, H, D] of this rank's tokens to [T, H, D]."""
        k, v = self.fetch(kv).unbind(1)
        return attend(q, k, v, self.pairing)


@dataclass(frozen=True)
class ItemConvolution:
    """Centred depthwise convolution of `kernel` taps along each item, zeros beyond its ends."""

    fetch: Fetch
    packing: Packing
    before: int

    @staticmethod
    def of(share: Share, axis: Axis, kernel: int, device: torch.device, timeout_s: float) -> ItemConvolution:
        """Make it once a batch; `axis` is cp. Fetches up to kernel // 2 neighbours on either side, from as
        many ranks as have them."""
        wanted = [reach(share.lengths, span, kernel // 2) for span in share.spans]
        mine = wanted[axis.rank]
        seen = [p.stop - p.start for p in pieces(share.lengths, mine)]
        fetch = _fetch("neighbours of an encoder's rows", share, wanted, axis, device, timeout_s)
        return ItemConvolution(fetch, Packing.of(seen, device), share.own[0] - mine[0])

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, C] of this rank's tokens, weight [C, kernel] to [T, C]."""
        # Fetched rows at the cut ends come out wrong, and are not wanted.
        wide = depthwise_conv(self.fetch(x), weight, None, self.packing, causal=False)
        return wide.narrow(0, self.before, x.shape[0])


def _fetch(
    name: str, share: Share, wanted: list[Span], axis: Axis, device: torch.device, timeout_s: float
) -> Fetch:
    held, spans = ([[span] for span in side] for side in (share.spans, wanted))
    return make_fetch(name, axis, held, spans, device=device, timeout_s=timeout_s)

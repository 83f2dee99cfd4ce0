"""Attention with relative positions (arXiv 1901.02860), of a rank's rows to all rows of their clips."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.context import ItemAttention
from encoders.share import Share, pieces
from parallel.comm.fetch import Fetch
from parallel.sequence.buckets import Pairing
from parallel.sequence.host import to_device
from parallel.sequence.intervals import numbers
from parallel.topology.axis import Axis


@dataclass(frozen=True)
class RelativeAttention:
    """Scores of keys, and of how far they are from the query.

    fetch: brings the keys and values. pairing: which of the fetched keys each row attends to.
    position: int64 [T], of each row in its clip. longest: rows of the longest clip.
    waves: [2 * longest - 1, width], sines and cosines of the distances 1 - longest to longest - 1, query
        minus key.
    """

    fetch: Fetch
    pairing: Pairing
    position: Tensor
    longest: int
    waves: Tensor

    @staticmethod
    def of(share: Share, axis: Axis, like: Tensor, timeout_s: float) -> RelativeAttention:
        """Make it once a batch, on every rank of `axis`, which is cp. like: hidden states [.., width]."""
        plain = ItemAttention.of(share, axis, like.device, timeout_s)
        position = numbers([(p.start, p.stop) for p in pieces(share.lengths, share.own)])
        longest = max([1, *share.lengths])
        waves = distance_waves(longest, like.shape[-1], like.device).to(like.dtype)
        return RelativeAttention(plain.fetch, plain.pairing, to_device(position, like.device), longest, waves)

    def __call__(self, q: Tensor, far: Tensor, kv: Tensor, distances: Tensor) -> Tensor:
        """Rows' values [T, H, D]. q: queries of keys, far: queries of distances, both [T, H, D]; kv:
        [T, 2, H, D], keys and values of this rank's rows; distances: [2 * longest - 1, H, D], the keys of
        distances. A collective over cp. A bucket of n clips of L rows has scores of n H L (3 L - 1)."""
        k, v = self.fetch(kv).unbind(1)
        if q.shape[0] == 0:
            # Keep the graph whole: a rank without rows must still send gradients (of zero) to its weights.
            return q + far + 0.0 * (k.sum() + v.sum() + distances.sum())
        out = torch.zeros_like(q)
        scale = q.shape[-1] ** -0.5
        for b in self.pairing.buckets:
            keys = b.keys.shape[1]
            near = distances[self.longest - keys : self.longest + keys - 1]  # [2 keys - 1, H, D]
            of_distance = torch.einsum("nqhd,phd->nhqp", far[b.queries], near)
            index = self.position[b.queries][:, :, None] - torch.arange(keys, device=q.device) + (keys - 1)
            index = index[:, None].expand(-1, q.shape[1], -1, -1)
            bias = of_distance.gather(-1, index) * scale
            if b.mask is not None:
                bias = bias.masked_fill(~b.mask, float("-inf"))
            qb, kb, vb = (x[at].transpose(1, 2) for x, at in ((q, b.queries), (k, b.keys), (v, b.keys)))
            y = F.scaled_dot_product_attention(qb, kb, vb, attn_mask=bias, scale=scale)
            y = y.transpose(1, 2).flatten(0, 1)
            out = out.index_copy(0, b.rows, y if b.slots is None else y.index_select(0, b.slots))
        return out


def distance_waves(longest: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines in turn, float32 [2 * longest - 1, width], of distances 1 - longest to longest - 1.

    float32 as published: sines of products that were rounded so are part of what the weights have learned.
    """
    frequency = 1.0 / 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    distance = torch.arange(1 - longest, longest, dtype=torch.float32, device=device)
    angle = distance[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

"""Exchange of tokens for heads: a rank gets all tokens of some heads, instead of some tokens of all heads.

This is DeepSpeed Ulysses (Jacobs et al., arXiv 2309.14509). Between the two exchanges, a layer that treats
its heads separately sees whole documents.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm.linear_map import linear_map
from parallel.context_parallel.packing import ContextPacking
from parallel.topology.axis import Axis


def _swap(x: Tensor, axis: Axis) -> Tensor:
    """All-to-all, [cp, m, ..] to [cp, m, ..]: block s goes to rank s, block s of the result came from it."""

    def exchange(y: Tensor) -> Tensor:
        out = y.new_empty(y.shape)
        dist.all_to_all_single(out, y.contiguous(), group=axis.group)
        return out

    return linear_map(x, exchange, exchange)


def _by_rank(packing: ContextPacking) -> Tensor:
    """The stream row of each of all ranks' rows, concatenated by rank: int64 [whole]."""
    spans = [span for mine in packing.spans for span in mine]
    return torch.cat([torch.arange(*span, device=packing.device) for span in spans])


def to_heads(x: Tensor, packing: ContextPacking) -> Tensor:
    """Own tokens [T, cp, w] to all tokens of the stream [whole, w]: x[:, s] goes to rank s."""
    index = packing.once("by rank", lambda: _by_rank(packing))
    got = _swap(x.transpose(0, 1), packing.cp).flatten(0, 1)
    return torch.empty_like(got).index_copy(0, index, got)


def to_tokens(x: Tensor, packing: ContextPacking) -> Tensor:
    """All tokens of the stream [whole, w], of this rank's heads, to own tokens [T, cp, w] of all heads."""
    index = packing.once("by rank", lambda: _by_rank(packing))
    out = torch.unflatten(x.index_select(0, index), 0, (packing.cp.size, -1))
    return _swap(out, packing.cp).transpose(0, 1)

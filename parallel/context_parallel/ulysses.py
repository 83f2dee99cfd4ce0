"""Exchange of tokens for heads: all of a stream's tokens of some heads, instead of some tokens of all heads.

Ulysses (arXiv 2309.14509): between the two exchanges a layer that works head by head sees whole documents.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm.linear_map import linear_map
from parallel.context_parallel.packing import ContextPacking
from parallel.topology.axis import Axis


def _swap(x: Tensor, axis: Axis) -> Tensor:
    """[cp, m, ..] to [cp, m, ..]: block s goes to rank s, block s of the result came from it."""

    def exchange(y: Tensor) -> Tensor:
        out = y.new_empty(y.shape)
        dist.all_to_all_single(out, y.contiguous(), group=axis.group)
        return out

    return linear_map(x, exchange, exchange)


def _by_rank(packing: ContextPacking) -> Tensor:
    """Where in the stream the rows of all ranks, end to end, belong: int64 [whole]."""
    spans = [span for mine in packing.spans for span in mine]
    return torch.cat([torch.arange(*span, device=packing.device) for span in spans])


def to_heads(x: Tensor, packing: ContextPacking) -> Tensor:
    """Own tokens [T, cp, w], whose part s rank s is to have, to the whole stream's tokens [whole, w]."""
    index = packing.once("by rank", lambda: _by_rank(packing))
    got = _swap(x.transpose(0, 1), packing.cp).flatten(0, 1)
    return torch.empty_like(got).index_copy(0, index, got)


def to_tokens(x: Tensor, packing: ContextPacking) -> Tensor:
    """The stream's tokens [whole, w] of this rank's heads to own tokens [T, cp, w] of every rank's heads."""
    index = packing.once("by rank", lambda: _by_rank(packing))
    out = x.index_select(0, index).unflatten(0, (packing.cp.size, -1))
    return _swap(out, packing.cp).transpose(0, 1)

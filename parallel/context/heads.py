"""Exchange of tokens for heads: all of a stream's tokens of some heads, instead of some tokens of all heads.

Ulysses (arXiv 2309.14509): between the two exchanges a layer that works head by head sees whole documents.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.axis import Axis
from parallel.context.packing import ContextPacking


def _swap(x: Tensor, axis: Axis) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=axis.group)
    return out


class _Swap(torch.autograd.Function):
    """[cp, m, ..] to [cp, m, ..]: block s goes to rank s, block s of the result came from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _swap(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _swap(grad, ctx.axis), None


def _by_rank(packing: ContextPacking) -> Tensor:
    """Where in the stream the rows of all ranks, end to end, belong: int64 [whole]."""
    spans = [span for mine in packing.spans for span in mine]
    return torch.cat([torch.arange(*span, device=packing.device) for span in spans])


def to_heads(x: Tensor, packing: ContextPacking) -> Tensor:
    """Own tokens [T, cp, w], whose part s rank s is to have, to the whole stream's tokens [whole, w]."""
    index = packing.once("by rank", lambda: _by_rank(packing))
    got = _Swap.apply(x.transpose(0, 1), packing.cp).flatten(0, 1)
    return torch.empty_like(got).index_copy(0, index, got)


def to_tokens(x: Tensor, packing: ContextPacking) -> Tensor:
    """The stream's tokens [whole, w] of this rank's heads to own tokens [T, cp, w] of every rank's heads."""
    index = packing.once("by rank", lambda: _by_rank(packing))
    out = x.index_select(0, index).unflatten(0, (packing.cp.size, -1))
    return _Swap.apply(out, packing.cp).transpose(0, 1)

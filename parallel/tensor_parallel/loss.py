"""Cross entropy over a vocabulary cut over tp, without ever holding the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.tensor_parallel.layers import held_rows
from parallel.topology.axis import Axis


def vocab_loss(hidden: Tensor, weight: Tensor, labels: Tensor, tp: Axis, chunk: int) -> Tensor:
    """Per-token cross entropy [T] in float32 (float64 for float64 inputs), equal on all tp ranks.

    hidden [T, d], the same on every tp rank; weight [V/tp, d], this rank's rows of the head; labels [T],
    negative where a token has no loss. The gradient of hidden is this rank's partial sum: surround with
    enter(). Logits exist for `chunk` tokens at a time and are computed again in the backward, but for the
    last chunk, which is there already when the backward begins.
    """
    return _VocabLoss.apply(hidden, weight, labels, tp, chunk)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (hidden @ weight.T).to(acc)


class _VocabLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, tp: Axis, chunk: int) -> Tensor:
        column, held = held_rows(labels, weight.shape[0], tp)
        losses, normalisers = [], []
        for part, col, mine in zip(hidden.split(chunk), column.split(chunk), held.split(chunk), strict=True):
            logits = _logits(part, weight)
            top = logits.amax(-1)
            if tp.size > 1 and len(top):
                dist.all_reduce(top, dist.ReduceOp.MAX, group=tp.group)
            target = logits.gather(1, col.unsqueeze(1)).squeeze(1) * mine
            shares = logits.sub_(top.unsqueeze(1)).exp_()
            sums = torch.stack([shares.sum(-1), target])
            if tp.size > 1 and len(top):
                dist.all_reduce(sums, group=tp.group)
            normaliser = top + sums[0].log()
            losses.append(normaliser - sums[1])
            normalisers.append(normaliser)
        supervised = labels >= 0
        # The last chunk's: an extra product and exponential less, and for few tokens that is all of them.
        ctx.save_for_backward(
            hidden, weight, column, held, torch.cat(normalisers), supervised, shares, sums[0]
        )
        ctx.chunk = chunk
        return torch.where(supervised, torch.cat(losses), 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, column, held, normaliser, supervised, shares, total = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        learns = ctx.needs_input_grad[1]
        # Chunks are summed in the wide dtype; a product within one accumulates in float32 anyway.
        d_weight = torch.zeros(weight.shape, dtype=grad.dtype, device=weight.device) if learns else None
        scale = torch.where(supervised, grad, 0.0)
        for at in range(0, hidden.shape[0], ctx.chunk):
            s = slice(at, at + ctx.chunk)
            if s.stop >= hidden.shape[0]:
                d_logits = shares * (scale[s] / total).unsqueeze(1)
            else:
                d_logits = (_logits(hidden[s], weight) - normaliser[s].unsqueeze(1)).exp_()
                d_logits.mul_(scale[s].unsqueeze(1))
            d_logits.scatter_add_(1, column[s].unsqueeze(1), -(held[s] * scale[s]).unsqueeze(1))
            narrow = d_logits.to(weight.dtype)
            d_hidden[s] = narrow @ weight
            if d_weight is not None:
                d_weight += narrow.T @ hidden[s]
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None

"""Cross entropy over a vocabulary sharded over tp, without ever holding the logits of all tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.sharding.dtypes import accumulation_dtype
from parallel.tensor_parallel.layers import held_rows
from parallel.topology.axis import Axis


def vocab_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    tp: Axis,
    chunk: int,
    *,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """Per-token cross entropy [T] in float32 (float64 for float64 inputs), equal on all tp ranks.

    hidden: [T, d], the same on every tp rank. Its gradient is this rank's partial sum, which enter()
        completes.
    weight: [V / tp, d], this rank's rows of the head.
    labels: int64 [T], negative where a token has no loss.
    chunk: tokens whose logits exist at a time. The backward computes them again, except for the last chunk,
        whose softmax the forward keeps where there is no cap.
    scale, cap: of logits().
    """
    # torch leaves Function.apply untyped.
    loss: Tensor = _VocabLoss.apply(hidden, weight, labels, tp, (chunk, scale, cap))  # type: ignore[no-untyped-call]
    return loss


class _Kept(NamedTuple):
    """What the forward keeps for the backward; v: rows of the head on this rank, C: tokens of the last chunk.

    hidden: [T, d].
    weight: [v, d].
    column, held: [T], the label's local row and whether this rank holds it.
    normaliser: [T], the logarithm of the sum of all exponentials.
    supervised: bool [T], whether the token has a loss.
    last_exp, last_sum: exponentials [C, v] of the last chunk here (none under a cap, whose slope needs the
        logits again), and their sums [C] over the vocabulary.
    """

    hidden: Tensor
    weight: Tensor
    column: Tensor
    held: Tensor
    normaliser: Tensor
    supervised: Tensor
    last_exp: Tensor
    last_sum: Tensor


def logits(hidden: Tensor, weight: Tensor, scale: float = 1.0, cap: float | None = None) -> Tensor:
    """hidden [.., d] times weight [v, d] to [.., v] in float32 (float64), times scale, then
    cap * tanh(x / cap) unless cap is None."""
    x = (hidden @ weight.T).to(accumulation_dtype(hidden.dtype))
    if scale != 1:
        x = x * scale
    return x if cap is None else torch.tanh(x / cap) * cap


class _VocabLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        tp: Axis,
        shape: tuple[int, float, float | None],
    ) -> Tensor:
        chunk, scale, cap = shape
        column, held = held_rows(labels, weight.shape[0], tp)
        losses, normalisers = [], []
        chunks = (torch.split(x, chunk) for x in (hidden, column, held))
        for part, col, mine in zip(*chunks, strict=True):
            x = logits(part, weight, scale, cap)
            top = x.amax(-1)
            if tp.size > 1 and len(top):
                dist.all_reduce(top, dist.ReduceOp.MAX, group=tp.group)
            target = x.gather(1, col.unsqueeze(1)).squeeze(1) * mine
            exps = x.sub_(top.unsqueeze(1)).exp_()
            sums = torch.stack([exps.sum(-1), target])
            if tp.size > 1 and len(top):
                dist.all_reduce(sums, group=tp.group)
            normaliser = top + sums[0].log()
            losses.append(normaliser - sums[1])
            normalisers.append(normaliser)
        supervised = labels >= 0
        # Keeping the last chunk's exponentials saves a product; with few tokens it is the only chunk.
        kept = _Kept(
            hidden=hidden,
            weight=weight,
            column=column,
            held=held,
            normaliser=torch.cat(normalisers),
            supervised=supervised,
            last_exp=exps if cap is None else exps[:0],
            last_sum=sums[0],
        )
        ctx.save_for_backward(*kept)
        ctx.shape = shape
        return torch.where(supervised, torch.cat(losses), 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        kept = _Kept(*ctx.saved_tensors)
        hidden, weight = kept.hidden, kept.weight
        chunk, factor, cap = ctx.shape
        d_hidden = torch.empty_like(hidden)
        learns = ctx.needs_input_grad[1]
        # Chunks are summed in the loss's dtype; a product within a chunk accumulates in float32 anyway.
        d_weight = torch.zeros(weight.shape, dtype=grad.dtype, device=weight.device) if learns else None
        scale = torch.where(kept.supervised, grad, 0.0)
        for at in range(0, hidden.shape[0], chunk):
            s = slice(at, at + chunk)
            if s.stop >= hidden.shape[0] and cap is None:
                d_logits = kept.last_exp * (scale[s] / kept.last_sum).unsqueeze(1)
            else:
                x = logits(hidden[s], weight, factor, cap)
                d_logits = (x - kept.normaliser[s].unsqueeze(1)).exp_()
                d_logits.mul_(scale[s].unsqueeze(1))
            d_logits.scatter_add_(1, kept.column[s].unsqueeze(1), -(kept.held[s] * scale[s]).unsqueeze(1))
            if cap is not None:
                d_logits.mul_(1.0 - (x / cap).square_())  # the slope of the bound
            if factor != 1:
                d_logits.mul_(factor)
            narrow = d_logits.to(weight.dtype)
            d_hidden[s] = narrow @ weight
            if d_weight is not None:
                d_weight += narrow.T @ hidden[s]
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None

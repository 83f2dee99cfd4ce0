"""The Mamba-2 state space scan over packed documents, in chunks (SSD, arXiv 2405.21060, section 6).

Shapes: T tokens, n chunks of Q tokens, G groups, K heads a group (H = G K), P head dim, N state size.
No state passes from one document to the next. Work and memory are linear in T: T Q within chunks, and one
state a chunk across them.

The backward is written out. The scan keeps its inputs and the states; the backward computes tensors of size
Q x Q again, a few chunks at a time. The gradient of the decays is the flow from each token to each later one:
rows minus columns of one Q x Q tensor. The cheaper identity y . dy - xd . dxd needs no such tensor but
suffers cancellation: about 20 times the error in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of Q x Q tensors that exist at a time: the size of a core's cache, or enough to fill an accelerator.
BLOCK_BYTES = {"cpu": 1 << 21}
BLOCK_BYTES_OTHER = 1 << 28


class ScanInputs(NamedTuple):
    """What a scan reads, in float32 or float64; the heads of a group follow each other."""

    x: Tensor
    """[T, H, P]"""
    dt: Tensor
    """[T, H], not negative."""
    a: Tensor
    """[H], negative."""
    b: Tensor
    """[T, G, N]"""
    c: Tensor
    """[T, G, N]"""
    d: Tensor | None = None
    """[H], or None for no skip connection."""

    def tokens(self, at: slice) -> ScanInputs:
        """The inputs of a run of tokens."""
        return self._replace(x=self.x[at], dt=self.dt[at], b=self.b[at], c=self.c[at])


def scan(inputs: ScanInputs, document: Tensor, chunk: int, *, before: Tensor | None = None) -> Tensor:
    """y_t = C_t h_t + D x_t with h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, h = 0 before each document.

    document [T] int64: one value per document. chunk: tokens in a chunk, Q. before [G, N, K, P]: the state
    that the first document begins with, None for zero. Returns [T, H, P] in the dtype of x.
    """
    return outputs(into_chunks(inputs, document, chunk), before)


class Chunks(NamedTuple):
    """Inputs of a scan as n chunks; rows past the last token have dt = 0 and so change nothing."""

    x: Tensor
    """[n, Q, G, K, P]"""
    dt: Tensor
    """[n, Q, G, K]"""
    b: Tensor
    """[n, Q, G, N]"""
    c: Tensor
    """[n, Q, G, N]"""
    d: Tensor | None
    """[H] or None"""
    total: Tensor
    """[n, G, K, Q]: dt A summed up to each token of its chunk."""
    doc: Tensor
    """[n, Q]: each token's document."""
    tokens: int
    """T, without the rows past the last token."""


def into_chunks(inputs: ScanInputs, document: Tensor, chunk: int) -> Chunks:
    """The inputs of scan() in chunks of `chunk` tokens."""
    x, dt, a, b, c, d = inputs
    tokens, heads, width = x.shape
    groups, state = b.shape[1:]
    q = max(1, min(chunk, tokens))
    pad = -tokens % q
    n = (tokens + pad) // q
    if pad:
        x, dt, b, c = (F.pad(t, (0, 0) * (t.ndim - 1) + (0, pad)) for t in (x, dt, b, c))
        document = torch.cat([document, document[-1:].expand(pad)])
    dt = dt.view(n, q, groups, heads // groups)
    total = (dt * a.view(groups, -1)).permute(0, 2, 3, 1).cumsum(-1)
    return Chunks(
        x=x.reshape(n, q, groups, heads // groups, width),
        dt=dt,
        b=b.reshape(n, q, groups, state),
        c=c.reshape(n, q, groups, state),
        d=d,
        total=total,
        doc=document.view(n, q),
        tokens=tokens,
    )


def outputs(ch: Chunks, before: Tensor | None, added: Tensor | None = None) -> Tensor:
    """The scan's result [T, H, P]. added: added_states(ch), computed here where it is None."""
    n, q, groups, per_group, width = ch.x.shape
    states = None
    if ch.tokens and (n > 1 or before is not None):
        added = added_states(ch, n - 1) if added is None else added[:-1]
        # What a chunk's end keeps of the state before it: nothing if a document began inside.
        last = torch.cat([ch.doc[:1, 0], ch.doc[:-1, -1]])
        whole = (ch.doc[:, -1] == last)[:, None, None]
        states = _recurrence(added, (flushed_exp(ch.total[..., -1]) * whole)[:-1], before)
    y = _outputs(
        *_OutputTensors(x=ch.x, dt=ch.dt, total=ch.total, b=ch.b, c=ch.c, d=ch.d, states=states, doc=ch.doc)
    )
    return y.view(n * q, groups * per_group, width)[: ch.tokens]


def added_states(ch: Chunks, count: int | None = None) -> Tensor:
    """What each chunk's last document adds to the state at the chunk's end, [n, G, N, K, P]; of the first
    `count` chunks, None for all."""
    return _added(ch.x, ch.dt, ch.total, ch.b, ch.doc, len(ch.x) if count is None else count)


def state_after(ch: Chunks, added: Tensor) -> tuple[Tensor, Tensor]:
    """(state [G, N, K, P] after the last token, from a zero state before the first; logarithm [G, K] of the
    factor on a state before the first, if all tokens are of one document)."""
    falls = ch.total[..., -1].flip(0).cumsum(0).flip(0)  # of chunk k and all later ones
    later = torch.cat([falls[1:], torch.zeros_like(falls[:1])])
    same = (ch.doc[:, -1] == ch.doc[-1, -1])[:, None, None]
    state = torch.einsum("ngk,ngskp->gskp", flushed_exp(later) * same, added)
    return state, falls[0]


def flushed_exp(x: Tensor) -> Tensor:
    """exp of x <= 0, exactly 0 below the square root of the smallest normal number.

    Such decays are far below rounding. They and their products would be denormal numbers, on which CPUs
    compute many times slower.
    """
    return F.threshold(x, _floor(x.dtype), -math.inf).exp()


def _floor(dtype: torch.dtype) -> float:
    return 0.5 * math.log(torch.finfo(dtype).tiny)


def _blocks(total: Tensor, count: int | None = None) -> Iterator[slice]:
    """Runs of (the first `count`) chunks whose Q x Q tensors fit the budget."""
    n, groups, per_group, q = total.shape
    n = n if count is None else count
    budget = BLOCK_BYTES.get(total.device.type, BLOCK_BYTES_OTHER)
    step = max(1, budget // (groups * per_group * q * q * total.element_size()))
    return (slice(at, min(at + step, n)) for at in range(0, n, step))


def _heads_first(x: Tensor) -> Tensor:
    """[n, Q, G, K, ..] to [n, G, K, Q, ..]."""
    return x.permute(0, 2, 3, 1, *range(4, x.ndim))


def _rows_first(x: Tensor) -> Tensor:
    """[n, G, K, Q, ..] to [n, Q, G, K, ..]."""
    return x.permute(0, 3, 1, 2, *range(4, x.ndim))


def _wide_rows(x: Tensor) -> Tensor:
    """[n, G, K, Q, P] to [n, G, Q, K P]: all heads of a group as columns of one matrix."""
    return x.transpose(2, 3).flatten(3)


def _heads_of(x: Tensor, per_group: int) -> Tensor:
    """[n, G, Q, K P] to [n, G, K, Q, P]."""
    return torch.unflatten(x, 3, (per_group, -1)).transpose(2, 3)


def _decays(total: Tensor, doc: Tensor) -> Tensor:
    """flushed exp(total_i - total_j) where token i may read token j, else 0: [n, G, K, Q (i), Q (j)]."""
    q = doc.shape[1]
    reads = torch.ones(q, q, dtype=torch.bool, device=doc.device).tril()
    reads = reads & (doc.unsqueeze(2) == doc.unsqueeze(1))  # [n, i, j]
    hide = torch.where(reads, 0.0, -math.inf).to(total.dtype)
    # Base 2 because on CPUs exp() is seven times slower at minus infinity, and adding a mask beats filling.
    total = total * math.log2(math.e)
    fall = (total.unsqueeze(-1) - total.unsqueeze(-2)).add_(hide[:, None, None])
    floor = _floor(fall.dtype) * math.log2(math.e)
    return F.threshold(fall, floor, -math.inf, inplace=True).exp2_()


def _to_end(total: Tensor, doc: Tensor) -> Tensor:
    """Decay from each token to its chunk's end, [n, G, K, Q, 1]: 0 where its document ended before."""
    stays = (doc == doc[:, -1:])[:, None, None]
    return (flushed_exp(total[..., -1:] - total) * stays).unsqueeze(-1)


def _from_start(total: Tensor, doc: Tensor, at: slice) -> Tensor:
    """Decay from the state before its chunk to each token, [n, G, K, Q, 1]: 0 in later documents."""
    last = doc[:1, 0] if at.start == 0 else doc[at.start - 1 : at.start, -1]
    last = torch.cat([last, doc[at][:-1, -1]])
    return (flushed_exp(total[at]) * (doc[at] == last.unsqueeze(1))[:, None, None]).unsqueeze(-1)


class _Added(torch.autograd.Function):
    """sum over a chunk's tokens j of to_end_j B_j xd_j."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, total: Tensor, b: Tensor, doc: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(x, dt, total, b, doc)
        ctx.count = count
        groups, per_group, width = x.shape[2:]
        out = x.new_empty(count, groups, b.shape[-1], per_group * width)
        for at in _blocks(total, count):
            kept = _heads_first(x[at] * dt[at].unsqueeze(-1)) * _to_end(total[at], doc[at])
            torch.matmul(b[at].permute(0, 2, 3, 1), _wide_rows(kept), out=out[at])
        return torch.unflatten(out, 3, (per_group, width))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, total, b, doc = ctx.saved_tensors
        grad = grad.flatten(3)  # [n, G, N, K P]
        d_x, d_dt, d_b, d_total = grads = [torch.empty_like(t) for t in (x, dt, b, total)]
        for t in grads:
            t[ctx.count :] = 0.0
        for at in _blocks(total, ctx.count):
            rest = _to_end(total[at], doc[at])
            xs, ts = _heads_first(x[at]), _heads_first(dt[at]).unsqueeze(-1)
            d_xd = _heads_of(b[at].transpose(1, 2) @ grad[at], x.shape[3]) * rest
            lost = (d_xd * xs).sum(-1)  # [n, G, K, Q]
            _heads_first(d_x[at]).copy_(d_xd * ts)
            _heads_first(d_dt[at]).copy_(lost)
            d_b[at].transpose(1, 2).copy_(_wide_rows(xs * ts * rest) @ grad[at].mT)
            fall = torch.mul(lost, ts.squeeze(-1), out=d_total[at]).neg_()
            fall[..., -1] -= fall.sum(-1)
        return d_x, d_dt, d_total, d_b, None, None


_added: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor] = _Added.apply


class _Recurrence(torch.autograd.Function):
    """States before each of n + 1 chunks, [n + 1, G, N, K, P]: s_0 = before (or zero),
    s_{k+1} = keep_k s_k + added_k with keep [n, G, K]."""

    @staticmethod
    def forward(ctx: Any, added: Tensor, keep: Tensor, before: Tensor | None) -> Tensor:
        keep = keep.unsqueeze(2).unsqueeze(-1)
        states = added.new_empty(len(added) + 1, *added.shape[1:])
        if before is None:
            states[0] = 0.0
        else:
            states[0] = before
        for k in range(len(added)):
            torch.addcmul(added[k], states[k], keep[k], out=states[k + 1])
        ctx.save_for_backward(keep, states)
        ctx.begins = before is not None
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        keep, states = ctx.saved_tensors
        total = grad.clone()  # of each state, through all later ones
        for k in range(len(keep) - 1, -1, -1):
            total[k].addcmul_(total[k + 1], keep[k])
        d_added = total[1:]
        d_keep = torch.einsum("ngskp,ngskp->ngk", d_added, states[:-1])
        return d_added, d_keep, total[0] if ctx.begins else None


_recurrence: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _Recurrence.apply


class _OutputTensors(NamedTuple):
    """Arguments of _Outputs: an autograd function takes and keeps tensors only as arguments of its own."""

    x: Tensor
    dt: Tensor
    total: Tensor
    b: Tensor
    c: Tensor
    d: Tensor | None
    states: Tensor | None
    doc: Tensor


class _Outputs(torch.autograd.Function):
    """y_i = D x_i + from_start_i C_i state + sum over tokens j <= i of i's chunk and document of
    (C_i . B_j) exp(total_i - total_j) xd_j; [n, Q, G, K, P]. Takes _OutputTensors; states None: all zero."""

    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> Tensor:
        x, dt, total, b, c, d, states, doc = _OutputTensors(*tensors)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        per_group = x.shape[3]
        for at in _blocks(total):
            bs, cs = b[at].transpose(1, 2), c[at].transpose(1, 2)  # [n, G, Q, N]
            xd = _heads_first(x[at] * dt[at].unsqueeze(-1))
            part = _decays(total[at], doc[at]).mul_((cs @ bs.mT).unsqueeze(2)) @ xd
            if states is not None:
                late = _heads_of(cs @ states[at].flatten(3), per_group)
                part.addcmul_(late, _from_start(total, doc, at))
            y[at] = _rows_first(part)
        if d is not None:
            y.addcmul_(x, d.view(*x.shape[2:4], 1))
        ctx.save_for_backward(*tensors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, total, b, c, d, states, doc = _OutputTensors(*ctx.saved_tensors)
        d_x, d_dt, d_b, d_c, d_total = (torch.empty_like(t) for t in (x, dt, b, c, total))
        d_states = None if states is None else torch.empty_like(states)
        skip = None if d is None else d.view(*x.shape[2:4], 1)
        d_skip = None if d is None else torch.zeros_like(d).view(x.shape[2:4])
        for at in _blocks(total):
            bs, cs = b[at].transpose(1, 2), c[at].transpose(1, 2)
            xs, ts = _heads_first(x[at]), _heads_first(dt[at]).unsqueeze(-1)
            gs = _heads_first(grad[at])
            xd = xs * ts
            decay = _decays(total[at], doc[at])
            score = (cs @ bs.mT).unsqueeze(2)
            d_weight = (gs @ xd.mT).mul_(decay)
            d_score = d_weight.sum(2)  # [n, G, Q, Q]
            flow = d_weight.mul_(score)
            torch.sub(flow.sum(-1), flow.sum(-2), out=d_total[at])
            d_xd = decay.mul_(score).mT @ gs
            d_b[at].transpose(1, 2).copy_(d_score.mT @ cs)
            d_cs = d_score @ bs
            if states is not None and d_states is not None:
                late = gs * _from_start(total, doc, at)
                read = late @ states[at].permute(0, 1, 3, 4, 2)  # [n, G, K, Q, N]
                d_cs += read.sum(2)
                d_total[at] += (read * cs.unsqueeze(2)).sum(-1)
                torch.matmul(cs.mT, _wide_rows(late), out=d_states[at].flatten(3))
            d_c[at].transpose(1, 2).copy_(d_cs)
            _heads_first(d_dt[at]).copy_((d_xd * xs).sum(-1))
            d_xs = d_xd.mul_(ts)
            if skip is not None and d_skip is not None:
                d_skip += (xs * gs).sum((0, 3, 4))
                d_xs = torch.addcmul(d_xs, gs, skip.unsqueeze(-1))
            _heads_first(d_x[at]).copy_(d_xs)
        d_d = None if d is None or d_skip is None else d_skip.view(d.shape)
        return d_x, d_dt, d_total, d_b, d_c, d_d, d_states, None


_outputs: Callable[..., Tensor] = _Outputs.apply

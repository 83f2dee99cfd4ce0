"""Causal attention over documents that are cut over context-parallel ranks.

Most documents of a packed stream lie whole in one piece and are attended to as ever. What continues a
document of an earlier piece (at most one fragment a piece) reads the document's earlier keys from the ranks
that hold them: no other key moves. They come in one of two ways, with the same result:

    gather  one all-to-all; what arrived is kept for the backward, which sends only gradients
    ring    a rank at a time, the next block under way while one is computed with; two blocks are held, and
            the backward fetches them again (Ring Attention, arXiv 2310.01889, with packed documents)

The gradient is written out: beside its inputs a layer keeps one output and one logarithm a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from parallel.comm.fetch import Fetch, lacking
from parallel.comm.pending import Pending
from parallel.context_parallel.block import attend, attend_backward, merge
from parallel.context_parallel.packing import ContextPacking
from parallel.sequence.intervals import Span, join, numbers, overlap, size
from parallel.sequence.packed import Packing, attention
from parallel.sharding.dtypes import accumulation_dtype

Method = Literal["gather", "ring"]


@dataclass(frozen=True)
class KeyCost:
    """What the worst-off cp rank pays in one attention layer, in bytes.

    forward, backward: received over the wire; held: keys and values of other ranks in memory at a time, from
    forward to backward for the gather.
    """

    forward: int
    backward: int
    held: int


def wanted_keys(packing: ContextPacking) -> list[list[Span]]:
    """Rows of the stream whose keys each cp rank reads beyond its own fragments. Pure."""
    return [join([c.before for c in packing.continued_of(r)]) for r in range(packing.cp.size)]


def key_costs(packing: ContextPacking, kv_heads: int, head_dim: int, itemsize: int) -> dict[Method, KeyCost]:
    """The cost of each method for these documents. Pure, alike on every rank."""
    row = 2 * kv_heads * head_dim * itemsize
    wanted = wanted_keys(packing)
    taken = max(lacking(packing.spans, wanted))
    block = max(size(spans) for spans in packing.spans)
    return {
        "gather": KeyCost(taken * row, taken * row, taken * row),
        "ring": KeyCost(taken * row, 2 * taken * row, min(taken, 2 * block) * row),
    }


def choose_attention_method(
    packing: ContextPacking, heads: int, kv_heads: int, head_dim: int, itemsize: int
) -> Method:
    """gather, which moves a third less, while what it holds is no more than a layer's queries and outputs.

    So the memory of a layer stays within a constant of its share of the tokens, whatever cp is. Pure.
    """
    costs = key_costs(packing, kv_heads, head_dim, itemsize)
    own = 2 * (packing.whole // packing.cp.size) * heads * head_dim * itemsize
    return "gather" if costs["gather"].held <= own else "ring"


@dataclass(frozen=True)
class _Use:
    """Queries [rows] of the continued fragments (end to end) that read keys [keys] of a block."""

    rows: slice
    keys: slice


@dataclass(frozen=True)
class _Plan:
    """All that attention needs to know of one packing.

    crosses: whether any rank continues a document; fetch: the keys that move; uses[i]: who reads what of the
    block of round i; at_once: the same for all blocks in ascending order; own: local rows of each continued
    fragment; inner, inner_rows: the other fragments, and their local rows in order.
    """

    crosses: bool
    fetch: Fetch
    uses: tuple[tuple[_Use, ...], ...]
    at_once: tuple[_Use, ...]
    own: tuple[slice, ...]
    inner: Packing
    inner_rows: tuple[slice, ...]


def _uses(rows: np.ndarray, packing: ContextPacking) -> tuple[_Use, ...]:
    """Which stretch of ascending stream rows each continued fragment reads."""
    out, at = [], 0
    for c in packing.continued:
        n = c.rows[1] - c.rows[0]
        low, high = np.searchsorted(rows, c.before)
        if low < high:
            out.append(_Use(slice(at, at + n), slice(int(low), int(high))))
        at += n
    return tuple(out)


def _make_plan(packing: ContextPacking) -> _Plan:
    wanted = wanted_keys(packing)
    me, cp = packing.cp.rank, packing.cp.size
    blocks = [numbers(overlap(wanted[me], packing.spans[(me - i) % cp])) for i in range(cp)]
    own = tuple(slice(*c.rows) for c in packing.continued)
    outer = {c.fragment for c in packing.continued}
    inner = [n for i, n in enumerate(packing.fragments.lengths) if i not in outer]
    edges = [0, *(e for c in packing.continued for e in c.rows), packing.total]
    gaps = tuple(slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)
    return _Plan(
        any(wanted),
        packing.fetch("keys of a continued document", wanted),
        tuple(_uses(b, packing) for b in blocks),
        _uses(numbers(wanted[me]), packing),
        own,
        Packing(tuple(inner), packing.device),
        gaps,
    )


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: ContextPacking,
    *,
    scale: float | None = None,
    method: Method | None = None,
) -> Tensor:
    """Causal softmax attention within each document of a cut stream; a collective over packing.cp.

    q [T, H, D], k and v [T, H_kv, D] are this rank's rows, H_kv dividing H; returns [T, H, D].
    method: None chooses by choose_attention_method().
    """
    plan = packing.once("attention", lambda: _make_plan(packing))
    if not plan.crosses:
        return attention(q, k, v, packing.fragments, causal=True, scale=scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if method is None:
        shapes = (q.shape[1], k.shape[1], q.shape[2], k.element_size())
        method = packing.once(("attention", *shapes), lambda: choose_attention_method(packing, *shapes))
    outer = _Outer.apply(q, k, v, plan, scale, method)
    if not plan.inner_rows:
        return outer
    qi, ki, vi = (_stretches(x, plan.inner_rows) for x in (q, k, v))
    inner = attention(qi, ki, vi, plan.inner, causal=True, scale=scale)
    pieces = dict(_parts(outer, plan.own)) | dict(_parts(inner, plan.inner_rows))
    # A rank may have no fragment that continues and still owe keys and gradients: outer stays in the graph.
    return torch.cat([*(pieces[at] for at in sorted(pieces)), outer[:0]])


def _parts(x: Tensor, rows: tuple[slice, ...]) -> Iterator[tuple[int, Tensor]]:
    """Stretches of x, laid end to end, with the local row at which each belongs."""
    return zip((s.start for s in rows), x.split([_len(s) for s in rows]), strict=True)


def _stretches(x: Tensor, rows: tuple[slice, ...]) -> Tensor:
    return x[rows[0]] if len(rows) == 1 else torch.cat([x[s] for s in rows])


def _len(s: slice) -> int:
    return int(s.stop - s.start)


class _Outer(torch.autograd.Function):
    """Attention of the continued fragments' queries [R, H, D], end to end, to all that they may read."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan, scale: float, method: Method
    ) -> Tensor:
        outs, logs = [q[:0]], [q.new_zeros((0, q.shape[1]), dtype=accumulation_dtype(q.dtype))]
        for s in plan.own:
            out, lse = attend(q[s], k[s], v[s], causal=True, scale=scale)
            outs.append(out)
            logs.append(lse.to(logs[0].dtype))
        queries = torch.cat([q[:0], *(q[s] for s in plan.own)])
        out, lse = torch.cat(outs).to(logs[0].dtype), torch.cat(logs)
        keys = torch.cat([k, v], 1)  # [T, 2 H_kv, D], one message
        kept = None
        if method == "gather":
            kept = plan.fetch.start(keys).wait()
        for block, uses, _ in _blocks(keys, kept, plan):
            for use in uses:
                kb, vb = block[use.keys].chunk(2, 1)
                more, more_lse = attend(queries[use.rows], kb, vb, causal=False, scale=scale)
                r = use.rows
                out[r], lse[r] = merge(out[r], lse[r], more.to(out.dtype), more_lse.to(out.dtype))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, *([] if kept is None else [kept]))
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *saved = ctx.saved_tensors
        plan: _Plan = ctx.plan
        kept = saved[0] if saved else None
        acc = lse.dtype
        d_q = torch.zeros(q.shape, dtype=acc, device=q.device)
        d_keys = torch.zeros((k.shape[0], 2 * k.shape[1], k.shape[2]), dtype=acc, device=k.device)
        queries = torch.cat([q[:0], *(q[s] for s in plan.own)])
        d_queries = torch.zeros(queries.shape, dtype=acc, device=q.device)
        at = 0
        for s in plan.own:
            r = slice(at, at + _len(s))
            at = r.stop
            dq, dk, dv = attend_backward(
                grad[r], q[s], k[s], v[s], out[r], lse[r], causal=True, scale=ctx.scale
            )
            d_queries[r] += dq
            d_keys[s] += torch.cat([dk, dv], 1)
        returns: list[Pending] = []
        for block, uses, i in _blocks(torch.cat([k, v], 1), kept, plan):
            d_block = torch.zeros(block.shape, dtype=acc, device=block.device)
            for use in uses:
                kb, vb = block[use.keys].chunk(2, 1)
                r = use.rows
                dq, dk, dv = attend_backward(
                    grad[r], queries[r], kb, vb, out[r], lse[r], causal=False, scale=ctx.scale
                )
                d_queries[r] += dq
                d_block[use.keys] += torch.cat([dk, dv], 1)
            if kept is None:
                returns.append(plan.fetch.start_round_home(d_block.to(k.dtype), d_keys, i))
                if len(returns) > 1:
                    returns.pop(0).wait()
            else:
                plan.fetch.start_home(d_block.to(k.dtype), d_keys).wait()
        for late in returns:
            late.wait()
        for s, part in zip(plan.own, d_queries.split([_len(s) for s in plan.own]), strict=True):
            d_q[s] = part
        d_k, d_v = d_keys.to(k.dtype).chunk(2, 1)
        return d_q.to(q.dtype), d_k, d_v, None, None, None


def _blocks(keys: Tensor, kept: Tensor | None, plan: _Plan) -> Iterator[tuple[Tensor, tuple[_Use, ...], int]]:
    """Blocks of keys as they come, with their readers and their round: the gathered one, or one a round."""
    if kept is not None:
        yield kept, plan.at_once, 0
        return
    rounds = len(plan.uses)
    coming = plan.fetch.start_round(keys, 0)
    for i in range(rounds):
        here = coming
        if i + 1 < rounds:
            coming = plan.fetch.start_round(keys, i + 1)
        yield here.wait(), plan.uses[i], i

"""Causal attention over documents that are split over context-parallel ranks.

Most documents of a packed stream lie whole in one piece, and plain attention serves them. A fragment that
continues a document of an earlier piece (at most one in each piece) reads the document's earlier keys from
the ranks that hold them. No other key moves. Two methods fetch the keys, with the same result:

    gather  one all-to-all. The keys that arrive are kept for the backward, which sends only gradients.
    ring    one rank at a time: the next block of keys is in transit while one is computed with. Two blocks
            are held, and the backward fetches them again (Ring Attention, Liu et al., arXiv 2310.01889, with
            packed documents).

The backward is written out, so besides its inputs a layer keeps one output and one logarithm for each query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from parallel.comm.fetch import Fetch, lacking
from parallel.comm.pending import Pending
from parallel.context_parallel.block import attend, attend_backward
from parallel.context_parallel.packing import ContextPacking
from parallel.context_parallel.window import window_attention
from parallel.sequence.buckets import NO_LIMITS, Limits
from parallel.sequence.intervals import Span, join, numbers, overlap, size
from parallel.sequence.packed import Packing, attention
from parallel.sequence.tiles import Attended, Scoring, merge, sinks_grad, with_sinks
from parallel.sharding.dtypes import accumulation_dtype

Method = Literal["gather", "ring"]
_Way = Literal["gather", "ring", "here"]


@dataclass(frozen=True)
class KeyCost:
    """The cost of one attention layer in bytes, on the cp rank where it is highest.

    forward, backward: bytes received from other ranks.
    held: keys and values of other ranks in memory at a time; the gather holds them from forward to backward.
    """

    forward: int
    backward: int
    held: int


def wanted_keys(packing: ContextPacking) -> list[list[Span]]:
    """By cp rank, the rows of the stream whose keys its continued fragments read before themselves. Pure."""
    return [join([c.before for c in packing.continued_of(r)]) for r in range(packing.cp.size)]


def key_costs(packing: ContextPacking, kv_heads: int, head_dim: int, itemsize: int) -> dict[Method, KeyCost]:
    """The cost of each method for these documents, equal on every rank. Pure.

    itemsize: bytes of one element of a key.
    """
    row = 2 * kv_heads * head_dim * itemsize
    wanted = wanted_keys(packing)
    received = max(lacking(packing.spans, wanted))
    block = max(size(spans) for spans in packing.spans)
    return {
        "gather": KeyCost(received * row, received * row, received * row),
        "ring": KeyCost(received * row, 2 * received * row, min(received, 2 * block) * row),
    }


def choose_attention_method(
    packing: ContextPacking, heads: int, kv_heads: int, head_dim: int, itemsize: int
) -> Method:
    """Choose "gather" where its keys take no more memory than a layer's queries and outputs, else "ring".

    The gather moves a third less. With this bound a layer's memory stays proportional to its share of the
    tokens, whatever cp is. Pure, equal on every rank.
    """
    costs = key_costs(packing, kv_heads, head_dim, itemsize)
    own = 2 * (packing.whole // packing.cp.size) * heads * head_dim * itemsize
    return "gather" if costs["gather"].held <= own else "ring"


@dataclass(frozen=True)
class _Read:
    """Queries `rows` of the concatenated continued fragments read the rows `keys` of a block of keys."""

    rows: slice
    keys: slice


@dataclass(frozen=True)
class _Plan:
    """What attention derives from one packing, for all layers.

    crosses: whether any rank continues a document.
    fetch: the exchange of keys.
    rounds: for each round of the ring, the reads of its block.
    gathered: the reads of the gathered keys.
    continued: local rows of each continued fragment.
    inner: the packing of the other fragments.
    inner_rows: local rows of the other fragments, ascending.
    """

    crosses: bool
    fetch: Fetch
    rounds: tuple[tuple[_Read, ...], ...]
    gathered: tuple[_Read, ...]
    continued: tuple[slice, ...]
    inner: Packing
    inner_rows: tuple[slice, ...]


def _reads(rows: np.ndarray, packing: ContextPacking) -> tuple[_Read, ...]:
    """The reads of a block that holds the keys of these stream rows, ascending."""
    out, at = [], 0
    for c in packing.continued:
        n = c.rows[1] - c.rows[0]
        low, high = np.searchsorted(rows, c.before)
        if low < high:
            out.append(_Read(slice(at, at + n), slice(int(low), int(high))))
        at += n
    return tuple(out)


def _make_plan(packing: ContextPacking) -> _Plan:
    wanted = wanted_keys(packing)
    me, cp = packing.cp.rank, packing.cp.size
    blocks = [numbers(overlap(wanted[me], packing.spans[(me - i) % cp])) for i in range(cp)]
    outer = {c.fragment for c in packing.continued}
    inner = [n for i, n in enumerate(packing.fragments.lengths) if i not in outer]
    edges = [0, *(e for c in packing.continued for e in c.rows), packing.total]
    gaps = tuple(slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)
    return _Plan(
        crosses=any(wanted),
        fetch=packing.fetch("keys of a continued document", wanted),
        rounds=tuple(_reads(b, packing) for b in blocks),
        gathered=_reads(numbers(wanted[me]), packing),
        continued=tuple(slice(*c.rows) for c in packing.continued),
        inner=Packing(tuple(inner), packing.device),
        inner_rows=gaps,
    )


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: ContextPacking,
    *,
    scale: float | None = None,
    limits: Limits = NO_LIMITS,
    method: Method | None = None,
) -> Tensor:
    """Causal softmax attention within each document of a split stream; a collective over packing.cp.

    q: [T, H, D], this rank's rows; k, v: [T, H_kv, D] with H_kv dividing H. Returns [T, H, D].
    scale: of the scores; None: D ** -0.5.
    limits: a window, a bound of scores, sinks.
    method: None leaves the choice to choose_attention_method(). Under a window it has no effect: the few keys
        before a fragment are gathered.
    """
    if limits.window is not None:
        keys = torch.cat([k, v], 1)  # [T, 2 H_kv, D], one message
        return window_attention(q, keys, packing, _halves, scale=scale, limits=limits)
    plan = packing.once("attention", lambda: _make_plan(packing))
    if not plan.crosses:
        return attention(q, k, v, packing.fragments, causal=True, scale=scale, limits=limits)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    way = method or _method(q, k, packing)
    return _attend_split(q, k, v, plan, scale=scale, limits=limits, method=way)


def _halves(keys: Tensor) -> tuple[Tensor, Tensor]:
    k, v = keys.chunk(2, 1)
    return k, v


def expanded_attention(
    q: Tensor,
    rows: Tensor,
    expand: Callable[[Tensor], tuple[Tensor, Tensor]],
    packing: ContextPacking,
    *,
    scale: float,
    limits: Limits = NO_LIMITS,
) -> Tensor:
    """context_attention() with keys and values that each rank makes itself from narrow rows of tokens.

    rows: [T, W], this rank's. expand: rows [n, W] to keys and values [n, H, D], each from its own row. Where
    context_attention() would gather keys, the rows before a fragment travel instead and are expanded here;
    where it would choose the ring, because that many expanded keys take too much memory, keys travel.
    """
    if limits.window is not None:
        return window_attention(q, rows, packing, expand, scale=scale, limits=limits)
    plan = packing.once("attention", lambda: _make_plan(packing))
    k, v = expand(rows)
    if not plan.crosses:
        return attention(q, k, v, packing.fragments, causal=True, scale=scale, limits=limits)
    method: _Way = _method(q, k, packing)
    if method == "gather":
        before = expand(plan.fetch(rows))
        k, v, method = torch.cat([k, before[0]]), torch.cat([v, before[1]]), "here"
    return _attend_split(q, k, v, plan, scale=scale, limits=limits, method=method)


def _method(q: Tensor, k: Tensor, packing: ContextPacking) -> Method:
    shapes = (q.shape[1], k.shape[1], q.shape[2], k.element_size())
    return packing.once(("attention", *shapes), lambda: choose_attention_method(packing, *shapes))


def _attend_split(
    q: Tensor, k: Tensor, v: Tensor, plan: _Plan, *, scale: float, limits: Limits, method: _Way
) -> Tensor:
    """Attention of fragments that continue a document and of the others. method "here": behind the keys and
    values of own rows are those of the rows before continued fragments, ascending."""
    scoring = Scoring(scale, limits.cap)
    # torch leaves Function.apply untyped.
    outer: Tensor = _Outer.apply(q, k, v, limits.sinks, plan, scoring, method)  # type: ignore[no-untyped-call]
    if not plan.inner_rows:
        return outer
    qi, ki, vi = (_concatenated(x, plan.inner_rows) for x in (q, k, v))
    inner = attention(qi, ki, vi, plan.inner, causal=True, scale=scale, limits=limits)
    pieces = dict(_parts(outer, plan.continued)) | dict(_parts(inner, plan.inner_rows))
    # A rank without continued fragments may still owe others its keys: outer must stay in the graph.
    return torch.cat([*(pieces[at] for at in sorted(pieces)), outer[:0]])


def _parts(x: Tensor, rows: tuple[slice, ...]) -> Iterator[tuple[int, Tensor]]:
    """The parts of x, which concatenates the rows of these slices, each with the first row of its slice."""
    return zip((s.start for s in rows), torch.split(x, [_len(s) for s in rows]), strict=True)


def _concatenated(x: Tensor, rows: tuple[slice, ...]) -> Tensor:
    return x[rows[0]] if len(rows) == 1 else torch.cat([x[s] for s in rows])


def _len(s: slice) -> int:
    return int(s.stop - s.start)


class _Outer(torch.autograd.Function):
    """Attention of the concatenated queries [R, H, D] of continued fragments over all keys that they read."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        plan: _Plan,
        *how: Any,
    ) -> Tensor:
        scoring, method = how
        acc = accumulation_dtype(q.dtype)
        outs, logs = [q[:0]], [q.new_zeros((0, q.shape[1]), dtype=acc)]
        for s in plan.continued:
            out, lse = attend(q[s], k[s], v[s], replace(scoring, last=0))
            outs.append(out)
            logs.append(lse.to(acc))
        queries = torch.cat([q[:0], *(q[s] for s in plan.continued)])
        total = Attended(torch.cat(outs).to(acc), torch.cat(logs))
        keys = torch.cat([k, v], 1)  # [T, 2 H_kv, D], one message
        kept = None
        if method == "gather":
            kept = plan.fetch.start(keys).wait()
        elif method == "here":
            kept = keys[len(q) :]
        for block, reads, _ in _blocks(keys, kept, plan):
            for read in reads:
                kb, vb = block[read.keys].chunk(2, 1)
                out, lse = attend(queries[read.rows], kb, vb, scoring)
                merged = merge(total.rows(read.rows), Attended(out.to(acc), lse.to(acc)))
                total.out[read.rows], total.lse[read.rows] = merged
        total = total if sinks is None else with_sinks(total, sinks)
        out = total.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, total.lse, *([kept] if method == "gather" else []))
        ctx.plan, ctx.scoring, ctx.method = plan, scoring, method
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse, *saved = ctx.saved_tensors
        plan: _Plan = ctx.plan
        kept, here = saved[0] if saved else None, ctx.method == "here"
        if here:
            kept = torch.cat([k[len(q) :], v[len(q) :]], 1)
        acc = lse.dtype
        d_q = torch.zeros(q.shape, dtype=acc, device=q.device)
        d_keys = torch.zeros((k.shape[0], 2 * k.shape[1], k.shape[2]), dtype=acc, device=k.device)
        attended = Attended(out, lse)
        queries = torch.cat([q[:0], *(q[s] for s in plan.continued)])
        d_queries = torch.zeros(queries.shape, dtype=acc, device=q.device)
        at = 0
        for s in plan.continued:
            r = slice(at, at + _len(s))
            at = r.stop
            own = replace(ctx.scoring, last=0)
            dq, dk, dv = attend_backward(grad[r], q[s], k[s], v[s], attended.rows(r), own)
            d_queries[r] += dq
            d_keys[s] += torch.cat([dk, dv], 1)
        returns: list[Pending] = []
        for block, reads, i in _blocks(torch.cat([k, v], 1), kept, plan):
            d_block = torch.zeros(block.shape, dtype=acc, device=block.device)
            for read in reads:
                kb, vb = block[read.keys].chunk(2, 1)
                r = read.rows
                dq, dk, dv = attend_backward(grad[r], queries[r], kb, vb, attended.rows(r), ctx.scoring)
                d_queries[r] += dq
                d_block[read.keys] += torch.cat([dk, dv], 1)
            if kept is None:
                returns.append(plan.fetch.start_round_home(d_block.to(k.dtype), d_keys, i))
                if len(returns) > 1:
                    returns.pop(0).wait()
            elif here:
                d_keys[len(q) :] += d_block
            else:
                plan.fetch.start_home(d_block.to(k.dtype), d_keys).wait()
        for late in returns:
            late.wait()
        sizes = [_len(s) for s in plan.continued]
        for s, part in zip(plan.continued, torch.split(d_queries, sizes), strict=True):
            d_q[s] = part
        d_k, d_v = d_keys.to(k.dtype).chunk(2, 1)
        d_sinks = None if sinks is None else sinks_grad(grad, attended, sinks).sum(0).to(sinks.dtype)
        return d_q.to(q.dtype), d_k, d_v, d_sinks, None, None, None


def _blocks(
    keys: Tensor, kept: Tensor | None, plan: _Plan
) -> Iterator[tuple[Tensor, tuple[_Read, ...], int]]:
    """(keys, reads, round) of every block: the gathered keys, or one block for each round of the ring."""
    if kept is not None:
        yield kept, plan.gathered, 0
        return
    rounds = len(plan.rounds)
    coming = plan.fetch.start_round(keys, 0)
    for i in range(rounds):
        here = coming
        if i + 1 < rounds:
            coming = plan.fetch.start_round(keys, i + 1)
        yield here.wait(), plan.rounds[i], i

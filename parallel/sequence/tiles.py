"""Attention in plain products, tile by tile: for scores that no fused kernel makes, and where there is none.

Each tile gives its output and the logarithm of its sum of exponentials. merge() turns the results over two
sets of keys into the result over both (online softmax, Milakov and Gimelshein, arXiv 1805.02867). The
backward computes the scores again from the merged result (FlashAttention-2, Dao, arXiv 2307.08691, section
3).

Shapes are heads first: q [.., L, D], k and v [.., S, D]; out [.., L, D], lse [.., L].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

TILE = 1024  # queries, and keys, whose scores exist at a time
# The score of a key that is not seen. Minus infinity would make nan of a tile in which a query sees no key.
UNSEEN = -1e30


class Attended(NamedTuple):
    """The result of attention over some keys.

    out: the output for each query.
    lse: the logarithm of the sum of exponentials of each query's scores.
    """

    out: Tensor
    lse: Tensor

    def rows(self, rows: slice) -> Attended:
        """The result of some of the queries."""
        return Attended(self.out[rows], self.lse[rows])


def with_sinks(attended: Attended, sinks: Tensor) -> Attended:
    """The result where each query also sees a key of score `sinks` and of value zero (arXiv 2309.17453,
    equation 2, with a learned score). sinks: broadcasts to the logarithms."""
    lse = torch.logaddexp(attended.lse, sinks.to(attended.lse.dtype))
    share = (attended.lse - lse).exp_().unsqueeze(-1)
    return Attended((attended.out * share).to(attended.out.dtype), lse)


def sinks_grad(grad: Tensor, attended: Attended, sinks: Tensor) -> Tensor:
    """The gradient of sinks for each query; grad: of the output. attended: with_sinks()."""
    share = (sinks.to(attended.lse.dtype) - attended.lse).exp_()
    return -share * (grad * attended.out).sum(-1, dtype=attended.lse.dtype)


def merge(a: Attended, b: Attended) -> Attended:
    """The result over two disjoint sets of keys, from the results over each."""
    lse = torch.logaddexp(a.lse, b.lse)
    of_a, of_b = (a.lse - lse).exp_().unsqueeze(-1), (b.lse - lse).exp_().unsqueeze(-1)
    return Attended(a.out * of_a + b.out * of_b, lse)


@dataclass(frozen=True)
class Scoring:
    """How products of queries and keys become scores.

    scale: factor on the products.
    cap: c in c tanh(x / c), which bounds scaled products; None: no bound.
    last: query i sees keys up to i + last; None: all keys.
    window: of these keys, how many it sees, the last ones; None: all.
    """

    scale: float
    cap: float | None = None
    last: int | None = None
    window: int | None = None

    def seen(self, query: Tensor, key: Tensor) -> Tensor:
        """Which keys are seen, bool; query, key: their indices, which broadcast."""
        assert self.last is not None
        seen = key <= query + self.last
        return seen if self.window is None else seen & (key > query + self.last - self.window)

    def tiles(self, i: slice, keys: int) -> Iterator[slice]:
        """Tiles of the keys of which the queries i see any."""
        first, stop = 0, keys
        if self.last is not None:
            stop = min(keys, i.stop + self.last)
            if self.window is not None:
                first = max(0, i.start + self.last - self.window + 1)
        return (slice(at, min(at + TILE, stop)) for at in range(first, stop, TILE))


def tiled(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Attended:
    """Softmax attention with at most TILE x TILE scores of a head at a time; each query must see a key."""
    acc = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=acc)
    for i in _tiles(q.shape[-2]):
        total: Attended | None = None
        for j in scoring.tiles(i, k.shape[-2]):
            s, _ = _scores(q, k, i, j, scoring)
            tile_lse = s.logsumexp(-1)
            tile = Attended((s - tile_lse.unsqueeze(-1)).exp_() @ v[..., j, :].to(acc), tile_lse)
            total = tile if total is None else merge(total, tile)
        assert total is not None
        out[..., i, :], lse[..., i] = total.out.to(out.dtype), total.lse
    return Attended(out, lse)


def tiled_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; grad: of the output. attended: over all keys, of which k may be some."""
    acc = torch.promote_types(q.dtype, torch.float32)
    d_q, d_k, d_v = (torch.zeros(x.shape, dtype=acc, device=x.device) for x in (q, k, v))
    delta = (grad.to(acc) * attended.out.to(acc)).sum(-1, keepdim=True)
    for i in _tiles(q.shape[-2]):
        g = grad[..., i, :].to(acc)
        for j in scoring.tiles(i, k.shape[-2]):
            s, slope = _scores(q, k, i, j, scoring)
            p = (s - attended.lse[..., i].unsqueeze(-1)).exp_()
            d_v[..., j, :] += p.mT @ g
            d_s = p.mul_(g @ v[..., j, :].to(acc).mT - delta[..., i, :]).mul_(scoring.scale)
            d_s = d_s if slope is None else d_s.mul_(slope)
            d_q[..., i, :] += d_s @ k[..., j, :].to(acc)
            d_k[..., j, :] += d_s.mT @ q[..., i, :].to(acc)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)


def _tiles(n: int) -> list[slice]:
    return [slice(at, min(at + TILE, n)) for at in range(0, n, TILE)]


def _scores(q: Tensor, k: Tensor, i: slice, j: slice, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """Scores of a tile, and the slope of their bound where there is one."""
    acc = torch.promote_types(q.dtype, torch.float32)
    s = (q[..., i, :].to(acc) @ k[..., j, :].to(acc).mT) * scoring.scale
    slope = None
    if scoring.cap is not None:
        bent = torch.tanh(s / scoring.cap)
        s, slope = bent * scoring.cap, 1.0 - bent.square()
    if scoring.last is not None:
        query = torch.arange(i.start, i.stop, device=q.device).unsqueeze(-1)
        s = s.masked_fill(~scoring.seen(query, torch.arange(j.start, j.stop, device=q.device)), UNSEEN)
    return s, slope


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scoring: Scoring) -> Tensor:
    """tiled() with gradients: q [n, H, L, D], k and v [n, H_kv, S, D], H_kv dividing H, to [n, H, L, D].

    sinks: [H], of with_sinks(), or None. Besides its inputs it keeps one output and one logarithm for each
    query.
    """
    apply: Callable[..., Tensor] = _Tiled.apply  # which torch leaves untyped
    grouped = torch.unflatten(q, 1, (k.shape[1], -1))
    each = None if sinks is None else sinks.view(*grouped.shape[1:3], 1)
    return apply(grouped, k.unsqueeze(2), v.unsqueeze(2), each, scoring).flatten(1, 2)


class _Tiled(torch.autograd.Function):
    """q [n, H_kv, H / H_kv, L, D], k and v [n, H_kv, 1, S, D], sinks [H_kv, H / H_kv, 1] or None."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scoring: Scoring) -> Tensor:
        attended = tiled(q, k, v, scoring)
        attended = attended if sinks is None else with_sinks(attended, sinks)
        ctx.save_for_backward(q, k, v, sinks, *attended)
        ctx.scoring = scoring
        return attended.out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        d_sinks = None
        if sinks is not None:
            d_sinks = sinks_grad(grad, Attended(out, lse), sinks).sum((0, -1)).unsqueeze(-1).to(sinks.dtype)
        each = (-1, -1, q.shape[2], -1, -1)
        d_q, d_k, d_v = tiled_backward(
            grad, q, k.expand(each), v.expand(each), Attended(out, lse), ctx.scoring
        )
        return d_q, d_k.sum(2, keepdim=True), d_v.sum(2, keepdim=True), d_sinks, None

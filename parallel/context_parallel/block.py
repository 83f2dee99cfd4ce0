"""Attention of queries to one block of keys, in a form in which blocks merge exactly.

Each block gives its output and the logarithm of its sum of exponentials. merge() turns the results over two
blocks into the result over both (online softmax, Milakov and Gimelshein, arXiv 1805.02867; across ranks, Ring
Attention, Liu et al., arXiv 2310.01889). The backward of a block needs the merged result over all blocks
(FlashAttention-2, Dao, arXiv 2307.08691, section 3).

Shapes: q [L, H, D], k and v [S, H_kv, D], H_kv dividing H; out [L, H, D], lse [L, H].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 1024  # queries, and keys, whose scores exist at a time where no fused kernel is used


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


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads first, query heads grouped by the key/value head that they share: [H_kv, H / H_kv, .., D]."""
    shared = q.shape[1] // k.shape[1]
    return (
        torch.unflatten(q, 1, (k.shape[1], shared)).permute(1, 2, 0, 3),
        k.transpose(0, 1).unsqueeze(1).expand(-1, shared, -1, -1),
        v.transpose(0, 1).unsqueeze(1).expand(-1, shared, -1, -1),
    )


def _rows(x: Tensor) -> Tensor:
    """[H_kv, H / H_kv, L, ..] to [L, H, ..]."""
    return x.flatten(0, 1).transpose(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Attended:
    """Softmax attention over one block of keys. causal: query i sees keys 0..i, with L = S."""
    qg, kg, vg = _grouped(q, k, v)
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            qg, kg, vg, 0.0, causal, scale=scale
        )
    else:
        out, lse = tiled(qg, kg, vg, causal=causal, scale=scale)
    return Attended(_rows(out), _rows(lse))


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v that one block of keys contributes.

    grad: [L, H, D], of the merged output. attended: the merged result over all blocks.
    The gradient of q has q's dtype; those of k and v are float32, or float64 for float64 inputs.
    """
    qg, kg, vg = _grouped(q, k, v)
    gg, og, lg = (
        torch.unflatten(x, 1, (k.shape[1], -1)).permute(1, 2, 0, *range(3, x.ndim + 1))
        for x in (grad, *attended)
    )
    if q.device.type == "cpu":
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gg.contiguous(),
            qg,
            kg,
            vg,
            og.contiguous(),
            lg.contiguous(),
            dropout_p=0.0,
            is_causal=causal,
            scale=scale,
        )
    else:
        d_q, d_k, d_v = tiled_backward(gg, qg, kg, vg, Attended(og, lg), causal=causal, scale=scale)
    acc = torch.promote_types(q.dtype, torch.float32)
    d_k, d_v = (x.sum(1, dtype=acc).transpose(0, 1) for x in (d_k, d_v))
    return _rows(d_q), d_k, d_v


def merge(a: Attended, b: Attended) -> Attended:
    """The result over two disjoint sets of keys, from the results over each."""
    lse = torch.logaddexp(a.lse, b.lse)
    of_a, of_b = (a.lse - lse).exp_().unsqueeze(-1), (b.lse - lse).exp_().unsqueeze(-1)
    return Attended(a.out * of_a + b.out * of_b, lse)


def _tiles(n: int) -> list[slice]:
    return [slice(at, min(at + TILE, n)) for at in range(0, n, TILE)]


def _scores(q: Tensor, k: Tensor, i: slice, j: slice, causal: bool, scale: float) -> Tensor:
    acc = torch.promote_types(q.dtype, torch.float32)
    s = (q[..., i, :].to(acc) @ k[..., j, :].to(acc).mT) * scale
    if causal and j.stop > i.start:
        query = torch.arange(i.start, i.stop, device=q.device).unsqueeze(-1)
        s = s.masked_fill(query < torch.arange(j.start, j.stop, device=q.device), -math.inf)
    return s


def tiled(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Attended:
    """attend() in plain products, heads first, with at most TILE x TILE scores at a time."""
    acc = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=acc)
    for i in _tiles(q.shape[-2]):
        total: Attended | None = None
        for j in _tiles(k.shape[-2]):
            if causal and j.start >= i.stop:
                break
            s = _scores(q, k, i, j, causal, scale)
            # Every query sees the first key of each tile that is not skipped, so no logarithm is -inf.
            tile_lse = s.logsumexp(-1)
            tile = Attended((s - tile_lse.unsqueeze(-1)).exp_() @ v[..., j, :].to(acc), tile_lse)
            total = tile if total is None else merge(total, tile)
        assert total is not None
        out[..., i, :], lse[..., i] = total.out.to(out.dtype), total.lse
    return Attended(out, lse)


def tiled_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """attend_backward() in plain products, heads first; gradients of k and v per query head."""
    acc = torch.promote_types(q.dtype, torch.float32)
    d_q, d_k, d_v = (torch.zeros(x.shape, dtype=acc, device=x.device) for x in (q, k, v))
    delta = (grad.to(acc) * attended.out.to(acc)).sum(-1, keepdim=True)
    for i in _tiles(q.shape[-2]):
        g = grad[..., i, :].to(acc)
        for j in _tiles(k.shape[-2]):
            if causal and j.start >= i.stop:
                break
            p = (_scores(q, k, i, j, causal, scale) - attended.lse[..., i].unsqueeze(-1)).exp_()
            d_v[..., j, :] += p.mT @ g
            d_s = p.mul_(g @ v[..., j, :].to(acc).mT - delta[..., i, :]).mul_(scale)
            d_q[..., i, :] += d_s @ k[..., j, :].to(acc)
            d_k[..., j, :] += d_s.mT @ q[..., i, :].to(acc)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)

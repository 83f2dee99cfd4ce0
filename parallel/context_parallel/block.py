"""Attention of some queries to one block of keys, with what is needed to join blocks exactly.

Softmax over all keys from softmaxes over blocks of keys: each block gives its output and the logarithm of
its sum of exponentials (online softmax, arXiv 1805.02867; over ranks, Ring Attention, arXiv 2310.01889).
The backward of a block takes the final output and logarithm (FlashAttention-2, arXiv 2307.08691, section 3).

Shapes: q [L, H, D], k and v [S, H_kv, D], H_kv dividing H; out [L, H, D], lse [L, H].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TILE = 1024  # queries and keys whose scores exist at a time where no fused kernel is used


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads first, query heads beside the key/value head that they share: [H_kv, H / H_kv, .., D]."""
    shared = q.shape[1] // k.shape[1]
    return (
        q.unflatten(1, (k.shape[1], shared)).permute(1, 2, 0, 3),
        k.transpose(0, 1).unsqueeze(1).expand(-1, shared, -1, -1),
        v.transpose(0, 1).unsqueeze(1).expand(-1, shared, -1, -1),
    )


def _rows(x: Tensor) -> Tensor:
    """[H_kv, H / H_kv, L, ..] to [L, H, ..]."""
    return x.flatten(0, 1).transpose(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log of the sum of exponentials; causal: query i sees keys 0..i (L = S)."""
    qg, kg, vg = _grouped(q, k, v)
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            qg, kg, vg, 0.0, causal, scale=scale
        )
    else:
        out, lse = tiled(qg, kg, vg, causal, scale)
    return _rows(out), _rows(lse)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's gradients of q, k and v, of k and v in float32 (float64); out, lse: of all blocks."""
    qg, kg, vg = _grouped(q, k, v)
    gg, og, lg = (
        x.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, *range(3, x.ndim + 1)) for x in (grad, out, lse)
    )
    if q.device.type == "cpu":
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gg.contiguous(), qg, kg, vg, og.contiguous(), lg.contiguous(), 0.0, causal, scale=scale
        )
    else:
        d_q, d_k, d_v = tiled_backward(gg, qg, kg, vg, og, lg, causal, scale)
    acc = torch.promote_types(q.dtype, torch.float32)
    d_k, d_v = (x.sum(1, dtype=acc).transpose(0, 1) for x in (d_k, d_v))
    return _rows(d_q), d_k, d_v


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and logarithms over two disjoint sets of keys to those over both."""
    both = torch.logaddexp(lse, more_lse)
    old, new = (lse - both).exp_().unsqueeze(-1), (more_lse - both).exp_().unsqueeze(-1)
    return out * old + more * new, both


def _tiles(n: int) -> list[slice]:
    return [slice(at, min(at + TILE, n)) for at in range(0, n, TILE)]


def _scores(q: Tensor, k: Tensor, i: slice, j: slice, causal: bool, scale: float) -> Tensor:
    acc = torch.promote_types(q.dtype, torch.float32)
    s = (q[..., i, :].to(acc) @ k[..., j, :].to(acc).mT) * scale
    if causal and j.stop > i.start:
        query = torch.arange(i.start, i.stop, device=q.device).unsqueeze(-1)
        s = s.masked_fill(query < torch.arange(j.start, j.stop, device=q.device), -math.inf)
    return s


def tiled(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """attend() in plain products, heads first, with TILE x TILE scores at a time."""
    acc = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=acc)
    for i in _tiles(q.shape[-2]):
        total: Tensor | None = None
        norm = lse[..., i]
        for j in _tiles(k.shape[-2]):
            if causal and j.start >= i.stop:
                break
            s = _scores(q, k, i, j, causal, scale)
            # Every query sees the first key of a tile up to its own, so that no logarithm is -inf.
            more_lse = s.logsumexp(-1)
            more = (s - more_lse.unsqueeze(-1)).exp_() @ v[..., j, :].to(acc)
            total, norm = (more, more_lse) if total is None else merge(total, norm, more, more_lse)
        assert total is not None
        out[..., i, :], lse[..., i] = total.to(out.dtype), norm
    return out, lse


def tiled_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """attend_backward() in plain products, heads first; gradients of k and v per query head."""
    acc = torch.promote_types(q.dtype, torch.float32)
    d_q, d_k, d_v = (torch.zeros(x.shape, dtype=acc, device=x.device) for x in (q, k, v))
    delta = (grad.to(acc) * out.to(acc)).sum(-1, keepdim=True)
    for i in _tiles(q.shape[-2]):
        g = grad[..., i, :].to(acc)
        for j in _tiles(k.shape[-2]):
            if causal and j.start >= i.stop:
                break
            p = (_scores(q, k, i, j, causal, scale) - lse[..., i].unsqueeze(-1)).exp_()
            d_v[..., j, :] += p.mT @ g
            d_s = p.mul_(g @ v[..., j, :].to(acc).mT - delta[..., i, :]).mul_(scale)
            d_q[..., i, :] += d_s @ k[..., j, :].to(acc)
            d_k[..., j, :] += d_s.mT @ q[..., i, :].to(acc)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)

"""Attention of queries to one block of keys, in a form in which blocks merge exactly.

Each block gives its output and the logarithm of its sum of exponentials, which merge() of
parallel.sequence.tiles joins with those of other blocks (across ranks, Ring Attention, Liu et al., arXiv
2310.01889). The backward of a block needs the merged result over all blocks (FlashAttention-2, Dao, arXiv
2307.08691, section 3).

Shapes: q [L, H, D], k and v [S, H_kv, D], H_kv dividing H; out [L, H, D], lse [L, H].
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.sequence.tiles import Attended, Scoring, tiled, tiled_backward


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


def _fused(q: Tensor, scoring: Scoring) -> bool:
    """Whether a kernel that gives logarithms computes these scores."""
    return q.device.type == "cpu" and scoring.cap is None


def attend(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Attended:
    """Softmax attention over one block of keys, of which queries see all, or, with last=0 and L = S, keys
    0 to i."""
    qg, kg, vg = _grouped(q, k, v)
    if _fused(q, scoring):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            qg, kg, vg, 0.0, scoring.last is not None, scale=scoring.scale
        )
    else:
        out, lse = tiled(qg, kg, vg, scoring)
    return Attended(_rows(out), _rows(lse))


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, scoring: Scoring
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
    if _fused(q, scoring):
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gg.contiguous(),
            qg,
            kg,
            vg,
            og.contiguous(),
            lg.contiguous(),
            dropout_p=0.0,
            is_causal=scoring.last is not None,
            scale=scoring.scale,
        )
    else:
        d_q, d_k, d_v = tiled_backward(gg, qg, kg, vg, Attended(og, lg), scoring)
    acc = torch.promote_types(q.dtype, torch.float32)
    d_k, d_v = (x.sum(1, dtype=acc).transpose(0, 1) for x in (d_k, d_v))
    return _rows(d_q), d_k, d_v

"""Sequences laid end to end in one tensor, and the operations that never mix them.

A packed tensor is [T, ..] with T the sum of the sequence lengths; nothing is padded. Lengths are plain
integers known on the host (they come from the plan), so no operation here waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class _Bucket:
    """Sequences of similar length, attended to as one padded batch.

    gather [n, L]: packed row of each slot (padding repeats row 0 of the sequence);
    mask [n, 1, 1, L] or None: slots that are real, None where all are.
    packed [m], slot [m]: packed row and flat slot of every real row.
    """

    gather: Tensor
    mask: Tensor | None
    packed: Tensor
    slot: Tensor


@dataclass(frozen=True)
class Packing:
    """Lengths of the sequences of a packed tensor, in order; zero lengths are allowed.

    The indices that the operations need are made once and kept, so share one Packing between layers.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Packing:
        return Packing(tuple(int(n) for n in lengths), torch.device(device))

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of each sequence, [n + 1], the last entry being the total (also called cu_seqlens)."""
        return np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))

    @cached_property
    def sequence_id(self) -> Tensor:
        """Which sequence each row belongs to, int64 [T]."""
        return self._tensor(np.repeat(np.arange(len(self.lengths)), self.lengths))

    @cached_property
    def position(self) -> Tensor:
        """Index of each row in its own sequence, int64 [T]."""
        return self._tensor(np.arange(self.total) - np.repeat(self.starts[:-1], self.lengths))

    @cached_property
    def buckets(self) -> tuple[_Bucket, ...]:
        """Sequences grouped so that padding less than doubles any of them; none is empty."""
        lengths = np.asarray(self.lengths, dtype=np.int64)
        out = []
        level = np.where(lengths > 0, np.ceil(np.log2(np.maximum(lengths, 1))), -1)
        for value in np.unique(level[level >= 0]):
            members = np.flatnonzero(level == value)
            n = lengths[members]
            offset = np.arange(int(n.max()))
            real = offset[None, :] < n[:, None]
            gather = self.starts[members][:, None] + np.where(real, offset[None, :], 0)
            out.append(
                _Bucket(
                    gather=self._tensor(gather),
                    mask=None if real.all() else self._tensor(real)[:, None, None, :],
                    packed=self._tensor(gather[real]),
                    slot=self._tensor(np.flatnonzero(real.reshape(-1))),
                )
            )
        return tuple(out)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, causal: bool, scale: float | None = None
) -> Tensor:
    """Softmax attention within each packed sequence; [T, H, D], k and v [T, H_kv, D], H_kv dividing H.

    Each bucket of sequences runs as one scaled_dot_product_attention call. Causal attention needs no mask
    for the padding: padded keys come after every real query of their sequence.
    """
    if q.shape[0] == 0:
        # Keep the graph whole: a rank without rows must still send gradients (of zero) to its weights.
        return q + 0.0 * (k.sum() + v.sum())
    grouped = q.shape[1] != k.shape[1]
    if len(packing.buckets) == 1 and packing.buckets[0].mask is None:
        # All of one length: the rows are a batch as they lie.
        size = packing.buckets[0].gather.shape
        qb, kb, vb = (x.unflatten(0, size).transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(qb, kb, vb, is_causal=causal, scale=scale, enable_gqa=grouped)
        return y.transpose(1, 2).flatten(0, 1)
    out = torch.zeros_like(q)
    flat_shape = (-1, *q.shape[1:])
    for b in packing.buckets:
        qb, kb, vb = (x[b.gather].transpose(1, 2) for x in (q, k, v))  # [n, H, L, D]
        y = F.scaled_dot_product_attention(
            qb,
            kb,
            vb,
            attn_mask=None if causal else b.mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=grouped,
        )
        rows = y.transpose(1, 2).reshape(flat_shape)
        out = out.index_copy(0, b.packed, rows if b.mask is None else rows.index_select(0, b.slot))
    return out


def spread(x: Tensor, packing: Packing, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Put zero rows around every sequence: [T, C] to [T + n * (left + right), C], and the slot of each row,
    int64 [T].

    A convolution over the result sees zeros beyond a sequence's ends and never another sequence.
    """
    n = len(packing.lengths)
    slot = torch.arange(packing.total, device=x.device)
    slot = slot + left + packing.sequence_id * (left + right)
    wide = x.new_zeros((packing.total + n * (left + right), *x.shape[1:]))
    return wide.index_copy(0, slot, x), slot


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packing: Packing,
    *,
    causal: bool,
    before: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Depthwise convolution along each packed sequence, zeros beyond its ends.

    x [T, C], weight [C, K], bias [C] or None. causal: output t sees inputs t-K+1..t, else it is centred
    (K odd). before: for sequences that are parts of longer ones, the rows [m, C] that precede them and their
    slots int64 [m] in spread(x, packing, ..). Returns [T, C].
    """
    width = weight.shape[1]
    left = width - 1 if causal else width // 2
    if x.shape[0] == 0:
        return x + 0.0 * (weight.sum() + (0.0 if bias is None else bias.sum()))
    if causal and len(packing.lengths) == 1:
        # One sequence needs no rows between sequences: one copy instead of three.
        head = x.new_zeros(left, x.shape[1])
        head = head if before is None else head.index_copy(0, before[1], before[0])
        return _taps(torch.cat([head, x]), weight, bias)
    wide, slot = spread(x, packing, left, width - 1 - left)
    if before is not None:
        wide = wide.index_copy(0, before[1], before[0])
    return _taps(wide, weight, bias).index_select(0, slot - left)


class _Taps(torch.autograd.Function):
    """y[t] = bias + sum over k of x[t + k] weight[:, k]: x [N, C] to [N - K + 1, C].

    One product a tap, tokens first. torch's depthwise convolution needs channels first and takes twice the
    time on CPUs. Sums are in float32 or wider.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        acc = torch.promote_types(x.dtype, torch.float32)
        taps, rows = weight.T.to(acc).contiguous(), x.to(acc)  # [K, C]
        n = x.shape[0] - len(taps) + 1
        y = rows[:n] * taps[0] if bias is None else torch.addcmul(bias.to(acc), rows[:n], taps[0])
        for k in range(1, len(taps)):
            y.addcmul_(rows[k : k + n], taps[k])
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        acc = torch.promote_types(x.dtype, torch.float32)
        taps, rows, g = weight.T.to(acc).contiguous(), x.to(acc), grad.to(acc).contiguous()
        n = g.shape[0]
        d_x, d_taps = torch.zeros_like(rows), torch.empty_like(taps)
        for k in range(len(taps)):
            d_x[k : k + n].addcmul_(g, taps[k])
            d_taps[k] = (g * rows[k : k + n]).sum(0)
        d_bias = g.sum(0).to(weight.dtype) if ctx.has_bias else None
        return d_x.to(x.dtype), d_taps.T.to(weight.dtype), d_bias


_taps: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _Taps.apply  # which torch leaves untyped

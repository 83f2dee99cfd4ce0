"""Sequences laid end to end in one tensor, and the operations that never mix them.

A packed tensor is [T, ..], with T the sum of the sequence lengths; nothing is padded. Lengths are known on
the host, because they come from the plan, so no operation here waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallel.sequence.buckets import NO_LIMITS, Limits, Pairing, attend
from parallel.sequence.host import to_device


@dataclass(frozen=True)
class Packing:
    """Which sequences a packed tensor consists of. Indices are made once and kept: share one between layers.

    lengths: rows of each sequence, in order; 0 is allowed.
    device: where the indices are.
    places: positions of the rows here on several axes (parallel.sequence.grid), int64 [axes, T]; None: on all
        axes that of each row in its sequence.
    """

    lengths: tuple[int, ...]
    device: torch.device
    places: Tensor | None = field(default=None, compare=False, repr=False)

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
    def pairing(self) -> Pairing:
        """Each row with the rows of its own sequence, for attention()."""
        return Pairing.of(self.lengths, self.lengths, self.device)

    @cached_property
    def _by_window(self) -> dict[int, Pairing]:
        return {}

    def windowed(self, window: int) -> Pairing:
        """Each row with the last `window` rows of its own sequence up to itself, for attention()."""
        if window >= max(self.lengths, default=0):
            return self.pairing
        if window not in self._by_window:
            self._by_window[window] = Pairing.windowed(self.lengths, self.lengths, window, self.device)
        return self._by_window[window]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.device)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    *,
    causal: bool,
    scale: float | None = None,
    limits: Limits = NO_LIMITS,
) -> Tensor:
    """Softmax attention within each packed sequence: q [T, H, D], k and v [T, H_kv, D], H_kv dividing H, to
    [T, H, D].

    causal: each row sees itself and the rows before it. scale: of the scores, D ** -0.5 by default. limits:
    of causal attention: a window, a bound of scores, sinks.
    """
    pairing = packing.pairing if limits.window is None else packing.windowed(limits.window)
    return attend(q, k, v, pairing, causal=causal, scale=scale, limits=limits)


def spread(x: Tensor, packing: Packing, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Put zero rows around each of the n sequences: [T, C] to [T + n * (left + right), C]. Returns also the
    slots there of the T rows, int64 [T].

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
    """Depthwise convolution along each packed sequence, with zeros beyond its ends: x [T, C] to [T, C].

    weight: [C, K]; bias: [C] or None.
    causal: output t sees inputs t - K + 1 to t; otherwise t is the middle of what it sees (K odd).
    before: where sequences are parts of longer ones, the rows [m, C] that precede them, and their slots in
        spread(x, packing, ..), int64 [m].
    """
    width = weight.shape[1]
    left = width - 1 if causal else width // 2
    if x.shape[0] == 0:
        return x + 0.0 * (weight.sum() + (0.0 if bias is None else bias.sum()))
    if causal and len(packing.lengths) == 1:
        # One sequence needs no rows between sequences: one copy instead of three.
        head = x.new_zeros(left, x.shape[1])
        head = head if before is None else head.index_copy(0, before[1], before[0])
        return _convolve(torch.cat([head, x]), weight, bias)
    wide, slot = spread(x, packing, left, width - 1 - left)
    if before is not None:
        wide = wide.index_copy(0, before[1], before[0])
    return _convolve(wide, weight, bias).index_select(0, slot - left)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _Taps.apply  # which torch leaves untyped
    return apply(x, weight, bias)


class _Taps(torch.autograd.Function):
    """y[t] = bias + sum over k of x[t + k] weight[:, k]: x [N, C] to [N - K + 1, C].

    It adds one product a tap, tokens first, in float32 or wider. Torch's depthwise convolution needs channels
    first, and takes twice the time on CPUs.
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

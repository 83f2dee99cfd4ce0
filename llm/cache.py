"""What a model keeps of the tokens before: keys and values of attention, windows and states of Mamba-2.

A forward whose packing is a CachedPacking keeps that of its documents, or continues them by one token each.
Layers find it where they find the packing, so a token is computed as in a forward over the whole document.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.sequence.buckets import NO_LIMITS, Limits
from parallel.sequence.host import to_device
from parallel.sequence.packed import Packing
from parallel.sharding.dtypes import accumulation_dtype

GROWTH = 256  # tokens: keys and values have room for a multiple of it


@dataclass
class KeyValues:
    """Keys and values of one layer, with room for more tokens: [B, S, H_kv, D] each."""

    k: Tensor
    v: Tensor

    @staticmethod
    def empty(k: Tensor, v: Tensor, documents: int) -> KeyValues:
        """No tokens of keys and values like k and v [T, H_kv, D]."""
        return KeyValues(*(t.new_zeros(documents, 0, *t.shape[1:]) for t in (k, v)))

    def write(self, document: Tensor, position: Tensor, k: Tensor, v: Tensor, most: int) -> None:
        """Put k and v [T, H_kv, D] at these positions [T] of these documents [T]; most: the longest then."""
        if most > self.k.shape[1]:
            # By half at least, so that all copies of a long answer are a few times its length.
            room = -(-max(most, self.k.shape[1] * 3 // 2) // GROWTH) * GROWTH
            self.k, self.v = (F.pad(t, (0, 0, 0, 0, 0, room - t.shape[1])) for t in (self.k, self.v))
        self.k[document, position] = k
        self.v[document, position] = v


@dataclass
class Cache:
    """By layer, what it keeps of each document."""

    layers: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CachedPacking(Packing):
    """The next tokens of some documents: all of a beginning, or one token each.

    lengths: of the next tokens. past: tokens of each document before these, zero for all or for none.
    """

    past: tuple[int, ...] = ()
    cache: Cache = field(default_factory=Cache)

    @property
    def begins(self) -> bool:
        """Whether these are the first tokens."""
        return not any(self.past)

    @cached_property
    def position(self) -> Tensor:
        """Index of each token in its whole document, int64 [T]."""
        before = self.starts[:-1] - np.asarray(self.past, dtype=np.int64)
        return to_device(np.arange(self.total) - np.repeat(before, self.lengths), self.device)

    @property
    def whole(self) -> tuple[int, ...]:
        """Tokens of each document, the next ones included."""
        return tuple(n + p for n, p in zip(self.lengths, self.past, strict=True))

    def keep(self, layer: Hashable, k: Tensor, v: Tensor) -> KeyValues:
        """All keys and values of a layer, with k and v [T, H_kv, D] of the next tokens."""
        kept = self.cache.layers.setdefault(layer, KeyValues.empty(k, v, len(self.lengths)))
        assert isinstance(kept, KeyValues)
        kept.write(self.sequence_id, self.position, k, v, max(self.whole))
        return kept


def attend_cached(
    q: Tensor, kept: KeyValues, position: Tensor, *, scale: float | None = None, limits: Limits = NO_LIMITS
) -> Tensor:
    """Attention of one token a document: q [B, H, D] at positions [B] to the keys up to it, [B, H, D].

    scale, limits: as in parallel.sequence.attention. Keys before a window are kept, and masked.
    """
    at = torch.arange(kept.k.shape[1], device=q.device)
    seen = at <= position.unsqueeze(1)  # [B, S]
    if limits.window is not None:
        seen &= at > position.unsqueeze(1) - limits.window
    if limits.cap is not None or limits.sinks is not None:
        return _bounded(q, kept, seen, q.shape[-1] ** -0.5 if scale is None else scale, limits)
    k, v = kept.k.transpose(1, 2), kept.v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(
        q.unsqueeze(2), k, v, attn_mask=seen[:, None, None], scale=scale, enable_gqa=grouped
    )
    return y.squeeze(2)


def _bounded(q: Tensor, kept: KeyValues, seen: Tensor, scale: float, limits: Limits) -> Tensor:
    """The same with bounded scores or sinks, which no fused kernel has."""
    acc = accumulation_dtype(q.dtype)
    heads = torch.unflatten(q, 1, (kept.k.shape[2], -1)).to(acc)  # [B, H_kv, G, D]
    scores = torch.einsum("bhgd,bshd->bhgs", heads, kept.k.to(acc)) * scale
    if limits.cap is not None:
        scores = torch.tanh(scores / limits.cap) * limits.cap
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    if limits.sinks is not None:
        sinks = limits.sinks.to(acc).view(1, *heads.shape[1:3], 1).expand(len(q), -1, -1, -1)
        scores = torch.cat([scores, sinks], -1)  # a key of value zero
    shares = torch.softmax(scores, -1)[..., : kept.k.shape[1]]
    y = torch.einsum("bhgs,bshd->bhgd", shares, kept.v.to(acc))
    return y.flatten(1, 2).to(q.dtype)

"""Attention within items of which a rank may have a part of the queries only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class _Bucket:
    """Items with similar counts of queries and of keys, attended to as one padded batch.

    queries [n, Lq], keys [n, Lk]: packed row of each slot (padding repeats the first); mask [n, 1, 1, Lk]:
    keys that are real, None where all are. packed [m], slot [m]: packed row and flat slot of every real
    query, slot None where all are.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    packed: Tensor
    slot: Tensor | None


@dataclass(frozen=True)
class Pairing:
    """Which keys each packed query sees: all those of its item. Made once a batch, shared by its layers."""

    buckets: tuple[_Bucket, ...]

    @staticmethod
    def of(queries: Sequence[int], keys: Sequence[int], device: torch.device | str = "cpu") -> Pairing:
        """queries, keys: how many each item has, in packed order; an item with queries has keys.

        Padding less than doubles an item's queries and its keys.
        """
        q, k = np.asarray(queries, dtype=np.int64), np.asarray(keys, dtype=np.int64)
        assert q.shape == k.shape and np.all(k[q > 0] > 0), (queries, keys)
        level_q, level_k = (np.ceil(np.log2(np.maximum(n, 1))).astype(np.int64) for n in (q, k))
        kind = np.where(q > 0, 64 * level_q + level_k, -1)
        buckets = []
        for value in np.unique(kind[kind >= 0]):
            some = np.flatnonzero(kind == value)
            at_q, real_q = _slots(q, some)
            at_k, real_k = _slots(k, some)
            buckets.append(
                _Bucket(
                    _tensor(at_q, device),
                    _tensor(at_k, device),
                    None if real_k.all() else _tensor(real_k, device)[:, None, None, :],
                    _tensor(at_q[real_q], device),
                    None if real_q.all() else _tensor(np.flatnonzero(real_q.reshape(-1)), device),
                )
            )
        return Pairing(tuple(buckets))


def _slots(lengths: np.ndarray, some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packed rows of the items `some`, one line each, and which slots are real."""
    starts, n = (np.cumsum(lengths) - lengths)[some], lengths[some]
    offset = np.arange(int(n.max()))
    real = offset[None, :] < n[:, None]
    return starts[:, None] + np.where(real, offset[None, :], 0), real


def _tensor(array: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def attend(q: Tensor, k: Tensor, v: Tensor, pairing: Pairing) -> Tensor:
    """Softmax attention, not causal: q [Tq, H, D], k and v [Tk, H, D] to [Tq, H, D].

    Each bucket runs as one scaled_dot_product_attention call.
    """
    if q.shape[0] == 0:
        # Keep the graph whole: a rank without rows must still take part in the backward.
        return q + 0.0 * (k.sum() + v.sum())
    out = torch.zeros_like(q)
    for b in pairing.buckets:
        qb, kb, vb = (x[at].transpose(1, 2) for x, at in ((q, b.queries), (k, b.keys), (v, b.keys)))
        y = F.scaled_dot_product_attention(qb, kb, vb, attn_mask=b.mask).transpose(1, 2).flatten(0, 1)
        out = out.index_copy(0, b.packed, y if b.slot is None else y.index_select(0, b.slot))
    return out

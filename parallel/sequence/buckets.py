"""Attention within sequences of many lengths: similar lengths run as one padded batch, a bucket.

Queries and keys may have lengths of their own, because a rank may hold some of the queries of a sequence but
fetch all of its keys. Padding less than doubles the queries and less than doubles the keys of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.sequence.host import to_device
from parallel.sequence.intervals import before


@dataclass(frozen=True)
class Bucket:
    """n sequences, padded to Lq queries and Lk keys. All indices are int64.

    queries: [n, Lq], packed row of each query slot; a slot of padding repeats the sequence's first row.
    keys: [n, Lk], the same for keys.
    mask: [n, 1, 1, Lk], bool, True where a key is real; None where all are.
    rows: [m], packed row of every real query.
    slots: [m], where these are among the n * Lq query slots; None where all slots are real.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    rows: Tensor
    slots: Tensor | None


@dataclass(frozen=True)
class Pairing:
    """Each packed query attends to all keys of its sequence. Make it once a batch; its layers share it.

    buckets: the sequences that have queries, by length.
    one_batch: whether there is one bucket of all rows without padding, so that the rows, as they lie, are
        the batch.
    """

    buckets: tuple[Bucket, ...]
    one_batch: bool

    @staticmethod
    def of(queries: Sequence[int], keys: Sequence[int], device: torch.device | str = "cpu") -> Pairing:
        """queries, keys: how many each sequence has, in packed order; one with queries must have keys."""
        q, k = np.asarray(queries, dtype=np.int64), np.asarray(keys, dtype=np.int64)
        assert q.shape == k.shape and np.all(k[q > 0] > 0), (queries, keys)
        k = q if np.array_equal(q, k) else k  # whole sequences: one set of indices for both
        level = np.where(q > 0, 64 * _level(q) + _level(k), -1)
        buckets = tuple(
            _bucket(q, k, np.flatnonzero(level == value), device) for value in np.unique(level[level >= 0])
        )
        one_batch = (
            len(buckets) == 1
            and buckets[0].mask is None
            and buckets[0].slots is None
            and buckets[0].keys.numel() == int(k.sum())
        )
        return Pairing(buckets, one_batch)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairing: Pairing,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of each query to the keys of its sequence: q [Tq, H, D], k and v [Tk, H_kv, D], H_kv
    dividing H, to [Tq, H, D]. Each bucket runs as one scaled_dot_product_attention call.

    causal: query i sees keys 0 to i of its sequence, which must have as many queries as keys.
    scale: of the scores, D ** -0.5 by default.
    """
    if q.shape[0] == 0:
        # Keep the graph whole: a rank without rows must still send gradients (of zero) to its weights.
        return q + 0.0 * (k.sum() + v.sum())
    grouped = q.shape[1] != k.shape[1]
    if pairing.one_batch:
        n = len(pairing.buckets[0].queries)
        qb, kb, vb = (x.view(n, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(qb, kb, vb, is_causal=causal, scale=scale, enable_gqa=grouped)
        return y.transpose(1, 2).flatten(0, 1)
    out = torch.zeros_like(q)
    for b in pairing.buckets:
        # Causal attention needs no mask: padded keys come after every real query of their sequence.
        mask = None if causal else b.mask
        qb, kb, vb = (x[at].transpose(1, 2) for x, at in ((q, b.queries), (k, b.keys), (v, b.keys)))
        y = F.scaled_dot_product_attention(
            qb, kb, vb, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        y = y.transpose(1, 2).flatten(0, 1)
        out = out.index_copy(0, b.rows, y if b.slots is None else y.index_select(0, b.slots))
    return out


def _level(lengths: np.ndarray) -> np.ndarray:
    """Sequences of one level have lengths between a power of two and the next."""
    level: np.ndarray = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    return level


def _bucket(q: np.ndarray, k: np.ndarray, members: np.ndarray, device: torch.device | str) -> Bucket:
    """The bucket of the sequences number `members`, of which q and k are all lengths."""
    query_row, real_query = _slots(q, members)
    key_row, real_key = (query_row, real_query) if k is q else _slots(k, members)
    queries = to_device(query_row, device)
    return Bucket(
        queries=queries,
        keys=queries if k is q else to_device(key_row, device),
        mask=None if real_key.all() else to_device(real_key, device)[:, None, None, :],
        rows=to_device(query_row[real_query], device),
        slots=None if real_query.all() else to_device(np.flatnonzero(real_query), device),
    )


def _slots(lengths: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packed row of every slot of these sequences [n, L], and which slots are real."""
    starts, n = before(lengths)[members], lengths[members]
    offset = np.arange(int(n.max()))
    real = offset[None, :] < n[:, None]
    return starts[:, None] + np.where(real, offset[None, :], 0), real

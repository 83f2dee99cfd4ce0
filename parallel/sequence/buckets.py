"""Attention within sequences of many lengths: similar lengths run as one padded batch, a bucket.

Queries and keys may have lengths of their own, because a rank may hold some of the queries of a sequence but
fetch all of its keys. Padding less than doubles the queries and less than doubles the keys of a sequence.

Under a window a query sees few keys of a long sequence. Its queries are then cut into blocks, each with the
keys that it sees, so the cost grows with the window and not with the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.sequence.host import to_device
from parallel.sequence.intervals import Column, before, column, repeat_groups
from parallel.sequence.tiles import Scoring, tiled_attention

# Queries of a block are as many as the window, but at least these.
LEAST_BLOCK = 64


@dataclass(frozen=True)
class Limits:
    """What bounds causal attention.

    window: keys that a query sees, the last ones, its own included; None: all.
    cap: c in c tanh(score / c), which bounds scores; None: no bound.
    sinks: [H], for each head the score of a key of value zero that every query sees, so that it may give
        less than all of its attention; None: no such key.
    """

    window: int | None = None
    cap: float | None = None
    sinks: Tensor | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Bucket:
    """n sequences, padded to Lq queries and Lk keys. All indices are int64.

    queries: [n, Lq], packed row of each query slot; a slot of padding repeats the sequence's first row.
    keys: [n, Lk], the same for keys.
    mask: [n, 1, 1, Lk], bool, True where a key is real; None where all are. Of blocks of a window [Lq, Lk],
        True where a query sees a key.
    rows: [m], packed row of every real query.
    slots: [m], where these are among the n * Lq query slots; None where all slots are real.
    window: 0, or of blocks of a window: query slot i sees key slots i to i + window - 1.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    rows: Tensor
    slots: Tensor | None
    window: int = 0


class _Pieces(NamedTuple):
    """Sequences, or parts of them, as columns [n].

    query, queries: query slot i is packed row query + i, for skip <= i < queries.
    skip: how many slots of the first have no query.
    key, keys: key slot i is packed row key + i, for i < keys.
    """

    query: Column
    queries: Column
    skip: Column
    key: Column
    keys: Column


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
        q, k = column(queries), column(keys)
        assert q.shape == k.shape and np.all(k[q > 0] > 0), (queries, keys)
        return _pairing([_buckets(_Pieces(before(q), q, 0 * q, before(k), k), device)], int(k.sum()))

    @staticmethod
    def windowed(
        queries: Sequence[int], keys: Sequence[int], window: int, device: torch.device | str = "cpu"
    ) -> Pairing:
        """Each query sees the last `window` keys up to its own, for attend(.., causal=True).

        queries, keys: how many each sequence has, in packed order. The queries are at its end: before the
        first are as many keys as there are more of, less than `window`.
        """
        q, k = column(queries), column(keys)
        ahead = k - q
        assert np.all((q == 0) | ((ahead >= 0) & (ahead < window))), (queries, keys, window)
        key, query = before(k), before(q) - ahead  # of position 0 of each sequence, where no query may be
        k = np.where(q > 0, k, 0)
        # The first `window` positions see all before them; those that have no query are left out after.
        head = np.minimum(k, window)
        parts = [_buckets(_Pieces(query, head, np.minimum(ahead, head), key, head), device)]
        block = max(window, LEAST_BLOCK)
        n, nth = repeat_groups(0 * k, -(-np.maximum(k - window, 0) // block))
        at = window + nth * block  # first position of each block
        size = np.minimum(block, k[n] - at)
        reach = window - 1
        blocks = _Pieces(query[n] + at, size, 0 * size, key[n] + at - reach, size + reach)
        parts.append(_buckets(blocks, device, window))
        return _pairing(parts, sum(keys))


def _pairing(parts: list[tuple[Bucket, ...]], keys: int) -> Pairing:
    buckets = tuple(bucket for part in parts for bucket in part)
    one_batch = (
        len(buckets) == 1
        and not buckets[0].window
        and buckets[0].mask is None
        and buckets[0].slots is None
        and buckets[0].keys.numel() == keys
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
    limits: Limits = NO_LIMITS,
) -> Tensor:
    """Softmax attention of each query to the keys of its sequence: q [Tq, H, D], k and v [Tk, H_kv, D], H_kv
    dividing H, to [Tq, H, D]. Each bucket runs as one scaled_dot_product_attention call.

    causal: query i sees keys 0 to i of its sequence, which must have as many queries as keys.
    scale: of the scores, D ** -0.5 by default.
    limits: of causal attention; its window is that of the pairing. No fused kernel knows bounds of scores or
        sinks: they run in tiles (parallel.sequence.tiles).
    """
    assert causal or limits is NO_LIMITS
    if q.shape[0] == 0:
        # Keep the graph whole: a rank without rows must still send gradients (of zero) to its weights.
        rest = k.sum() + v.sum() if limits.sinks is None else k.sum() + v.sum() + limits.sinks.sum()
        return q + 0.0 * rest
    scoring = Scoring(q.shape[-1] ** -0.5 if scale is None else scale, limits.cap)
    if pairing.one_batch:
        n = len(pairing.buckets[0].queries)
        qb, kb, vb = (x.view(n, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        y = _softmax((qb, kb, vb), pairing.buckets[0], causal, scoring, limits.sinks)
        return y.transpose(1, 2).flatten(0, 1)
    out = torch.zeros_like(q)
    for b in pairing.buckets:
        qb, kb, vb = (x[at].transpose(1, 2) for x, at in ((q, b.queries), (k, b.keys), (v, b.keys)))
        y = _softmax((qb, kb, vb), b, causal, scoring, limits.sinks)
        y = y.transpose(1, 2).flatten(0, 1)
        out = out.index_copy(0, b.rows, y if b.slots is None else y.index_select(0, b.slots))
    return out


def _softmax(
    qkv: tuple[Tensor, Tensor, Tensor], b: Bucket, causal: bool, scoring: Scoring, sinks: Tensor | None
) -> Tensor:
    """Attention of one bucket: q [n, H, Lq, D], k and v [n, H_kv, Lk, D], to [n, H, Lq, D]."""
    q, k, v = qkv
    if scoring.cap is not None or sinks is not None:
        reach = {"last": b.window - 1, "window": b.window} if b.window else {"last": 0}
        return tiled_attention(q, k, v, sinks, replace(scoring, **reach))
    if b.window:
        # Fused kernels with a mask do not know groups of heads.
        shared = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=b.mask, scale=scoring.scale)
    # Causal attention needs no mask: padded keys come after every real query of their sequence.
    mask, grouped = None if causal else b.mask, q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scoring.scale, enable_gqa=grouped
    )


def _level(lengths: Column) -> Column:
    """Sequences of one level have lengths between a power of two and the next."""
    level: Column = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    return level


def _buckets(pieces: _Pieces, device: torch.device | str, window: int = 0) -> tuple[Bucket, ...]:
    """The pieces that have queries, those of similar lengths together. window: of blocks, as in Bucket."""
    level = np.where(pieces.queries > pieces.skip, 64 * _level(pieces.queries) + _level(pieces.keys), -1)
    chosen = (np.flatnonzero(level == value) for value in np.unique(level[level >= 0]))
    return tuple(_bucket(_Pieces(*(x[at] for x in pieces)), device, window) for at in chosen)


def _bucket(p: _Pieces, device: torch.device | str, window: int) -> Bucket:
    query_row, real_query = _slots(p.query, p.skip, p.queries)
    key_row, real_key = _slots(p.key, 0 * p.skip, p.keys)
    queries = to_device(query_row, device)
    mask: Tensor | None = None
    if window:
        query, key = np.arange(query_row.shape[1])[:, None], np.arange(key_row.shape[1])
        mask = to_device((query <= key) & (key < query + window), device)
    elif not real_key.all():
        mask = to_device(real_key, device)[:, None, None, :]
    return Bucket(
        queries=queries,
        # Whole sequences have one set of indices for both.
        keys=queries if np.array_equal(query_row, key_row) else to_device(key_row, device),
        mask=mask,
        rows=to_device(query_row[real_query], device),
        slots=None if real_query.all() else to_device(np.flatnonzero(real_query), device),
        window=window,
    )


def _slots(start: Column, skip: Column, length: Column) -> tuple[np.ndarray, np.ndarray]:
    """Packed row of every slot of these pieces [n, L], and which slots are real."""
    offset = np.arange(int(length.max()))[None, :]
    real = (offset >= skip[:, None]) & (offset < length[:, None])
    return start[:, None] + np.where(real, offset, skip[:, None]), real

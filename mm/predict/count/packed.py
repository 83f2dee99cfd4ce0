"""What packed sequences ask of attention and of the scan, from their lengths alone. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llm.config import LLMConfig
from llm.mamba import MixerShape, choose_scan_method
from mm.predict.count.sizes import Attended, Bucket, Crossing, Rows, ScanCrossing, Windowed
from parallel.comm.fetch import fetch_plan
from parallel.context_parallel import ContextPacking, choose_attention_method
from parallel.context_parallel.attention import wanted_keys
from parallel.context_parallel.halo import wanted_rows
from parallel.context_parallel.packing import Continued
from parallel.context_parallel.state import piece_stream, wanted_pieces
from parallel.sequence.buckets import LEAST_BLOCK
from parallel.sequence.intervals import Span, count, join, overlap, size
from parallel.tensor_parallel.heads import share_heads


def attended(queries: Sequence[int], keys: Sequence[int]) -> Attended:
    """The calls of attention over sequences of these lengths, as parallel.sequence.buckets groups them."""
    q, k = np.asarray(queries, np.int64), np.asarray(keys, np.int64)
    buckets = _pieces(q, 0 * q, k, np.cumsum(k - q))
    return Attended(buckets, _alone(buckets, int(k.sum())))


def _alone(buckets: Sequence[Bucket], keys: int) -> bool:
    """Whether one bucket has the rows as they lie."""
    if len(buckets) != 1:
        return False
    (b,) = buckets
    return not (b.masked or b.window) and b.real == b.n * b.queries and b.n * b.keys == keys


def in_windows(queries: Sequence[int], keys: Sequence[int], window: int) -> Attended:
    """The same under a window, as parallel.sequence.buckets.Pairing.windowed cuts them."""
    q, k = np.asarray(queries, np.int64), np.asarray(keys, np.int64)
    ahead = k - q
    shift, k = np.cumsum(ahead), np.where(q > 0, k, 0)
    head = np.minimum(k, window)
    buckets = _pieces(head, np.minimum(ahead, head), head, shift)
    block = max(window, LEAST_BLOCK)
    rest = np.maximum(k - window, 0)
    last = rest % block
    size = np.concatenate([np.full(int((rest // block).sum()), block), last[last > 0]]).astype(np.int64)
    buckets += _pieces(size, 0 * size, size + window - 1, 0 * size, window)
    return Attended(buckets, _alone(buckets, int(np.sum(keys))))


def _pieces(
    queries: np.ndarray, skip: np.ndarray, keys: np.ndarray, shift: np.ndarray, window: int = 0
) -> tuple[Bucket, ...]:
    """Buckets, as parallel.sequence.buckets makes them. skip: slots without a query, the first. shift: by how
    much rows of keys come after those of the same slots' queries."""
    level = np.where(queries > skip, 64 * _level(queries) + _level(keys), -1)
    out = []
    for value in np.unique(level[level >= 0]):
        q, s, k, later = (x[level == value] for x in (queries, skip, keys, shift))
        masked = not window and bool((k < k.max()).any())
        real, most = int((q - s).sum()), (int(q.max()), int(k.max()))
        moved = window > 1 or bool(s.any()) or bool(later.any())
        out.append(Bucket(len(q), *most, real, masked=masked, window=window, moved=moved))
    return tuple(out)


def windowed(attended: Attended, window: int) -> Windowed:
    """The same of sequences that are as long as those of their buckets."""
    lengths = [b.queries for b in attended.buckets for _ in range(b.n)]
    before = [min(b.keys, b.queries + window - 1) for b in attended.buckets for _ in range(b.n)]
    return Windowed(in_windows(lengths, before, window))


def window_crossing(packing: ContextPacking, window: int) -> Windowed:
    """Attention in windows of a rank under cp, as parallel.context_parallel.window plans it."""

    def read(c: Continued) -> Span:
        return max(c.before[0], c.before[1] - (window - 1)), c.before[1]

    every = range(packing.cp.size)
    wanted = [join([read(c) for c in packing.continued_of(r)]) for r in every]
    lengths = list(packing.fragments.lengths)
    keys = list(lengths)
    for c in packing.continued:
        keys[c.fragment] += read(c)[1] - read(c)[0]
    return Windowed(in_windows(lengths, keys, window), _moved(packing, wanted))


def _level(n: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.ceil(np.log2(np.maximum(n, 1))).astype(np.int64)
    return found


def key_crossing(
    cfg: LLMConfig, packing: ContextPacking, tp: int, tp_rank: int, item: int
) -> Crossing | None:
    """Attention of a rank where documents cross cp; None where none does."""
    wanted, me, cp = wanted_keys(packing), packing.cp.rank, packing.cp.size
    if not any(wanted):
        return None
    shared = share_heads(cfg.n_heads, cfg.n_kv_heads, tp, tp_rank)
    heads = cfg.n_heads // tp
    kv = shared.count if shared.even else heads
    ring = choose_attention_method(packing, heads, kv, cfg.head_dim, item) == "ring"
    blocks = [overlap(wanted[me], packing.spans[(me - i) % cp]) for i in range(cp)] if ring else [wanted[me]]
    outer = {c.fragment for c in packing.continued}
    inner = [n for i, n in enumerate(packing.fragments.lengths) if i not in outer]
    edges = [0, *(e for c in packing.continued for e in c.rows), packing.total]
    plan = fetch_plan("keys", packing.spans, wanted, me)
    gives, takes = [count(x) for x in plan.give], [count(x) for x in plan.take]
    rounds = [Rows(0, gives[(me + i) % cp], takes[(me - i) % cp]) for i in range(1, cp)]
    return Crossing(
        ring=ring,
        own=tuple(c.rows[1] - c.rows[0] for c in packing.continued),
        reads=tuple(_reads(block, packing) for block in blocks),
        blocks=tuple(size(block) for block in blocks),
        keys=Rows(size(wanted[me]), sum(gives) - gives[me], sum(takes) - takes[me]),
        rounds=tuple(rounds),
        inner=attended(inner, inner),
        runs=sum(a < b for a, b in zip(edges[::2], edges[1::2], strict=True)),
    )


def _reads(block: Sequence[Span], packing: ContextPacking) -> tuple[tuple[int, int], ...]:
    """(queries, keys) of each fragment that continues a document and reads keys of this block."""
    found = ((c.rows[1] - c.rows[0], size(overlap(block, [c.before]))) for c in packing.continued)
    return tuple((n, keys) for n, keys in found if keys)


def scan_crossing(cfg: LLMConfig, packing: ContextPacking, tp: int, item: int) -> ScanCrossing:
    """The scan of a rank under cp."""
    shared = share_heads(cfg.mamba_heads, cfg.mamba_groups, tp, 0)
    shape = MixerShape(
        cfg.mamba_heads // tp, cfg.mamba_head_dim, shared.count, cfg.mamba_state, cfg.conv_kernel
    )
    by_heads = shared.even and choose_scan_method(shape, packing, item) == "heads"
    return ScanCrossing(
        by_heads=by_heads,
        pieces=tuple(b - a for a, b in packing.spans[packing.cp.rank]),
        whole=packing.whole,
        documents=len(packing.lengths),
        halo=_moved(packing, wanted_rows(packing, cfg.conv_kernel - 1)),
        states=_moved(piece_stream(packing), wanted_pieces(packing)),
    )


def _moved(packing: ContextPacking, wanted: Sequence[Sequence[Span]]) -> Rows | None:
    if not any(wanted):
        return None
    me = packing.cp.rank
    plan = fetch_plan("rows", packing.spans, wanted, me)
    gives, takes = [count(x) for x in plan.give], [count(x) for x in plan.take]
    return Rows(size(wanted[me]), sum(gives) - gives[me], sum(takes) - takes[me])

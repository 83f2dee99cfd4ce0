"""What packed sequences ask of attention and of the scan, from their lengths alone. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llm.config import LLMConfig
from llm.mamba import MixerShape, choose_scan_method
from mm.predict.count.sizes import Attended, Bucket, Crossing, Rows, ScanCrossing
from parallel.comm.fetch import fetch_plan
from parallel.context_parallel import ContextPacking, choose_attention_method
from parallel.context_parallel.attention import wanted_keys
from parallel.context_parallel.halo import wanted_rows
from parallel.context_parallel.state import piece_stream, wanted_pieces
from parallel.sequence.intervals import Span, count, overlap, size
from parallel.tensor_parallel.heads import share_heads


def attended(queries: Sequence[int], keys: Sequence[int]) -> Attended:
    """The calls of attention over sequences of these lengths, as parallel.sequence.buckets groups them."""
    q, k = np.asarray(queries, np.int64), np.asarray(keys, np.int64)
    level = np.where(q > 0, 64 * _level(q) + _level(k), -1)
    buckets = []
    for value in np.unique(level[level >= 0]):
        own, theirs = q[level == value], k[level == value]
        masked = bool((theirs < theirs.max()).any())
        buckets.append(Bucket(len(own), int(own.max()), int(theirs.max()), int(own.sum()), masked))
    alone = len(buckets) == 1 and not buckets[0].masked
    alone = alone and buckets[0].real == buckets[0].n * buckets[0].queries
    alone = alone and buckets[0].n * buckets[0].keys == int(k.sum())
    return Attended(tuple(buckets), alone)


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

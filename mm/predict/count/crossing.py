"""Attention to documents that cross context-parallel ranks: keys of other ranks, and plain products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mm.predict.count.ops import narrowed
from mm.predict.count.sizes import Crossing, Rows
from mm.predict.count.tape import Storage, Tape, Var
from parallel.sequence.tiles import TILE
from parallel.topology.groups import Group

Grads = list[Storage | None]


class Heads(NamedTuple):
    """Query heads, heads of keys, and the width of each."""

    own: int
    kv: int
    dim: int


def outer(t: Tape, qkv: tuple[Var, Var, Var], heads: Heads, c: Crossing, group: Group) -> Var:
    """parallel.context_parallel.attention._Outer."""
    (q, k, v), acc = qkv, t.acc
    del qkv
    item, rows, row = q.item, sum(c.own), 2 * heads.kv * heads.dim
    wide, held = heads.own * heads.dim, k.rows
    for n in c.own:
        _tiled(t, heads, (n, n), causal=True)
    queries, total = t.new(rows * wide, item), t.new(rows * wide, acc)
    keys = t.new(held * row, item)
    kept = None
    if not c.ring:
        kept = t.new(c.keys.wanted * row, item)
        t.message("all_to_all", group, float(max(c.keys[1:]) * row * item))
    else:
        _ring(t, c.rounds, row * item, group)
    for reads in c.reads:
        for read in reads:
            _tiled(t, heads, read, causal=False)
    out, log = narrowed(t, total, rows * wide, item), t.new(rows * heads.own, acc)
    del queries, total, keys
    saved = t.save(q.store, k.store, v.store, out, log, kept)
    del kept

    def back(g: Grads) -> Grads:
        d_q, d_keys = t.new(held * wide, acc), t.new(held * row, acc)
        queries, d_queries = t.new(rows * wide, item), t.new(rows * wide, acc)
        last: list[Storage] = []  # the gradients of one read are there until the next one's are
        for n in c.own:
            last = _tiled_back(t, heads, (n, n), causal=True)
        keys = t.new(held * row, item)
        if c.ring:
            _ring(t, c.rounds, row * item, group)
        for reads, rows_read in zip(c.reads, c.blocks, strict=True):
            block = t.new(rows_read * row, acc)
            for read in reads:
                last = _tiled_back(t, heads, read, causal=False)
            del block
        del last
        if c.ring:
            _ring(t, c.rounds, row * item, group)
        else:
            t.message("all_to_all", group, float(max(c.keys[1:]) * row * item))
        del queries, d_queries, keys
        narrow = narrowed(t, d_keys, held * row, item)
        del d_keys
        made = narrowed(t, d_q, held * wide, item)
        del d_q
        return [made, narrow, narrow]

    return t.result(t.node([q, k, v], back, saved), out, rows, wide, item)


def _ring(t: Tape, rounds: Sequence[Rows], row: int, group: Group) -> None:
    for one in rounds:
        if one.gives:
            t.message("send", group, float(one.gives * row))
        if one.takes:
            t.message("recv", group, float(one.takes * row))


def _tiles(queries: int, keys: int, causal: bool) -> list[tuple[int, int]]:
    """Queries and keys of each tile, as parallel.sequence.tiles has them."""
    out = []
    for i in range(0, queries, TILE):
        stop = min(i + TILE, queries)
        seen = min(keys, stop) if causal else keys
        out += [(stop - i, min(j + TILE, seen) - j) for j in range(0, seen, TILE)]
    return out


def _tiled(t: Tape, h: Heads, sizes: tuple[int, int], *, causal: bool) -> None:
    if t.host:
        kernel = t.new(sizes[0] * h.own * h.dim, t.item), t.new(sizes[0] * h.own, t.acc)
        _scores(t, h, sizes, 2)
        del kernel
        return
    acc, casts = t.acc, t.item != t.acc
    # Keys are copied for the query heads that share them, but for a single one.
    copies = casts + (h.own > h.kv > 1)
    made = t.new(sizes[0] * h.own * h.dim, t.item)
    for m, n in _tiles(*sizes, causal):
        operands = [t.new(x * h.own * h.dim, acc) for x in [m] * casts + [n] * copies]
        score = t.new(h.own * m * n, acc)
        t.product(m, n, h.dim, acc, h.own)
        del operands
        more = t.new(h.own * m * n, acc)
        t.moves(*[2 * score.size] * (3 + causal))
        operands = [t.new(x * h.own * h.dim, acc) for x in [m] + [n] * copies]
        t.product(m, h.dim, n, acc, h.own)
        del operands, score, more
    del made


def _tiled_back(t: Tape, h: Heads, sizes: tuple[int, int], *, causal: bool) -> list[Storage]:
    """Gradients of queries, and of keys and values in the dtype of sums."""
    if t.host:
        return _kernel_back(t, h, sizes)
    acc, casts = t.acc, t.item != t.acc
    queries, keys = sizes
    grads = [t.new(x * h.own * h.dim, acc) for x in (queries, keys, keys)]
    for m, n in _tiles(*sizes, causal):
        slope = t.new(m * h.own * h.dim, acc) if casts else None
        operands = [t.new(x * h.own * h.dim, acc) for x in (m, n)]
        for _ in range(2):
            t.product(m, n, h.dim, acc, h.own)
        scores = [t.new(h.own * m * n, acc) for _ in range(2)]
        del operands
        scores += [t.new(h.own * m * n, acc) for _ in range(2)]
        t.moves(*[2 * scores[0].size] * (5 + causal))
        for _ in range(2):
            t.product(n, h.dim, m, acc, h.own)
        t.product(m, h.dim, n, acc, h.own)
        del slope, scores
    narrow = narrowed(t, grads[0], queries * h.own * h.dim, t.item)
    made = [narrow, *(t.new(keys * h.kv * h.dim, acc) for _ in range(2))]
    del grads, narrow
    return made


def _kernel_back(t: Tape, h: Heads, sizes: tuple[int, int]) -> list[Storage]:
    """_tiled_back() by one kernel, which is given copies of the output and its gradient."""
    queries, keys = sizes
    rows, shared = h.own * h.dim, h.kv * h.dim
    given = [t.new(queries * rows, t.item) for _ in range(2)]
    wide = [t.new(keys * rows, t.item) for _ in range(2)]
    made = [t.new(queries * rows, t.item)]
    _scores(t, h, sizes, 5)
    del given
    made += [t.new(keys * shared, t.acc) for _ in range(2)]
    del wide
    joined = t.new(2 * keys * shared, t.acc)
    t.moves(2 * joined.size)
    del joined
    return made


def _scores(t: Tape, h: Heads, sizes: tuple[int, int], products: int) -> None:
    for _ in range(products):
        t.product(sizes[0], sizes[1], h.dim, t.item, h.own)


def joined_parts(t: Tape, parts: Sequence[Var], rows: float) -> Var:
    """torch.cat of rows, whose backward gives views."""
    width, item = parts[0].width, parts[0].item
    node = t.node(parts, lambda g: [g[0] for _ in parts_count], [])
    parts_count = range(len(parts))
    out = t.new(rows * width, item)
    t.moves(2 * out.size)
    return t.result(node, out, rows, width, item)


def rows_of(t: Tape, x: Var, rows: float, runs: int) -> Var:
    """Some rows: a view of one stretch, a copy of several; the backward makes a whole gradient."""
    n, item = x.n, x.item
    node = t.node([x], lambda g: [t.new(n, item)], [])
    store = x.store if runs == 1 else t.new(rows * x.width, item)
    return t.result(node, store, rows, x.width, item)

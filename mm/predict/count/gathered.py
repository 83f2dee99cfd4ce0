"""Experts' rows by all-gather (parallel.expert_parallel.all_gather), on sizes."""

from __future__ import annotations

from mm.predict.count import ops
from mm.predict.count.ops import Tp
from mm.predict.count.sizes import Degrees
from mm.predict.count.tape import Storage, Tape, Var

Grads = list[Storage | None]


def gather_dispatch(
    t: Tape, x: Var, route: list[Storage], sizes: tuple[float, float, float], at: Degrees
) -> Var:
    """Rows of this rank's experts. sizes: tokens that all pad theirs to, choices of each, rows that come.
    route: orders of rows, which are kept."""
    wide, k, m = sizes
    every = ops.gathered(t, ops.padded(t, x, wide), _axis(at))
    n, w, item = every.rows, every.width, every.item

    def back(g: Grads) -> Grads:
        made = _by_choice(t, n * k, w, item)
        out = t.new(n * w, item)
        t.moves(made.size, out.size)
        return [out]

    rows = t.result(t.node([every], back, t.save(*route)), _in_order(t, n, m, w, item), m, w, item)
    return rows


def gather_combine(t: Tape, rows: Var, weight: Var, wide: float, at: Degrees) -> Var:
    """Results of experts as tokens of this rank, summed with its weights."""
    own = weight.rows
    every = ops.gathered(t, ops.padded(t, weight, wide), _axis(at))
    n, k, acc = every.rows, every.width, every.item
    m, w, item = rows.rows, rows.width, rows.item
    by_choice, narrow = _by_choice(t, n * k, w, item), t.new(n * k, item)
    t.moves(2 * by_choice.size)
    out = t.new(n * w, item)
    t.moves(by_choice.size, out.size)
    del by_choice, narrow
    saved = t.save(rows.store, every.store)

    def back(g: Grads) -> Grads:
        grad = _in_order(t, n, m, w, item)
        both = t.new(m * w, item)
        t.moves(3 * both.size)
        d_weight = t.new(m, acc)
        del both
        d_rows = t.new(m * w, item)
        t.moves(2 * d_rows.size)
        del grad
        made = _by_choice(t, n * k, 1, acc)
        del d_weight
        return [d_rows, made]

    y = t.result(t.node([rows, every], back, saved), out, n, w, item)
    del rows, every, out
    return ops.first_rows(t, ops.leave(t, y, _axis(at)), own)


def _axis(at: Degrees) -> Tp:
    return Tp(at.ep, at.group("ep"), True)


def _in_order(t: Tape, n: float, m: float, w: float, item: int) -> Storage:
    """all_to_all._in_order: m rows of n, behind which is one of zeros."""
    more = t.new((n + 1) * w, item)
    index = t.new(m, 8)
    out = t.new(m * w, item)
    t.moves(2 * more.size, 2 * out.size, 2 * index.size)
    return out


def _by_choice(t: Tape, rows: float, w: float, item: int) -> Storage:
    """all_to_all._by_choice where some choices are of other ranks."""
    out = t.new((rows + 1) * w, item)
    t.moves(2 * out.size)
    return out

"""Torch's operations on sizes: what each makes, keeps for its backward, and makes in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mm.predict.count.tape import Storage, Tape, Var
from parallel.schedule.action import BACKWARD_WEIGHT
from parallel.topology.groups import Group


def to(t: Tape, x: Var, item: int) -> Var:
    """x in another dtype, x itself in its own."""
    if item == x.item:
        return x
    node = t.node([x], lambda g: [_like(t, x_n, x_item, g)], [])
    x_n, x_item = x.n, x.item
    return t.result(node, _like(t, x.n, item, [x.store]), x.rows, x.width, item)


def narrowed(t: Tape, wide: Storage, n: float, item: int) -> Storage:
    """n elements of the dtype of sums in one of `item` bytes: `wide` itself where these are the same."""
    return wide if item == t.acc else _like(t, n, item, [wide])


def _like(t: Tape, n: float, item: int, given: Sequence[Storage | None]) -> Storage:
    """A new tensor of n elements, made from those given."""
    out = t.new(n, item)
    t.moves(out.size, *(s.size for s in given if s is not None))
    return out


def copy(t: Tape, x: Var) -> Var:
    """A copy whose backward copies too: an indexed read of all rows, or a cat."""
    n, item = x.n, x.item
    node = t.node([x], lambda g: [_like(t, n, item, g)], [])
    return t.result(node, _like(t, n, item, [x.store]), x.rows, x.width, item)


def add(t: Tape, x: Var, y: Var) -> Var:
    """x + y; both get the gradient itself."""
    node = t.node([x, y], lambda g: [g[0], g[0]], [])
    return t.result(node, _like(t, x.n, x.item, [x.store, y.store]), x.rows, x.width, x.item)


def scale(t: Tape, x: Var, factors: float = 1) -> Var:
    """x times a number. factors: how many numbers, one after another."""
    n, item = x.n, x.item
    node = t.node([x], lambda g: [_like(t, n, item, g)], [])
    return t.result(node, _like(t, n, item, [x.store]), x.rows, x.width, item)


def mul(t: Tape, x: Var, y: Var) -> Var:
    """x * y of one shape, of which each keeps the other."""
    saved = t.save(x.store if y.edge else None, y.store if x.edge else None)
    n, item, both = x.n, x.item, (x.edge is not None, y.edge is not None)

    def back(g: list[Storage | None]) -> list[Storage | None]:
        return [_like(t, n, item, [*g, *g]) if wanted else None for wanted in both]

    node = t.node([x, y], back, saved)
    return t.result(node, _like(t, n, item, [x.store, y.store]), x.rows, x.width, item)


def times_weight(t: Tape, x: Var, name: str, width: float, item: int) -> Var:
    """x * w with a weight [width] of `item` bytes, in x's dtype where it is used."""
    wide, learns = t.new(width, x.item), t.trains
    saved = t.save(x.store if learns else None, wide)
    n, of = x.n, x.item

    def back(g: list[Storage | None]) -> list[Storage | None]:
        tmp, d_x = (_like(t, n, of, [*g, *g]) if learns else None), _like(t, n, of, g)
        t.moves(0.0 if tmp is None else tmp.size)
        t.gradient(name, width, item)
        return [d_x]

    node = t.node([x], back, saved, weights=True)
    return t.result(node, _like(t, n, of, [x.store]), x.rows, x.width, of)


def unary(t: Tape, x: Var, *, keeps: str = "input", passes: int = 1) -> Var:
    """An activation. keeps: input, output or both, for the backward, which makes `passes` tensors."""
    saved = t.save(x.store) if keeps != "output" else None
    out = _like(t, x.n, x.item, [x.store])
    if saved is None:
        saved = t.save(out)
    n, item = x.n, x.item

    def back(g: list[Storage | None]) -> list[Storage | None]:
        found = [_like(t, n, item, [*g, *g]) for _ in range(passes)]
        return [found[-1]]

    return t.result(t.node([x], back, saved), out, x.rows, x.width, item)


def silu(t: Tape, x: Var) -> Var:
    """F.silu, whose backward is six operations where a device has no kernel of its own for it."""
    return unary(t, x, passes=1 if t.host else 6)


def squared_relu(t: Tape, x: Var) -> Var:
    """llm.mlp's squared ReLU: its output alone is kept."""
    out = _like(t, x.n, x.item, [x.store])
    t.moves(2 * out.size)
    saved = t.save(out)
    n, item = x.n, x.item

    def back(g: list[Storage | None]) -> list[Storage | None]:
        found = _like(t, n, item, g)
        t.moves(2 * found.size)
        t.moves(3 * found.size)
        return [found]

    return t.result(t.node([x], back, saved), out, x.rows, x.width, item)


def rms_norm(t: Tape, x: Var, weight: str | None, width: float | None = None, item: int | None = None) -> Var:
    """llm.norm.rms_norm: over groups of `width` features, all by default, in the dtype of sums.

    weight: its name; None for none. item: bytes of an element of the weight.
    """
    width, wide = width or x.width, to(t, x, t.acc)
    groups = wide.n / width
    saved = t.save(wide.store)
    square = _like(t, wide.n, t.acc, [wide.store])
    mean = _like(t, groups, t.acc, [square])
    inverse = t.new(groups, t.acc)
    n, acc = wide.n, t.acc
    saved = t.save_made(saved, inverse)
    del square, mean

    def back_inverse(g: list[Storage | None]) -> list[Storage | None]:
        spread = _like(t, n, acc, g)
        one = _like(t, n, acc, [spread])
        two = _like(t, n, acc, [one])
        return [_like(t, n, acc, [spread, two])]

    root = t.result(t.node([wide], back_inverse, saved), inverse, groups, 1, acc)
    kept = t.save(wide.store, inverse)

    def back(g: list[Storage | None]) -> list[Storage | None]:
        tmp, d_x = _like(t, n, acc, [*g, *g]), _like(t, n, acc, g)
        return [d_x, _like(t, groups, acc, [tmp])]

    node = t.node([wide, root], back, kept)
    y = t.result(node, _like(t, n, acc, [wide.store]), x.rows, x.width, acc)
    del wide, root
    if weight is not None:
        y = times_weight(t, y, weight, x.width, t.item if item is None else item)
    return to(t, y, x.item)


def layer_norm(t: Tape, x: Var, name: str) -> Var:
    """encoders.layers.LayerNorm: one kernel in the dtype of sums."""
    wide = to(t, x, t.acc)
    rows, width, n, acc = x.rows, x.width, x.n, t.acc
    out, mean = _like(t, n, acc, [wide.store]), t.new(2 * rows, acc)
    saved = t.save(wide.store, mean)

    def back(g: list[Storage | None]) -> list[Storage | None]:
        d_x = _like(t, n, acc, [*g, *g])
        t.gradient(f"{name}.weight", width, t.item)
        t.gradient(f"{name}.bias", width, t.item)
        return [d_x]

    y = t.result(t.node([wide], back, saved, weights=True), out, x.rows, x.width, acc)
    del wide, out
    return to(t, y, x.item)


class Weight(NamedTuple):
    """A weight [out, into] of a product, by its name. bias: whether it has one. parts: of one that joins
    several, the name and rows of each. adapts: whether it can have an adapter."""

    name: str
    out: float
    into: float
    bias: bool = False
    parts: tuple[tuple[str, float], ...] = ()
    adapts: bool = True


def linear(t: Tape, x: Var, w: Weight, *, item: int | None = None) -> Var:
    """x [rows, into] times a weight."""
    item = x.item if item is None else item
    adapters, used = adapted(t, w, item)
    saved = t.save(x.store if t.trains or adapters else None, *(used if x.edge else ()))
    del used
    rows = x.rows
    t.product(rows, w.out, w.into, item)
    out = t.new(rows * w.out, item)
    wants = x.edge is not None

    def back(g: list[Storage | None]) -> list[Storage | None]:
        d_x = None
        if wants:
            t.product(rows, w.into, w.out, item)
            d_x = t.new(rows * w.into, item)
        weight_product(t, rows, w, item, (g[0], *saved) if isinstance(saved, list) else g)
        adapter_products(t, rows, w, adapters, item)
        return [d_x]

    node = t.node([x], back, saved, weights=True, learns=bool(adapters))
    return t.result(node, out, rows, w.out, item)


Adapters = list[tuple[str, float]]  # the name of a linear map, and the rows of its weight


def adapted(t: Tape, w: Weight, item: int) -> tuple[Adapters, list[Storage]]:
    """parallel.sharding.low_rank.adapted: the sums of weights and adapters, which are made for each use."""
    if t.low is None or not w.adapts:
        return [], []
    found = [part for part in w.parts or ((w.name, w.out),) if t.low.on(part[0].rpartition(".")[2])]
    made = []
    for _, out in found:
        t.product(out, w.into, t.low.rank, item)
        made.append(t.new(out * w.into, item))
    return found, made


def adapter_products(t: Tape, rows: float, w: Weight, adapters: Adapters, item: int) -> None:
    """Gradients of adapters, from those of the sums."""
    if not adapters:
        return
    assert t.low is not None
    rank, kind = t.low.rank, t.kind
    t.kind = BACKWARD_WEIGHT
    whole = [t.new(out * w.into, item) for _, out in adapters]
    t.product(sum(out for _, out in adapters), w.into, rows, item)
    for name, out in adapters:
        t.product(out, rank, w.into, item)
        t.product(rank, w.into, out, item)
        t.gradient(f"{w.name}.{name}.b", out * rank, item, adapter=True)
        t.gradient(f"{w.name}.{name}.a", rank * w.into, item, adapter=True)
    t.kind = kind
    del whole


def weight_product(t: Tape, rows: float, w: Weight, item: int, factors: Sequence[Storage | None]) -> None:
    """The gradient of a weight, now or with the other half of the backward, which its factors wait for."""
    if not t.trains:
        return
    if w.bias:
        t.gradient(f"{w.name}.bias", w.out, item)
    kind, t.kind = t.kind, BACKWARD_WEIGHT
    t.product(w.out, w.into, rows, item)
    t.kind = kind
    if t.halves:
        t.later.append(tuple(factors))
    else:
        t.gradient(w.name, w.out * w.into, item)


def joined_linear(t: Tape, x: Var, w: Weight) -> Var:
    """parallel.tensor_parallel.joined: one product with several weights, joined for it alone."""
    item, rows, size = x.item, x.rows, w.out * w.into
    adapters, used = adapted(t, w, item)
    joined = _like(t, size, item, [])
    t.product(rows, w.out, w.into, item)
    out = t.new(rows * w.out, item)
    del joined
    saved, wants = t.save(x.store, *used), x.edge is not None
    del used

    def back(g: list[Storage | None]) -> list[Storage | None]:
        d_x = None
        if wants:
            joined = _like(t, size, item, [])
            t.product(rows, w.into, w.out, item)
            d_x = t.new(rows * w.into, item)
            del joined
        weight_product(t, rows, w, item, (g[0], *saved) if isinstance(saved, list) else g)
        adapter_products(t, rows, w, adapters, item)
        return [d_x]

    node = t.node([x], back, saved, weights=True, learns=bool(adapters))
    return t.result(node, out, rows, w.out, item)


def split(t: Tape, x: Var, widths: Sequence[float]) -> list[Var]:
    """Views of columns; the backward joins their gradients."""
    n, item, rows = x.n, x.item, x.rows

    def back(g: list[Storage | None]) -> list[Storage | None]:
        return [_like(t, n, item, g)]

    node = t.node([x], back, [], len(widths))
    edges = [None if node is None else (node, k) for k in range(len(widths))]
    return [Var(x.store, rows, w, item, e) for w, e in zip(widths, edges, strict=True)]


def first_rows(t: Tape, x: Var, rows: float) -> Var:
    """The first rows: a view, whose backward makes a whole gradient."""
    n, item = x.n, x.item
    node = t.node([x], lambda g: [t.new(n, item)], [])
    return t.result(node, x.store, rows, x.width, item)


def padded(t: Tape, y: Var, rows: float) -> Var:
    """F.pad(y) to so many rows; a copy in any case, whose backward copies too."""
    n, item = y.n, y.item
    node = t.node([y], lambda g: [g[0] if rows == n / y_width else t.new(n, item)], [])
    y_width = y.width
    out = t.new(rows * y.width, item)
    t.moves(2 * out.size)
    return t.result(node, out, rows, y.width, item)


# Between tensor-parallel ranks.


class Tp(NamedTuple):
    """An axis of tensor parallelism."""

    size: int
    group: Group
    sequence: bool


def enter(t: Tape, x: Var, tp: Tp) -> Var:
    """parallel.tensor_parallel.layers.enter."""
    if tp.size == 1:
        return x
    n, item = x.n, x.item
    if not tp.sequence:
        return t.result(t.node([x], lambda g: [_reduced(t, n, item, tp)], []), x.store, x.rows, x.width, item)
    return gathered(t, x, tp)


def _reduced(t: Tape, n: float, item: int, tp: Tp) -> Storage:
    out = _like(t, n, item, [])
    t.message("all_reduce", tp.group, n * item)
    return out


def gathered(t: Tape, x: Var, tp: Tp) -> Var:
    """parallel.comm.collectives.gather_tokens."""
    n, item = x.n, x.item

    def back(g: list[Storage | None]) -> list[Storage | None]:
        out = t.new(n, item)
        t.message("reduce_scatter", tp.group, tp.size * n * item)
        return [out]

    node = t.node([x], back, [])
    out = t.new(tp.size * n, item)
    t.message("all_gather", tp.group, tp.size * n * item)
    return t.result(node, out, tp.size * x.rows, x.width, item)


def leave(t: Tape, x: Var, tp: Tp) -> Var:
    """parallel.tensor_parallel.layers.leave."""
    if tp.size == 1:
        return x
    n, item = x.n, x.item
    if not tp.sequence:
        out = _reduced(t, n, item, tp)
        return t.result(t.node([x], lambda g: [g[0]], []), out, x.rows, x.width, item)

    def back(g: list[Storage | None]) -> list[Storage | None]:
        out = t.new(n, item)
        t.message("all_gather", tp.group, n * item)
        return [out]

    node = t.node([x], back, [])
    out = t.new(n / tp.size, item)
    t.message("reduce_scatter", tp.group, n * item)
    return t.result(node, out, x.rows / tp.size, x.width, item)


def sum_parts(t: Tape, x: Var, tp: Tp) -> Var:
    """parallel.comm.collectives.sum_parts."""
    n, item = x.n, x.item
    node = t.node([x], lambda g: [_reduced(t, n, item, tp)], [])
    return t.result(node, _reduced(t, n, item, tp), x.rows, x.width, item)


def share_of(t: Tape, x: Var, tp: Tp) -> Var:
    """parallel.comm.collectives.split_tokens: this rank's rows; the gradients of all are gathered."""
    if tp.size == 1:
        return x
    n, item = x.n, x.item

    def back(g: list[Storage | None]) -> list[Storage | None]:
        t.message("all_gather", tp.group, n * item)
        return [t.new(n, item)]

    return t.result(t.node([x], back, []), x.store, x.rows / tp.size, x.width, item)


def join_shares(t: Tape, x: Var, tp: Tp) -> Var:
    """parallel.comm.collectives.join_tokens: the rows of all ranks; the backward takes this rank's."""
    if tp.size == 1:
        return x
    node = t.node([x], lambda g: [g[0]], [])
    t.message("all_gather", tp.group, tp.size * x.bytes)
    out = t.new(tp.size * x.n, x.item)
    return t.result(node, out, tp.size * x.rows, x.width, x.item)

"""The state space scan of Mamba-2, on sizes: llm.scan and what its inputs are made of."""

from __future__ import annotations

from typing import NamedTuple

from llm.scan import BLOCK_BYTES, BLOCK_BYTES_OTHER
from mm.predict.count import ops
from mm.predict.count.tape import Storage, Tape, Var

Grads = list[Storage | None]


class Scan(NamedTuple):
    """Sizes of a scan on a rank: heads, features and groups of them, states; tokens of a chunk."""

    heads: int
    dim: int
    groups: int
    state: int
    chunk: int

    @property
    def inner(self) -> int:
        """Features of all heads."""
        return self.heads * self.dim

    @property
    def channels(self) -> int:
        """Of the convolution."""
        return self.inner + 2 * self.groups * self.state


class _Blocks(NamedTuple):
    """Chunks of a scan, of which some exist at a time as Q x Q tensors."""

    n: int
    step: int
    s: Scan
    q: int

    def sizes(self, count: int) -> list[int]:
        """Chunks of each block of the first `count`."""
        return [min(self.step, count - k) for k in range(0, count, self.step)]


class Inputs(NamedTuple):
    """What a scan reads, in the dtype of sums: llm.scan.ScanInputs."""

    x: Var
    steps: Var
    b: Var
    c: Var


def scan_inputs(t: Tape, conv: Var, dt: Var, s: Scan) -> Inputs:
    """Mamba._scan_inputs."""
    wide = ops.to(t, conv, t.acc)
    x, b, c = ops.split(t, wide, (s.inner, s.groups * s.state, s.groups * s.state))
    del wide, conv
    steps = ops.unary(t, _shifted(t, ops.to(t, dt, t.acc)))
    return Inputs(x, steps, b, c)


class Chunks(NamedTuple):
    """Inputs of a scan in chunks: llm.scan.Chunks."""

    given: Inputs
    total: Var
    blocks: _Blocks
    rows: float


def scan(t: Tape, given: Inputs, s: Scan, rows: float) -> Var:
    """llm.scan.scan of `rows` tokens: [rows, H P]."""
    ch = into_chunks(t, given, s, rows)
    del given
    n = ch.blocks.n
    return outputs(t, ch, added_states(t, ch, n - 1) if n > 1 else None)


def into_chunks(t: Tape, given: Inputs, s: Scan, rows: float) -> Chunks:
    """llm.scan.into_chunks."""
    x, steps, b, c = given
    del given
    q = max(1, min(s.chunk, int(rows)))
    n = int(-(-rows // q))
    if n * q > rows:
        x, steps, b, c = (_grown(t, v, n * q) for v in (x, steps, b, c))
    budget = BLOCK_BYTES["cpu"] if t.host else BLOCK_BYTES_OTHER
    blocks = _Blocks(n, max(1, budget // (s.heads * q * q * t.acc)), s, q)
    return Chunks(Inputs(x, steps, b, c), _total(t, steps), blocks, rows)


def added_states(t: Tape, ch: Chunks, count: int) -> Var:
    """llm.scan.added_states."""
    return _added(t, (ch.given.x, ch.given.steps, ch.total, ch.given.b), ch.blocks, count)


def state_after(t: Tape, ch: Chunks, added: Var) -> Var:
    """llm.scan.state_after: a product that keeps a copy of what its chunks add. [1, H (P N + 1)]"""
    s, n, acc, size = ch.blocks.s, ch.blocks.n, t.acc, added.n
    copied = t.new(size, acc)
    t.moves(2 * copied.size)
    t.product(1, s.inner * s.state, n, acc)
    saved = t.save(copied)
    del copied

    def back(g: Grads) -> Grads:
        t.product(n, s.inner * s.state, 1, acc)
        return [t.new(size, acc)]

    width = s.inner * s.state + s.heads
    return t.result(t.node([added], back, saved), t.new(width, acc), 1, width, acc)


def outputs(t: Tape, ch: Chunks, added: Var | None, before: Var | None = None) -> Var:
    """llm.scan.outputs. before: the state that enters."""
    (x, steps, b, c), total, blocks, rows = ch
    del ch
    q, n, acc = blocks.q, blocks.n, t.acc
    states = None if added is None else _recurrence(t, added, n, before)
    del added, before
    y = _outputs(t, (x, steps, total, b, c, states), blocks)
    if n * q > rows:
        whole = y.n
        node = t.node([y], lambda g: [t.new(whole, acc)], [])
        y = t.result(node, y.store, rows, blocks.s.inner, acc)
    return y


def _shifted(t: Tape, x: Var) -> Var:
    """x + dt_bias."""
    n, item, width = x.n, x.item, x.width

    def back(g: Grads) -> Grads:
        t.gradient("dt_bias", width, item)
        return [g[0]]

    return t.result(t.node([x], back, [], weights=True), t.new(n, item), x.rows, x.width, item)


def _grown(t: Tape, x: Var, rows: int) -> Var:
    """F.pad."""
    n, item = x.n, x.item
    node = t.node([x], lambda g: [t.new(n, item)], [])
    return t.result(node, t.new(rows * x.width, item), rows, x.width, item)


def _total(t: Tape, steps: Var) -> Var:
    """(dt * a), summed up."""
    n, item, heads = steps.n, steps.item, steps.width
    product = t.new(n, item)
    out = t.new(n, item)
    t.moves(2 * n * item, 2 * n * item)
    del product
    saved = t.save(steps.store)

    def back(g: Grads) -> Grads:
        flow = t.new(n, item)
        turned = t.new(n, item)
        del turned
        d_a = t.new(n, item)
        d_steps = t.new(n, item)
        del flow, d_a
        t.gradient("a_log", heads, item)
        return [d_steps]

    return t.result(t.node([steps], back, saved, weights=True), out, steps.rows, steps.width, item)


def _added(t: Tape, given: tuple[Var, Var, Var, Var], blocks: _Blocks, count: int) -> Var:
    """llm.scan._Added of the first `count` chunks. given: x, steps, their total, b."""
    x, steps, total, b = given
    s, q, acc = blocks.s, blocks.q, t.acc
    per = s.state * s.inner
    saved_n = (x.n, steps.n, total.n, b.n)
    out = t.new(count * per, acc)
    for k in blocks.sizes(count):
        xd = t.new(k * q * s.inner, acc)
        rest = [t.new(k * q * s.heads, acc) for _ in range(2)]
        kept = t.new(k * q * s.inner, acc)
        t.moves(3 * xd.size, 3 * kept.size)
        del xd, rest
        copies = [t.new(k * q * s.groups * s.state, acc), t.new(k * q * s.inner, acc)]
        t.moves(2 * copies[0].size, 2 * copies[1].size)
        t.product(s.state, s.inner / s.groups, q, acc, k * s.groups)
        del kept, copies
    saved = t.save(x.store, steps.store, total.store, b.store)

    def back(g: Grads) -> Grads:
        made = [t.new(size, acc) for size in saved_n]
        for k in blocks.sizes(count):
            big = k * q * s.inner
            rest = t.new(k * q * s.heads, acc)
            copy = t.new(k * q * s.groups * s.state, acc)
            d_xd0 = t.new(big, acc)
            t.product(q, s.inner / s.groups, s.state, acc, k * s.groups)
            del copy
            d_xd = t.new(big, acc)
            t.moves(3 * d_xd.size)
            del d_xd0
            lost0 = t.new(big, acc)
            lost = t.new(k * q * s.heads, acc)
            del lost0
            tmp = t.new(big, acc)
            t.moves(3 * tmp.size)
            del tmp
            xs = [t.new(big, acc) for _ in range(2)]
            del xs[0]
            wide = t.new(big, acc)
            turned = t.new(k * s.groups * s.state * s.inner / s.groups, acc)
            out = t.new(k * q * s.groups * s.state, acc)
            t.product(q, s.state, s.inner / s.groups, acc, k * s.groups)
            t.moves(6 * big * acc)
            del xs, wide, turned, out, d_xd, lost, rest
        return [made[0], made[1], made[2], made[3]]

    node = t.node([x, steps, total, b], back, saved)
    return t.result(node, out, count * s.state, s.inner, acc)


def _recurrence(t: Tape, added: Var, n: int, before: Var | None) -> Var:
    """llm.scan._Recurrence: states before n chunks, from what all of them but the last add."""
    given, item = added.n, added.item
    each = added.width * added.rows / max(1, n - (before is None))  # of one state
    size, every = each * (n - 1), each * n
    out = t.new(every, item)
    t.moves(4 * size * item)
    saved = t.save(out)
    enters = before is not None

    def back(g: Grads) -> Grads:
        total = t.new(every, item)
        t.moves(2 * total.size, 4 * total.size)
        product = t.new(size, item)
        t.moves(3 * product.size)
        del product
        if not enters:
            return [total]
        return [t.new(given, item), total]  # of all chunks: the last one's are zeros

    inputs = [added] if before is None else [added, before]
    return t.result(t.node(inputs, back, saved), out, every / added.width, added.width, item)


def _outputs(t: Tape, given: tuple[Var, Var, Var, Var, Var, Var | None], blocks: _Blocks) -> Var:
    """llm.scan._Outputs."""
    x, steps, total, b, c, states = given
    del given
    s, q, acc = blocks.s, blocks.q, t.acc
    y = t.new(blocks.n * q * s.inner, acc)
    part: Storage | None = None
    for k in blocks.sizes(blocks.n):
        part = _outputs_block(t, s, q, k, states is not None)
        t.moves(2 * part.size)
    del part
    t.moves(3 * y.size)
    sizes = (x.n, steps.n, total.n, b.n, c.n)
    state_size = None if states is None else states.n
    saved = t.save(x.store, steps.store, total.store, b.store, c.store, states.store if states else None)

    def back(g: Grads) -> Grads:
        made = [t.new(n, acc) for n in sizes]
        d_states = None if state_size is None else t.new(state_size, acc)
        for k in blocks.sizes(blocks.n):
            _outputs_block_back(t, s, q, k, states=d_states is not None)
        t.gradient("d", s.heads, acc)
        return [*made, *([] if d_states is None else [d_states])]

    inputs = [x, steps, total, b, c, *([] if states is None else [states])]
    return t.result(t.node(inputs, back, saved), y, blocks.n * q, s.inner, acc)


def _outputs_block(t: Tape, s: Scan, q: int, k: int, states: bool) -> Storage:
    acc, big, square = t.acc, k * q * s.inner, k * q * q
    xd = t.new(big, acc)
    decays = t.new(square * s.heads, acc)
    fall = t.new(square * s.heads, acc)
    t.moves(2 * fall.size, 2 * fall.size, 2 * fall.size)
    del fall
    copies = [t.new(k * q * s.groups * s.state, acc) for _ in range(2)]
    score = t.new(square * s.groups, acc)
    t.product(q, q, s.state, acc, k * s.groups)
    t.moves(2 * decays.size)
    del copies
    turned = t.new(big, acc)
    del score
    part = t.new(big, acc)
    t.product(q, s.dim, q, acc, k * s.heads)
    t.moves(3 * big * acc, 2 * big * acc)
    del turned, decays
    if states:
        copy = t.new(k * q * s.groups * s.state, acc)
        late = t.new(big, acc)
        t.product(q, s.inner / s.groups, s.state, acc, k * s.groups)
        t.moves(4 * big * acc)
        del copy, late
    del xd
    return part


def _outputs_block_back(t: Tape, s: Scan, q: int, k: int, *, states: bool) -> None:
    acc, big, square = t.acc, k * q * s.inner, k * q * q
    few = k * q * s.groups * s.state
    xd = t.new(big, acc)
    decay = t.new(square * s.heads, acc)
    score = t.new(square * s.groups, acc)
    t.product(q, q, s.state, acc, k * s.groups)
    turned = [t.new(big, acc) for _ in range(2)]
    d_weight = t.new(square * s.heads, acc)
    t.product(q, q, s.dim, acc, k * s.heads)
    del turned
    d_score = t.new(square * s.groups, acc)
    t.moves(*[3 * decay.size] * 6)
    turned = [t.new(big, acc)]
    d_xd = t.new(big, acc)
    t.product(q, s.dim, q, acc, k * s.heads)
    del turned
    copies = t.new(few, acc)
    d_b = t.new(few, acc)
    t.product(q, s.state, q, acc, k * s.groups)
    del d_b
    d_cs = t.new(few, acc)
    t.product(q, s.state, q, acc, k * s.groups)
    del copies
    if states:
        late = t.new(big, acc)
        flat = t.new(big, acc)
        turned = [t.new(k * s.state * s.inner, acc)]
        read = t.new(k * q * s.heads * s.state, acc)
        t.product(q, s.state, s.dim, acc, k * s.heads)
        del turned, flat
        product = t.new(k * q * s.heads * s.state, acc)
        t.moves(2 * read.size, 3 * product.size)
        del product
        flat = t.new(big, acc)
        t.product(s.state, s.inner / s.groups, q, acc, k * s.groups)
        del late, read, flat
    both = t.new(big, acc)
    t.moves(*[3 * both.size] * 5)
    del both, d_weight, d_score, d_xd, d_cs, xd, decay, score

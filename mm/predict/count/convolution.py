"""The depthwise convolution of packed sequences, on sizes."""

from __future__ import annotations

from mm.predict.count.ops import narrowed
from mm.predict.count.tape import Storage, Tape, Var

Grads = list[Storage | None]


def convolve(
    t: Tape, x: Var, kernel: int, documents: int, *, causal: bool, bias: bool = False, extra: int = 0
) -> Var:
    """parallel.sequence.packed.depthwise_conv: rows with room around documents, a product a tap."""
    rows, width, item, acc = x.rows, x.width, x.item, t.acc
    n = x.n
    alone = causal and documents == 1
    wide_rows = rows + (kernel - 1) * documents
    zeros: list[Storage] = []
    if alone:
        node = t.node([x], lambda g: [g[0]], [])
    else:
        saved = t.save(t.new(rows, 8), x.store)  # where rows go; index_copy() keeps what it copies
        zeros.append(t.new(wide_rows * width, item))
        node = t.node([x], lambda g: [t.new(n, item)], saved)
    wide = t.new(wide_rows * width, item)
    t.moves(2 * wide.size)
    zeros.clear()
    x = t.result(node, wide, wide_rows, width, item)
    del wide
    y = _taps(t, x, kernel, bias, acc)
    if alone:
        return y
    made = y.n
    saved = t.save(t.new(rows, 8))
    node = t.node([y], lambda g: [t.new(made, item)], saved)
    out = t.new(rows * width, item)
    t.moves(2 * out.size)
    return t.result(node, out, rows, width, item)


def _taps(t: Tape, x: Var, kernel: int, bias: bool, acc: int) -> Var:
    width, item = x.width, x.item
    n, out_rows = x.n, x.rows - kernel + 1
    wide = None if item == acc else t.new(n, acc)
    t.moves(n * acc, x.bytes)
    y = t.new(out_rows * width, acc)
    for _ in range(kernel):
        t.moves(3 * y.size)
    out = narrowed(t, y, out_rows * width, item)
    del wide, y
    saved = t.save(x.store)

    def back(g: Grads) -> Grads:
        casts = [] if item == acc else [t.new(n, acc), t.new(out_rows * width, acc)]
        d_x = t.new(n, acc)
        t.moves(3 * d_x.size)
        for _ in range(kernel):
            t.moves(3 * out_rows * width * acc)
            each = t.new(out_rows * width, acc)
            t.moves(3 * each.size)
            del each
        t.gradient("conv", width * kernel, item)
        if bias:
            t.gradient("conv_bias", width, item)
        out = narrowed(t, d_x, n, item)
        del casts, d_x
        return [out]

    return t.result(t.node([x], back, saved, weights=True), out, out_rows, width, item)

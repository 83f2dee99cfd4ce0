"""Encoders and projectors on sizes: ViT, FastConformer, and any other by what it says of its cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from encoders.fastconformer import FastConformerConfig, halved
from encoders.projector import ProjectorKind
from encoders.vit import ViTConfig
from mm.predict.count import ops
from mm.predict.count.attention import bias_after, fused, joined_columns
from mm.predict.count.convolution import convolve
from mm.predict.count.ops import Weight, enter, joined_linear, leave, linear
from mm.predict.count.pieces import How, Piece, piece
from mm.predict.count.sizes import Attended, Degrees
from mm.predict.count.tape import Storage, Tape, Var
from parallel.topology.groups import Group

Grads = list[Storage | None]


class Fetched(NamedTuple):
    """Rows that one exchange over cp moves on a rank: held here, wanted, and of the messages' larger side."""

    held: int
    wanted: int
    moved: int
    group: Group


class ItemLoad(NamedTuple):
    """What a rank of an encoder computes in a micro-batch.

    tokens: of this cp rank; kept: of those between blocks. rows: that it gives. attended: items, or its parts
    of them. stem: what the stem is given: of a FastConformer, frames with the gaps around clips; of a family
    of vision transformers, patches, of those kept. keys, near: exchanges over cp of keys and of rows beside
    its own. items: how many have a token here. flops: that the encoder says of them.
    """

    tokens: int
    kept: int
    rows: int
    attended: Attended
    stem: int = 0
    keys: Fetched | None = None
    near: Fetched | None = None
    items: int = 1
    flops: float = 0.0


def fetched(t: Tape, x: Var, what: Fetched | None) -> Var:
    """parallel.comm.fetch.Fetch."""
    if what is None:
        return x
    width, item = x.width, x.item
    size = what.moved * width * item

    def back(g: Grads) -> Grads:
        into = t.new(what.held * width, item)
        arriving = t.new(max(what.wanted - what.held, 0) * width, item)
        t.message("all_to_all", what.group, size)
        del arriving
        return [into]

    node = t.node([x], back, [])
    out = t.new(what.wanted * width, item)
    t.message("all_to_all", what.group, size)
    return t.result(node, out, what.wanted, width, item)


@lru_cache(maxsize=1 << 12)
def block_counts(cfg: Any, at: Degrees, load: ItemLoad, how: How) -> Piece:
    """A block of a ViT or a FastConformer."""

    def block(t: Tape, x: Var) -> Var:
        return (
            _vit_block(t, x, cfg, at, load) if isinstance(cfg, ViTConfig) else _conformer(t, x, cfg, at, load)
        )

    def compute(t: Tape, x: Var | None) -> Var:
        assert x is not None
        return t.again("full" in how.recompute, lambda x: block(t, x), x)

    return piece(how, lambda t: t.var(load.kept, cfg.width), compute)


def _vit_block(t: Tape, x: Var, cfg: ViTConfig, at: Degrees, load: ItemLoad) -> Var:
    d, own = cfg.width, cfg.width / at.tp
    h = enter(t, ops.layer_norm(t, x, "norm1"), at.axis)
    y = joined_linear(t, h, Weight("qkv", 3 * own, d, bias=True, parts=heads_of(own)))
    del h
    y = _item_attention(t, y, cfg.width // cfg.heads, cfg.heads // at.tp, load)
    y = leave(t, linear(t, y, Weight("out", d, own)), at.axis)
    x = ops.add(t, x, y)
    del y
    h = ops.unary(t, _up(t, ops.layer_norm(t, x, "norm2"), cfg.mlp, d, at, "up"))
    return ops.add(t, x, leave(t, linear(t, h, Weight("down", d, cfg.mlp / at.tp)), at.axis))


HEADS = ("q", "k", "v")


def heads_of(own: float) -> tuple[tuple[str, float], ...]:
    """Parts of a joined weight of equally many queries, keys and values."""
    return tuple((name, own) for name in HEADS)


def _up(t: Tape, x: Var, hidden: int, d: int, at: Degrees, name: str) -> Var:
    return linear(t, enter(t, x, at.axis), Weight(name, hidden / at.tp, d, bias=True))


def _item_attention(t: Tape, qkv: Var, dim: int, heads: int, load: ItemLoad) -> Var:
    """encoders.context.ItemAttention of columns q, k and v."""
    q, kv = _columns(t, qkv, (heads * dim, 2 * heads * dim))
    del qkv
    kv = fetched(t, kv, load.keys)
    k, v = ops.split(t, kv, (heads * dim, heads * dim))
    del kv
    return fused(t, (q, k, v), (heads, heads, dim), load.attended, causal=False)


def _columns(t: Tape, x: Var, widths: Sequence[int]) -> list[Var]:
    """Views of columns by index: each gives a whole gradient, and these are added."""
    n, item = x.n, x.item
    out = []
    for w in widths:
        node = t.node([x], lambda g: [t.new(n, item)], [])
        out.append(t.result(node, x.store, x.rows, w, item))
    return out


def _conformer(t: Tape, x: Var, cfg: FastConformerConfig, at: Degrees, load: ItemLoad) -> Var:
    d, own = cfg.width, cfg.width / at.tp
    x = ops.add(t, x, ops.scale(t, _feed_forward(t, x, cfg, at, "ff1")))
    x = ops.add(t, x, _attend(t, x, cfg, at, load))
    h = enter(t, ops.layer_norm(t, x, "norm_conv"), at.axis)
    value = linear(t, h, Weight("value", own, d))
    gate = ops.unary(t, linear(t, h, Weight("gate", own, d)), keeps="output")
    del h
    y = ops.mul(t, value, gate)
    del value, gate
    y = fetched(t, y, load.near)
    y = convolve(t, y, cfg.kernel, load.items, causal=False)
    y = Var(y.store, load.tokens, y.width, y.item, y.edge)
    y = ops.rms_norm(t, y, None, d / cfg.heads)
    y = ops.times_weight(t, y, "group_norm", own, y.item)
    y = leave(t, linear(t, ops.silu(t, y), Weight("conv_out", d, own)), at.axis)
    x = ops.add(t, x, y)
    del y
    x = ops.add(t, x, ops.scale(t, _feed_forward(t, x, cfg, at, "ff2")))
    return ops.layer_norm(t, x, "norm_out")


def _feed_forward(t: Tape, x: Var, cfg: FastConformerConfig, at: Degrees, name: str) -> Var:
    h = ops.silu(t, _up(t, ops.layer_norm(t, x, f"{name}.norm"), cfg.ffn, cfg.width, at, f"{name}.up"))
    return leave(t, linear(t, h, Weight(f"{name}.down", cfg.width, cfg.ffn / at.tp)), at.axis)


def _attend(t: Tape, x: Var, cfg: FastConformerConfig, at: Degrees, load: ItemLoad) -> Var:
    d, own, dim = cfg.width, cfg.width // at.tp, cfg.width // cfg.heads
    h = enter(t, ops.layer_norm(t, x, "norm_att"), at.axis)
    y = joined_linear(t, h, Weight("qkv", 3 * own, d, parts=heads_of(own)))
    del h
    qkv = ops.split(t, y, (own, own, own))  # unbind, whose backward stacks
    del y
    qkv[:2] = [_turned(t, x) for x in qkv[:2]]
    y = attended_keys(t, qkv, cfg.heads // at.tp, dim, load)
    return leave(t, linear(t, y, Weight("att_out", d, own)), at.axis)


def _turned(t: Tape, x: Var) -> Var:
    """encoders.fastconformer.rotate: halves times cosine and sine, which are kept."""
    n, item = x.n, x.item
    parts = [t.new(n / 2, item) for _ in range(4)]
    t.moves(*(2 * p.size for p in parts))
    both = [t.new(n / 2, item) for _ in range(2)]
    t.moves(*(3 * p.size for p in both))
    del parts
    out = t.new(n, item)
    t.moves(2 * out.size)

    def back(g: Grads) -> Grads:
        parts = [t.new(n / 2, item) for _ in range(4)]
        t.moves(*(2 * p.size for p in parts))
        out = t.new(n, item)
        t.moves(4 * out.size)
        return [out]

    return t.result(t.node([x], back, []), out, x.rows, x.width, item)


def attended_keys(t: Tape, qkv: list[Var], heads: int, dim: int, load: ItemLoad) -> Var:
    """encoders.context.ItemAttention of queries, and of keys and values stacked for it, which it takes."""
    q, k, v = qkv
    qkv.clear()
    kv = joined_columns(t, k, v)
    del k, v
    kv = fetched(t, kv, load.keys)
    k, v = ops.split(t, kv, (heads * dim, heads * dim))
    del kv
    return fused(t, (q, k, v), (heads, heads, dim), load.attended, causal=False)


@lru_cache(maxsize=1 << 12)
def stem_counts(cfg: Any, load: ItemLoad, how: How) -> Piece:
    """What comes before the first block."""

    def compute(t: Tape, x: Var | None) -> Var:
        if isinstance(cfg, ViTConfig):
            return _patches(t, cfg, load)
        return _subsample(t, cfg, load)

    return piece(how._replace(below=False), None, compute)


def _patches(t: Tape, cfg: ViTConfig, load: ItemLoad) -> Var:
    inputs = cfg.channels * cfg.patch**2
    x = t.var(load.kept, inputs)
    y = linear(t, x, Weight("patch", cfg.width, inputs, bias=True))
    del x
    for name in ("row_position", "column_position"):
        y = _with_position(t, y, name, cfg)
    return y


def _with_position(t: Tape, y: Var, name: str, cfg: ViTConfig) -> Var:
    """y + table[index]."""
    n, item, held = y.n, y.item, cfg.max_grid * cfg.width
    index = t.new(y.rows, 8)
    saved = t.save(index)
    found = t.new(n, item)
    out = t.new(n, item)
    t.moves(2 * found.size, 3 * out.size)
    del found

    def back(g: Grads) -> Grads:
        t.gradient(name, held, item)
        t.moves(n * item, held * item)
        return [g[0]]

    return t.result(t.node([y], back, saved, weights=True), out, y.rows, y.width, item)


def _subsample(t: Tape, cfg: FastConformerConfig, load: ItemLoad) -> Var:
    """encoders.fastconformer.Subsample."""
    c, item = cfg.channels, t.item
    time, bands, channels = load.stem, cfg.mels, 1
    x = t.var(time, bands)
    for stage in range(3):
        time, bands = halved(time), halved(bands)
        if stage == 0:
            x = _conv(t, x, (time * bands, c), 9 * channels, "conv", bias=True)
        else:
            x = _conv(t, x, (time * bands, c), 9, f"depth{stage}", bias=False)
            x = _conv(t, x, (time * bands, c), c, f"point{stage}", bias=True)
        channels = c
        x = _masked(t, ops.silu(t, x))
    x = _chosen(t, x, load.kept, c * bands)
    y = linear(t, x, Weight("stem.out", cfg.width, c * bands, bias=True))
    del x
    assert y.item == item
    return y


def _conv(t: Tape, x: Var, shape: tuple[float, int], taps: int, name: str, *, bias: bool) -> Var:
    """A convolution to [rows, channels]."""
    rows, c = shape
    n, item, made = x.n, x.item, rows * c
    flops, size = 2.0 * made * taps, (n + made) * item
    saved = t.save(x.store if t.trains else None)
    out = t.new(made, item)
    t.kernel("convolution", (), item, flops, size)
    wants = x.edge is not None

    def back(g: Grads) -> Grads:
        t.gradient(name, c * taps, item)
        if bias:
            t.gradient(f"{name}.bias", c, item)
        t.kernel("convolution", (), item, flops * (1 + wants), size)
        return [t.new(n, item) if wants else None]

    return t.result(t.node([x], back, saved, weights=True), out, rows, c, item)


def _masked(t: Tape, x: Var) -> Var:
    n, item = x.n, x.item
    node = t.node([x], lambda g: [t.new(n, item)], [])
    out = t.new(n, item)
    t.moves(2 * out.size)
    return t.result(node, out, x.rows, x.width, item)


def _chosen(t: Tape, x: Var, rows: int, width: int) -> Var:
    """The rows of clips, without the gaps, each with all its channels and bands."""
    n, item = x.n, x.item
    whole = t.new(n, item)
    t.moves(2 * whole.size)
    node = t.node([x], lambda g: [t.new(n, item)], [])
    out = t.new(rows * width, item)
    t.moves(2 * out.size)
    del whole
    return t.result(node, out, rows, width, item)


class Ends(NamedTuple):
    """The last part of an encoder's module: its norm, and a projector from width to d_out for each level."""

    width: int
    rows: int
    hidden: int
    d_out: int
    kind: ProjectorKind
    norm: int = 0  # width of the encoder's last norm, 0 for none
    tokens: int = 0
    levels: int = 1
    trains: bool = True  # the projector


@lru_cache(maxsize=1 << 12)
def end_counts(ends: Ends, at: Degrees, how: How) -> Piece:
    """The norm after the last block, and projectors."""
    width = ends.norm or ends.width
    tokens = ends.tokens or ends.rows

    def compute(t: Tape, x: Var | None) -> Var:
        assert x is not None
        if ends.norm:
            x = ops.layer_norm(t, x, "norm")
        t.trains = ends.trains
        x = x.view(ends.rows, ends.width)
        outs = [projected(t, x, ends, at) for _ in range(ends.levels)]
        if ends.levels == 1:
            return outs[0]
        n, item = outs[0].n, outs[0].item
        node = t.node(outs, lambda g: [t.new(n, item) for _ in range(ends.levels)], [])
        return t.result(node, t.new(n * ends.levels, item), ends.rows, ends.d_out * ends.levels, item)

    return piece(how, lambda t: t.var(tokens, width), compute)


def projected(t: Tape, x: Var, ends: Ends, at: Degrees) -> Var:
    """encoders.projector.Projector, without resamplers; adapters are of encoders alone."""
    what, axis = ends.kind, at.axis
    if what.kind == "none":
        return x
    if what.norm == "rms":
        x = ops.rms_norm(t, x, "projector.norm")
    elif what.norm == "layer":
        x = ops.layer_norm(t, x, "projector.norm")
    if what.kind != "mlp":
        return linear(t, x, Weight("projector.linear", ends.d_out, ends.width, what.bias, adapts=False))
    own = ends.hidden / at.tp
    h = linear(t, enter(t, x, axis), Weight("projector.up", own, ends.width, what.bias, adapts=False))
    del x
    h = activated(t, h, what.activation)
    y = leave(t, linear(t, h, Weight("projector.down", ends.d_out, own, adapts=False)), axis)
    return bias_after(t, y, ends.d_out) if what.bias else y


def activated(t: Tape, h: Var, kind: str) -> Var:
    """encoders.activations."""
    if kind == "relu2":
        return ops.unary(t, ops.unary(t, h, keeps="output"), passes=3)
    if kind == "quick_gelu":
        return ops.mul(t, h, ops.unary(t, ops.scale(t, h), keeps="output"))
    return ops.silu(t, h) if kind == "silu" else ops.unary(t, h)


def foreign_counts(flops: float, sizes: tuple[float, float, float, float], how: How) -> Piece:
    """A layer of an encoder that is written elsewhere. flops: that it says of itself. sizes: bytes kept,
    width, tokens, bytes of gradients."""
    kept, width, tokens, weights = sizes

    def compute(t: Tape, x: Var | None) -> Var:
        assert x is not None
        n, item = x.n, x.item
        k = flops / (2 * tokens * width) if tokens else 0.0
        t.product(tokens, width, k, item)
        saved = t.save(t.new(kept / item, item))

        def back(g: Grads) -> Grads:
            t.product(tokens, k, width, item)
            t.product(width, k, tokens, item)
            t.gradient("all", weights / item, item)
            return [t.new(n, item)]

        return t.result(t.node([x], back, saved, weights=True), t.new(n, item), tokens, width, item)

    def again(t: Tape, x: Var | None) -> Var:
        assert x is not None
        return t.again("full" in how.recompute, lambda x: compute(t, x), x)

    return piece(how, lambda t: t.var(tokens, width), again)

"""Vision transformers with the switches of published families (encoders.vision), on sizes."""

from __future__ import annotations

from functools import lru_cache

from encoders.vision.config import VisionConfig
from encoders.vision.model import VisionTransformer
from mm.plan.inputs import EncoderUse
from mm.predict.count import ops
from mm.predict.count.attention import bias_after, indexed
from mm.predict.count.encoder import (
    HEADS,
    Ends,
    ItemLoad,
    activated,
    attended_keys,
    heads_of,
    projected,
)
from mm.predict.count.ops import Weight, enter, joined_linear, leave, linear
from mm.predict.count.pieces import How, Piece, piece
from mm.predict.count.sizes import Degrees
from mm.predict.count.tape import Storage, Tape, Var

Grads = list[Storage | None]


def is_written(use: EncoderUse) -> bool:
    """Whether an encoder's layers are written here."""
    return issubclass(use.cls, VisionTransformer) and not (use.cfg.window or use.cfg.levels)


def rotary_bytes(cfg: VisionConfig, load: ItemLoad) -> float:
    """Cosines and sines, which all blocks share."""
    return 0.0 if cfg.rope == "none" else 2.0 * load.tokens * cfg.head_dim * 4


@lru_cache(maxsize=1 << 12)
def vision_block(cfg: VisionConfig, at: Degrees, load: ItemLoad, how: How) -> Piece:
    """encoders.vision.block.Block."""

    def compute(t: Tape, x: Var | None) -> Var:
        assert x is not None
        return t.again("full" in how.recompute, lambda x: _block(t, x, cfg, at, load), x)

    return piece(how, lambda t: t.var(load.kept, cfg.width), compute)


def _block(t: Tape, x: Var, cfg: VisionConfig, at: Degrees, load: ItemLoad) -> Var:
    y = _attention(t, _norm(t, x, cfg, "norm1"), cfg, at, load)
    x = ops.add(t, x, ops.times_weight(t, y, "scale1", cfg.width, t.item) if cfg.layer_scale else y)
    y = _mlp(t, _norm(t, x, cfg, "norm2"), cfg, at)
    return ops.add(t, x, ops.times_weight(t, y, "scale2", cfg.width, t.item) if cfg.layer_scale else y)


def _norm(t: Tape, x: Var, cfg: VisionConfig, name: str) -> Var:
    return ops.layer_norm(t, x, name) if cfg.norm == "layer" else ops.rms_norm(t, x, name)


def _attention(t: Tape, x: Var, cfg: VisionConfig, at: Degrees, load: ItemLoad) -> Var:
    d, own, heads = cfg.width, cfg.width // at.tp, cfg.heads // at.tp
    biased = any(name in cfg.biases for name in HEADS)
    w = Weight("qkv", 3 * own, d, bias=biased, parts=heads_of(own))
    y = joined_linear(t, enter(t, x, at.axis), w)
    del x
    qkv = ops.split(t, y, (own, own, own))  # unbind, whose backward stacks
    del y
    if cfg.rope != "none":
        qkv[:2] = [_turned(t, x) for x in qkv[:2]]
    y = attended_keys(t, qkv, heads, cfg.head_dim, load)
    y = leave(t, linear(t, y, Weight("out", d, own)), at.axis)
    return bias_after(t, y, d, "out.bias") if "out" in cfg.biases else y


def _turned(t: Tape, x: Var) -> Var:
    """encoders.vision.position.turn, in the dtype of sums."""
    wide = ops.to(t, x, t.acc)
    n, acc = wide.n, t.acc
    one, other = t.new(n, acc), t.new(n / 2, acc)
    joined = t.new(n, acc)
    t.moves(2 * one.size, 2 * other.size, 2 * joined.size)
    del other
    two = t.new(n, acc)
    del joined
    out = t.new(n, acc)
    t.moves(2 * two.size, 3 * out.size)
    del one, two

    def back(g: Grads) -> Grads:
        joined = t.new(n, acc)
        half = t.new(n / 2, acc)
        both = [t.new(n, acc) for _ in range(2)]
        t.moves(2 * joined.size, 2 * half.size, *(3 * x.size for x in both))
        return [both[0]]

    y = t.result(t.node([wide], back, []), out, x.rows, x.width, acc)
    del out
    return ops.to(t, y, x.item)


def _mlp(t: Tape, x: Var, cfg: VisionConfig, at: Degrees) -> Var:
    d, own, bias = cfg.width, cfg.mlp / at.tp, "mlp" in cfg.biases
    h = enter(t, x, at.axis)
    del x
    if cfg.gated:
        gate = activated(t, linear(t, h, Weight("gate", own, d, bias)), cfg.activation)
        h = ops.mul(t, gate, linear(t, h, Weight("up", own, d, bias)))
        del gate
    else:
        h = activated(t, linear(t, h, Weight("up", own, d, bias)), cfg.activation)
    y = leave(t, linear(t, h, Weight("down", d, own)), at.axis)
    return bias_after(t, y, d, "mlp.bias") if bias else y


@lru_cache(maxsize=1 << 12)
def vision_stem(cfg: VisionConfig, load: ItemLoad, how: How) -> Piece:
    """What comes before the first block."""

    def compute(t: Tape, x: Var | None) -> Var:
        return _patches(t, cfg, load)

    return piece(how._replace(below=False), None, compute)


def _patches(t: Tape, cfg: VisionConfig, load: ItemLoad) -> Var:
    """VisionTransformer._embed."""
    x = t.var(load.stem, cfg.inputs)
    x = linear(t, x, Weight("patch", cfg.width, cfg.inputs, bias="patch" in cfg.biases))
    if cfg.table:
        x = _placed(t, x, cfg.table**2)
    if cfg.prefix:
        x = _among_prefix(t, x, cfg, load)
    return _norm(t, x, cfg, "pre_norm") if cfg.pre_norm else x


def _placed(t: Tape, y: Var, size: int) -> Var:
    """y + table[index]."""
    n, item, held = y.n, y.item, size * y.width
    saved = t.save(t.new(y.rows, 8))
    found = t.new(n, item)
    out = t.new(n, item)
    t.moves(2 * found.size, 3 * out.size)
    del found

    def back(g: Grads) -> Grads:
        t.gradient("position", held, item)
        t.moves(n * item, held * item)
        return [g[0]]

    return t.result(t.node([y], back, saved, weights=True), out, y.rows, y.width, item)


def _among_prefix(t: Tape, x: Var, cfg: VisionConfig, load: ItemLoad) -> Var:
    n, item, d = x.n, x.item, cfg.width

    def back(g: Grads) -> Grads:
        t.gradient("prefix", cfg.prefix * d, item)
        return [t.new(n, item)]

    joined = t.new(n + cfg.prefix * d, item)
    t.moves(2 * joined.size)
    y = t.result(t.node([x], back, [], weights=True), joined, x.rows + cfg.prefix, d, item)
    del x, joined
    return indexed(t, y, load.kept)


@lru_cache(maxsize=1 << 12)
def vision_ends(cfg: VisionConfig, ends: Ends, at: Degrees, how: How) -> Piece:
    """The norm after the last block, merged patches, and the projector. ends.tokens: that enter."""

    def compute(t: Tape, x: Var | None) -> Var:
        assert x is not None
        if cfg.final_norm:
            x = _norm(t, x, cfg, "norm")
        if cfg.prefix and not cfg.prefix_rows:
            x = indexed(t, x, ends.rows * cfg.merge**2)
        x = x.view(ends.rows, cfg.merge**2 * cfg.width)
        if cfg.merged:
            x = _merged(t, x, cfg, at)
        t.trains = ends.trains
        return projected(t, x, ends, at)

    return piece(how, lambda t: t.var(ends.tokens, cfg.width), compute)


def _merged(t: Tape, x: Var, cfg: VisionConfig, at: Degrees) -> Var:
    """encoders.vision.block.Merger, whose norm is over each patch."""
    rows, d = x.rows, x.width
    h = _norm(t, x.view(rows * cfg.merge**2, cfg.width), cfg, "merger.norm").view(rows, d)
    del x
    h = ops.unary(t, linear(t, enter(t, h, at.axis), Weight("merger.up", d / at.tp, d, bias=True)))
    y = leave(t, linear(t, h, Weight("merger.down", cfg.merged, d / at.tp)), at.axis)
    return bias_after(t, y, cfg.merged, "merger.bias")

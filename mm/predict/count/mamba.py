"""The Mamba-2 mixer of the language model, on sizes."""

from __future__ import annotations

from llm.config import LLMConfig
from mm.predict.count import ops
from mm.predict.count.attention import joined_columns
from mm.predict.count.convolution import convolve
from mm.predict.count.crossing import joined_parts, rows_of
from mm.predict.count.ops import Weight, enter, joined_linear, leave, linear
from mm.predict.count.scan import (
    Inputs,
    Scan,
    added_states,
    into_chunks,
    outputs,
    scan,
    scan_inputs,
    state_after,
)
from mm.predict.count.sizes import Degrees, Rows, ScanCrossing, TokenLoad
from mm.predict.count.tape import Storage, Tape, Var
from parallel.tensor_parallel.heads import share_heads
from parallel.topology.groups import Group

Grads = list[Storage | None]


def mamba(t: Tape, x: Var, cfg: LLMConfig, at: Degrees, load: TokenLoad, recompute: frozenset[str]) -> Var:
    """llm.mamba.Mamba."""
    shared = share_heads(cfg.mamba_heads, cfg.mamba_groups, at.tp, at.tp_rank)
    s = Scan(cfg.mamba_heads // at.tp, cfg.mamba_head_dim, shared.count, cfg.mamba_state, cfg.chunk)
    width = s.inner + s.channels + s.heads
    bc = shared.count * cfg.mamba_state
    parts = (("in_z", s.inner), ("in_x", s.inner), ("in_b", bc), ("in_c", bc), ("in_dt", s.heads))
    y = joined_linear(t, enter(t, x, at.axis), Weight("in", width, cfg.d_model, parts=parts))
    z, mixed, dt = ops.split(t, y, (s.inner, s.channels, s.heads))
    del y

    def core(z: Var, mixed: Var, dt: Var) -> Var:
        y = _scanned(t, mixed, dt, (cfg, s), at, load)
        return _gated(t, y, z, s, sharded=shared.sharded, at=at)

    y = t.again("scan" in recompute, core, z, mixed, dt)
    del z, mixed, dt
    return leave(t, linear(t, y, Weight("out", cfg.d_model, s.inner)), at.axis)


def _scanned(t: Tape, mixed: Var, dt: Var, how: tuple[LLMConfig, Scan], at: Degrees, load: TokenLoad) -> Var:
    (cfg, s), c = how, load.scan
    if c is not None and c.by_heads:
        return _by_heads(t, mixed, dt, how, at, c)
    if c is not None and c.halo is not None:
        mixed = _with_halo(t, mixed, c.halo, at)
    conv = convolve(t, mixed, cfg.conv_kernel, load.documents, causal=True, bias=True)
    given = scan_inputs(t, ops.silu(t, conv), dt, s)
    del conv
    if c is None or c.states is None:
        return scan(t, given, s, mixed.rows)
    return _by_states(t, given, s, at, c)


def _with_halo(t: Tape, x: Var, halo: Rows, at: Degrees) -> Var:
    """The rows before the pieces, fetched: they go into the convolution's copy of x."""
    n, item, width = x.n, x.item, x.width
    size = float(max(halo.gives, halo.takes) * width * item)

    def back(g: Grads) -> Grads:
        into = t.new(n, item)
        t.message("all_to_all", at.group("cp"), size)
        del into
        return [g[0]]

    fetched = t.new(halo.wanted * width, item)
    t.message("all_to_all", at.group("cp"), size)
    return t.result(t.node([x], back, t.save(fetched)), x.store, x.rows, x.width, item)


def _by_states(t: Tape, given: Inputs, s: Scan, at: Degrees, c: ScanCrossing) -> Var:
    """Mamba._by_states: a scan a piece, whose last states are exchanged."""
    assert c.states is not None
    pieces = []
    for rows in c.pieces:
        pieces.append(into_chunks(t, Inputs(*(rows_of(t, x, rows, 1) for x in given)), s, rows))
    del given
    added = [added_states(t, ch, ch.blocks.n) for ch in pieces]
    ends = [state_after(t, ch, add) for ch, add in zip(pieces, added, strict=True)]
    begins = _begin_states(t, ends, c.states, at.group("cp"))
    ends.clear()
    parts = []
    for before in begins:
        parts.append(outputs(t, pieces.pop(0), added.pop(0), before))
    del before
    begins.clear()
    return joined_parts(t, parts, sum(c.pieces)) if len(parts) > 1 else parts[0]


def _begin_states(t: Tape, ends: list[Var], moved: Rows, group: Group) -> list[Var]:
    """parallel.context_parallel.state.begin_states: the states before pieces, from those after others."""
    width, item, n = ends[0].width, ends[0].item, len(ends)
    size = float(max(moved.gives, moved.takes) * width * item)
    stacked = t.new(n * width, item)
    t.moves(2 * stacked.size)
    fetched = t.new(moved.wanted * width, item)
    t.message("all_to_all", group, size)
    del stacked

    def home(g: Grads) -> Grads:
        into, arriving = t.new(n * width, item), t.new(moved.gives * width, item)
        t.message("all_to_all", group, size)
        del arriving
        return [into] * n

    node = t.node(ends, home, [])
    every = moved.wanted * width
    states = t.result(node, fetched, moved.wanted, width, item)
    del fetched, node
    found = []
    for _ in ends:
        saved = t.save(states.store)
        made = t.node([states], lambda g: [t.new(every, item)], saved)
        found.append(t.result(made, t.new(width, item), 1, width, item))
    return found


def _by_heads(t: Tape, mixed: Var, dt: Var, how: tuple[LLMConfig, Scan], at: Degrees, c: ScanCrossing) -> Var:
    """Mamba._by_heads: the whole stream for some heads, between two exchanges."""
    cfg, s = how
    cp, tokens = at.cp, mixed.rows
    groups = share_heads(s.heads, s.groups, cp, at.cp_rank).count
    own = Scan(s.heads // cp, s.dim, groups, s.state, s.chunk)
    both = joined_columns(t, mixed, dt)
    parts = indexed_columns(t, both, cp * (own.channels + own.heads))
    del both
    heads = _swapped(t, parts.view(tokens * cp, own.channels + own.heads), at)
    del parts
    heads = ops.copy(t, heads)
    conv, steps = ops.split(t, heads, (own.channels, own.heads))
    del heads
    conv = convolve(t, conv, cfg.conv_kernel, c.documents, causal=True, bias=True)
    given = scan_inputs(t, ops.silu(t, conv), steps, own)
    del conv, steps
    y = scan(t, given, own, c.whole)
    del given
    y = ops.copy(t, ops.copy(t, y))
    y = _swapped(t, y, at)
    return ops.copy(t, y).view(tokens, s.inner)


def indexed_columns(t: Tape, x: Var, width: float) -> Var:
    """index_select of columns."""
    n, item = x.n, x.item
    node = t.node([x], lambda g: [t.new(n, item)], [])
    out = t.new(x.rows * width, item)
    t.moves(2 * out.size)
    return t.result(node, out, x.rows, width, item)


def _swapped(t: Tape, x: Var, at: Degrees) -> Var:
    """parallel.context_parallel.ulysses._swap."""
    n, item, group = x.n, x.item, at.group("cp")

    def exchange() -> Storage:
        ready, out = t.new(n, item), t.new(n, item)
        t.moves(2 * ready.size)
        t.message("all_to_all", group, out.size)
        del ready
        return out

    node = t.node([x], lambda g: [exchange()], [])
    return t.result(node, exchange(), x.rows, x.width, item)


def _gated(t: Tape, y: Var, z: Var, s: Scan, *, sharded: bool, at: Degrees) -> Var:
    """Mamba._gated_norm."""
    wide = ops.to(t, z, t.acc)
    gate = ops.silu(t, wide)
    del wide
    y = ops.mul(t, y, gate)
    del gate
    y = ops.rms_norm(t, y, None, s.inner / s.groups) if sharded else _parted_norm(t, y, s, at)
    y = ops.times_weight(t, y, "norm", s.inner, z.item)
    return ops.to(t, y, z.item)


def _parted_norm(t: Tape, y: Var, s: Scan, at: Degrees) -> Var:
    """The norm of groups that several tp ranks share: a message of sums of squares, and one back."""
    n, item, rows = y.n, y.item, y.rows
    saved = t.save(y.store)
    square = t.new(n, item)
    t.moves(2 * square.size)
    del square
    groups = rows * s.groups
    t.message("all_reduce", at.group("tp"), groups * item)

    def back_squares(g: Grads) -> Grads:
        t.message("all_reduce", at.group("tp"), groups * item)
        tmp = [t.new(n, item) for _ in range(2)]
        del tmp[0]
        return [t.new(n, item)]

    inverse = t.new(rows * s.heads, item)
    mean = t.result(t.node([y], back_squares, saved), inverse, rows, s.heads, item)
    kept = t.save(y.store, inverse)

    def back(g: Grads) -> Grads:
        tmp = t.new(n, item)
        d_y = t.new(n, item)
        del tmp
        return [d_y, t.new(rows * s.heads, item)]

    out = t.new(n, item)
    t.moves(2 * out.size)
    return t.result(t.node([y, mean], back, kept), out, rows, y.width, item)

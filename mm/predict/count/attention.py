"""Attention and dense MLPs of the language model, and fused attention of all modules, on sizes."""

from __future__ import annotations

from llm.config import LLMConfig
from mm.predict.count import ops
from mm.predict.count.crossing import Heads, joined_parts, outer, rows_of
from mm.predict.count.ops import Weight, enter, joined_linear, leave, linear
from mm.predict.count.packed import windowed
from mm.predict.count.sizes import Attended, Bucket, Degrees, Rows, TokenLoad, Windowed
from mm.predict.count.tape import Storage, Tape, Var
from parallel.tensor_parallel.heads import share_heads
from parallel.topology.groups import Group

Grads = list[Storage | None]


def attention(
    t: Tape, x: Var, cfg: LLMConfig, at: Degrees, load: TokenLoad, layer: int | None, *, again: bool
) -> Var:
    """llm.attention.Attention. again: whether its core is computed again."""
    x = enter(t, x, at.axis)
    shared = share_heads(cfg.n_heads, cfg.n_kv_heads, at.tp, at.tp_rank)
    own = cfg.n_heads // at.tp
    biased = cfg.attention_bias or cfg.qkv_bias
    parts = [(x, n * cfg.head_dim) for x, n in (("q", own), ("k", shared.count), ("v", shared.count))]
    w = Weight("qkv", sum(n for _, n in parts), cfg.d_model, bias=biased, parts=tuple(parts))
    y = joined_linear(t, x, w)
    del x
    heads = (own, shared.count, cfg.head_dim)
    q, k, v = ops.split(t, y, [n * cfg.head_dim for n in (own, shared.count, shared.count)])
    del y

    def core(q: Var, k: Var, v: Var) -> Var:
        return _core(t, (q, k, v), cfg, heads, load, (layer, shared.even, at))

    y = t.again(again, core, q, k, v)
    del q, k, v
    return output(t, y, cfg, at)


def output(t: Tape, y: Var, cfg: LLMConfig, at: Degrees) -> Var:
    """llm.attention.Heads.output."""
    y = leave(t, linear(t, y, Weight("out", cfg.d_model, y.width)), at.axis)
    return bias_after(t, y, cfg.d_model) if cfg.attention_bias else y


def bias_after(t: Tape, y: Var, width: float, name: str = "bias") -> Var:
    """y + a bias."""
    n, item = y.n, y.item

    def back(g: Grads) -> Grads:
        t.gradient(name, width, item)
        return [g[0]]

    node = t.node([y], back, [], weights=True)
    return t.result(node, t.new(n, item), y.rows, y.width, item)


def _core(
    t: Tape,
    qkv: tuple[Var, Var, Var],
    cfg: LLMConfig,
    heads: tuple[int, int, int],
    load: TokenLoad,
    how: tuple[int | None, bool, Degrees],
) -> Var:
    # how: the layer, and whether its heads read keys in equal runs.
    layer, even, at = how
    own, kv, dim = heads
    q, k, v = qkv
    del qkv
    if cfg.qk_norm == "head":
        q, k = (ops.rms_norm(t, x, name, dim) for x, name in ((q, "q_norm"), (k, "k_norm")))
    elif cfg.qk_norm == "full":
        q, k = (ops.rms_norm(t, x, name) for x, name in ((q, "q_norm"), (k, "k_norm")))
    if cfg.rope_of(layer)[0] is not None:
        angle = t.new(load.tokens * cfg.rope_width, t.acc)  # cosine and sine
        t.moves(3 * angle.size)
        q, k = (rotated(t, x, angle, cfg.rope_width / dim) for x in (q, k))
        del angle
    if not even:
        k, v, kv = _spread(t, k, own * dim), _spread(t, v, own * dim), own
    window = cfg.window_of(layer)
    if window is not None:
        windows = windowed(load.attended, window) if load.windowed is None else load.windowed
        return _in_windows(t, (q, k, v), Heads(own, kv, dim), windows, at)
    if load.crossing is None:
        return fused(t, (q, k, v), (own, kv, dim), load.attended, causal=True)
    return _crossing(t, (q, k, v), Heads(own, kv, dim), load, at.group("cp"))


def _in_windows(t: Tape, qkv: tuple[Var, Var, Var], heads: Heads, windows: Windowed, at: Degrees) -> Var:
    """parallel.context_parallel.window.window_attention, which without cp is attend()."""
    q, k, v = qkv
    del qkv
    if at.cp > 1:
        keys = joined_columns(t, k, v)
        del k, v
        if windows.before is not None:
            keys = _fetched_before(t, keys, windows.before, at.group("cp"))
        k, v = ops.split(t, keys, (heads.kv * heads.dim,) * 2)
        del keys
    return fused(t, (q, k, v), heads, windows.attended, causal=True)


def _fetched_before(t: Tape, x: Var, rows: Rows, group: Group) -> Var:
    """Own rows and, by parallel.comm.fetch.Fetch, those before them, in the order of fragments."""
    own, width, item = x.rows, x.width, x.item
    size = float(max(rows.gives, rows.takes) * width * item)

    def back(g: Grads) -> Grads:
        into = t.new(own * width, item)
        t.message("all_to_all", group, size)
        return [into]

    node = t.node([x], back, [])
    came = t.new(rows.wanted * width, item)
    t.message("all_to_all", group, size)
    both = joined_parts(t, [x, t.result(node, came, rows.wanted, width, item)], own + rows.wanted)
    del came, x
    return indexed(t, both, both.rows)


def joined_columns(t: Tape, a: Var, b: Var) -> Var:
    """torch.cat or torch.stack of columns, whose backward gives views, copied out where they are needed."""
    node = t.node([a, b], lambda g: [g[0], g[0]], [])
    out = t.new(a.n + b.n, a.item)
    t.moves(2 * out.size)
    return t.result(node, out, a.rows, a.width + b.width, a.item)


def _crossing(t: Tape, qkv: tuple[Var, Var, Var], heads: Heads, load: TokenLoad, group: Group) -> Var:
    """parallel.context_parallel.attention._attend_split."""
    c = load.crossing
    assert c is not None
    found = outer(t, qkv, heads, c, group)
    rows = load.tokens - sum(c.own)
    if not rows:
        return found
    q, k, v = (rows_of(t, x, rows, c.runs) for x in qkv)
    del qkv
    return joined_parts(t, [found, fused(t, (q, k, v), heads, c.inner, causal=True)], load.tokens)


def _spread(t: Tape, x: Var, width: float) -> Var:
    n, item = x.n, x.item
    node = t.node([x], lambda g: [t.new(n, item)], [])
    return t.result(node, t.new(x.rows * width, item), x.rows, width, item)


def rotated(t: Tape, x: Var, angle: Storage, share: float) -> Var:
    """llm.attention.Rotation's turn: products with cosine and sine keep these, and no input."""
    wide = ops.to(t, x, t.acc)
    n, acc, item = x.n * share, t.acc, x.item
    whole = x.n
    saved = t.save(angle)
    parts = [t.new(n / 2, acc) for _ in range(4)]
    both = [t.new(n / 2, acc) for _ in range(2)]
    t.moves(*(3 * p.size for p in parts), *(3 * p.size for p in both))
    del parts
    joined = t.new(n, acc)
    t.moves(2 * joined.size)
    del both

    def back(g: Grads) -> Grads:
        parts = [t.new(n / 2, acc) for _ in range(4)]
        t.moves(*(3 * p.size for p in parts))
        return [t.new(whole, acc)]

    y = t.result(t.node([wide], back, saved), joined, x.rows, x.width * share, acc)
    del wide, joined
    out = ops.to(t, y, item)
    if share < 1:
        out = t.result(t.node([out], lambda g: [g[0]], []), t.new(whole, item), x.rows, x.width, item)
    return out


def fused(
    t: Tape, qkv: tuple[Var, Var, Var], heads: tuple[int, int, int], attended: Attended, *, causal: bool
) -> Var:
    """parallel.sequence.buckets.attend without limits: a call a bucket. heads: own, of keys, their width."""
    q, k, v = qkv
    del qkv
    if not attended.buckets:  # the graph stays whole: weights before it have gradients, of zero
        node = t.node([q, k, v], lambda g: [g[0]] * 3, [])
        return t.result(node, t.new(q.n, q.item), q.rows, q.width, q.item)
    if attended.one_batch:
        return _call(t, (q, k, v), heads, attended.buckets[0], causal)
    rows, n, item = q.rows, q.n, q.item
    out = t.var(q.rows, q.width)
    for b in attended.buckets:
        qb = indexed(t, q, b.n * b.queries)
        kb, vb = indexed(t, k, b.n * b.keys), indexed(t, v, b.n * b.keys)
        y = _call(t, (qb, kb, vb), heads, b, causal)
        del qb, kb, vb
        if b.real < b.n * b.queries:
            y = indexed(t, y, b.real)
        out = _placed(t, out, y, (rows, n, item))
    return out


def indexed(t: Tape, x: Var, rows: float) -> Var:
    """x[index]; its backward adds up rows in a new tensor."""
    n, item = x.n, x.item

    def back(g: Grads) -> Grads:
        out = t.new(n, item)
        t.moves(out.size, *(s.size for s in g if s))
        return [out]

    out = t.new(rows * x.width, item)
    t.moves(2 * out.size)
    return t.result(t.node([x], back, []), out, rows, x.width, item)


def _placed(t: Tape, out: Var, y: Var, whole: tuple[float, float, int]) -> Var:
    """out.index_copy(0, rows, y)."""
    rows, n, item = whole
    some, starts = y.n, out.edge is None

    def back(g: Grads) -> Grads:
        return [None if starts else t.new(n, item), t.new(some, item)]

    node = t.node([out, y], back, t.save(y.store))  # index_copy() keeps what it copies
    made = t.new(n, item)
    t.moves(2 * made.size, 2 * some * item)
    return t.result(node, made, rows, n / rows, item)


def _call(t: Tape, qkv: tuple[Var, Var, Var], heads: tuple[int, int, int], b: Bucket, causal: bool) -> Var:
    """One call of the fused kernel that an accelerator has: flash attention, or where there is a mask or
    another dtype than bfloat16 the one called efficient, which repeats shared heads."""
    (q, k, v), (own, kv, dim) = qkv, heads
    del qkv
    item = q.item
    flash = item == 2 and not b.window and (causal or not b.masked)
    if not flash and kv != own:
        k, v = (_spread(t, x, own * dim) for x in (k, v))
        kv = own
    nq, nk = b.n * b.queries * own * dim, b.n * b.keys * kv * dim
    bias = t.new(b.mask, item) if b.mask and (b.window or not causal) else None
    saved = t.save(q.store, k.store, v.store, bias)
    del bias
    logs = b.queries if flash else -(-b.queries // 32) * 32  # the other kernel aligns them
    out, log = t.new(nq, item), t.new(b.n * logs * own, 4)
    pairs = b.n * own * b.queries * b.keys
    shape = (b.n * own, b.queries, b.keys, dim)
    t.kernel("attention", shape, item, 4.0 * pairs * dim, (2 * nq + 2 * nk) * item)
    saved = t.save_made(saved, out, log)

    def back(g: Grads) -> Grads:
        grads: Grads = [t.new(nq, item), t.new(nk, item), t.new(nk, item)]
        t.kernel("attention", shape, item, 10.0 * pairs * dim, (4 * nq + 4 * nk) * item)
        return grads

    return t.result(t.node([q, k, v], back, saved), out, q.rows, own * dim, item)


def mlp(t: Tape, x: Var, cfg: LLMConfig, ffn: float, at: Degrees, name: str = "") -> Var:
    """llm.mlp.MLP of width ffn."""
    x = enter(t, x, at.axis)
    d, own = cfg.d_model, ffn / at.tp
    gate = linear(t, x, Weight(f"{name}gate", own, d, cfg.mlp_bias)) if cfg.mlp_gated else None
    y = activate(t, cfg, linear(t, x, Weight(f"{name}up", own, d, cfg.mlp_bias)), gate)
    y = leave(t, linear(t, y, Weight(f"{name}down", d, own)), at.axis)
    return bias_after(t, y, d) if cfg.mlp_bias else y


def activate(t: Tape, cfg: LLMConfig, up: Var, gate: Var | None) -> Var:
    """llm.mlp.activate."""
    x = up if gate is None else gate
    if cfg.activation == "clamped":
        y = ops.unary(t, ops.unary(t, x), passes=2)
    elif cfg.activation == "relu2":
        y = ops.squared_relu(t, x)
    elif cfg.activation == "silu":
        y = ops.silu(t, x)
    else:
        y = ops.unary(t, x)
    return y if gate is None else ops.mul(t, y, up)

"""The two ends of the language model, on sizes: embedding, loss and multi-token prediction."""

from __future__ import annotations

from llm.config import LLMConfig
from mm.predict.count import ops
from mm.predict.count.attention import indexed
from mm.predict.count.ops import enter, leave, narrowed
from mm.predict.count.sizes import Degrees
from mm.predict.count.tape import Storage, Tape, Var
from parallel.schedule.action import BACKWARD_WEIGHT

Grads = list[Storage | None]


def embed(t: Tape, cfg: LLMConfig, at: Degrees, tokens: int) -> Var:
    """LLM.embed_ids."""
    d, item, held = cfg.d_model, t.item, cfg.vocab_size / at.tp
    few = Var(t.new(0, item), tokens, 0, item)
    mask: Storage | None = None
    if at.tp > 1:
        row, mask = t.new(tokens, 8), t.new(tokens, 1)
        saved = t.save(row, mask)
    else:
        saved = t.save(few.store)
    out = t.new(tokens * d, item)
    t.moves(2 * out.size)
    split = at.tp > 1

    def back(g: Grads) -> Grads:
        masked = t.new(tokens * d, item) if split else None
        t.gradient("embed", held * d, item)
        t.moves(held * d * item, tokens * d * item)
        del masked
        return [None]

    if split:
        found, out = out, t.new(tokens * d, item)
        t.moves(2 * out.size)
        del found
    x = t.result(t.node([few], back, saved, weights=True), out, tokens, d, item)
    del out
    x = leave(t, x, at.axis)
    return x if cfg.embed_scale == 1 else ops.scale(t, x)


def enter_rows(t: Tape, x: Var, rows: float, *, learns: bool) -> Var:
    """index_copy() of encoder rows, whose gradients are kept apart. learns: whether they have any."""
    n, item, d = x.n, x.item, x.width

    def back(g: Grads) -> Grads:
        both = t.new(n, item)
        own = t.new(rows * d, item)
        t.moves(2 * both.size, 2 * own.size)
        t.kept_rows.append(own)
        return [both]

    out = t.new(n, item)
    t.moves(2 * out.size, 2 * rows * d * item)
    return t.result(t.node([x], back, [], learns=learns), out, x.rows, d, item)


def loss(t: Tape, x: Var, cfg: LLMConfig, at: Degrees, tokens: int, supervised: int, *, known: bool) -> Var:
    """LLM._loss of states x, to the loss of each token [tokens]. known: whether the rows with a loss are
    named, so that others are left out."""
    hidden = enter(t, x, at.axis)
    if known:
        hidden = indexed(t, hidden, supervised)
    y = _vocab_loss(t, hidden, cfg, at)
    del hidden
    if not known:
        return y
    n, acc = y.n, y.item
    saved = t.save(y.store)
    out = t.new(tokens, acc)
    return t.result(t.node([y], lambda g: [t.new(n, acc)], saved), out, tokens, 1, acc)


def _vocab_loss(t: Tape, hidden: Var, cfg: LLMConfig, at: Degrees) -> Var:
    """parallel.tensor_parallel.loss.vocab_loss."""
    rows, d, item, acc = int(hidden.rows), cfg.d_model, hidden.item, t.acc
    v, chunk, cap = cfg.vocab_size / at.tp, cfg.loss_chunk, cfg.logit_cap
    scaled = cfg.logit_scale != 1
    parts = [min(chunk, rows - k) for k in range(0, rows, chunk)] or [0]
    column, held = t.new(rows, 8), t.new(rows, 1)
    kept = [t.new(rows, acc) for _ in range(2)]
    exps: Storage | None = None
    for n in parts:
        x = _logits(t, n, (v, d), item, (scaled, cap is not None))
        if at.tp > 1 and n:
            t.message("all_reduce", at.group("tp"), n * acc)
            t.message("all_reduce", at.group("tp"), 2 * n * acc)
        t.moves(x.size, 2 * x.size, 2 * x.size, x.size)
        exps = x
        del x
    last = exps if cap is None else None
    del exps
    supervised = t.new(rows, 1)
    saved = t.save(hidden.store, column, held, kept[1], supervised, last)
    out = t.new(rows, acc)
    del column, held, kept, supervised, last
    learns = t.trains

    def back(g: Grads) -> Grads:
        d_hidden = t.new(rows * d, item)
        d_weight = t.new(v * d, acc) if learns else None
        x = d_logits = narrow = None
        for k, n in enumerate(parts):
            if k + 1 == len(parts) and cap is None:
                d_logits = t.new(n * v, acc)
                t.moves(2 * d_logits.size)
            else:
                x = _logits(t, n, (v, d), item, (scaled, cap is not None))
                d_logits = t.new(n * v, acc)
                t.moves(*[2 * d_logits.size] * (3 + 3 * (cap is not None) + scaled))
            narrow = narrowed(t, d_logits, n * v, item)
            t.product(n, d, v, item)
            part = t.new(n * d, item)
            t.moves(2 * part.size)
            del part
            if d_weight is not None:
                kind, t.kind = t.kind, BACKWARD_WEIGHT
                t.product(v, d, n, item)
                t.kind = kind
                part = t.new(v * d, item)
                t.moves(2 * d_weight.size, part.size)
                del part
        if d_weight is not None:
            t.gradient("embed" if cfg.tied else "head", v * d, item)
        del x, d_logits, narrow
        return [d_hidden]

    return t.result(t.node([hidden], back, saved, weights=True), out, rows, 1, acc)


def _logits(t: Tape, n: int, weight: tuple[float, float], item: int, how: tuple[bool, bool]) -> Storage:
    v, d = weight
    scaled, capped = how
    t.product(n, v, d, item)
    narrow = t.new(n * v, item)
    out = narrow if item == t.acc else t.new(n * v, t.acc)
    t.moves(narrow.size, out.size)
    del narrow
    if scaled:
        found, out = out, t.new(n * v, t.acc)
        t.moves(2 * out.size)
        del found
    if capped:
        for _ in range(3):
            found, out = out, t.new(n * v, t.acc)
            t.moves(2 * out.size)
            del found
    return out

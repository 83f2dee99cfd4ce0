"""Mixtures of experts of the language model, on sizes.

Row r of a rank's tokens goes to expert r mod E, and all ranks have as many tokens as the one that is counted.
"""

from __future__ import annotations

from llm.config import LLMConfig
from mm.predict.count import ops
from mm.predict.count.attention import activate, mlp
from mm.predict.count.gathered import gather_combine, gather_dispatch
from mm.predict.count.ops import Weight, linear
from mm.predict.count.sizes import Degrees, TokenLoad
from mm.predict.count.tape import Storage, Tape, Var
from parallel.schedule.action import BACKWARD_WEIGHT

Grads = list[Storage | None]


Choice = list[Storage]  # order of experts by score, then the route; empty before it is made


def moe(
    t: Tape,
    x: Var,
    cfg: LLMConfig,
    at: Degrees,
    load: TokenLoad,
    recompute: frozenset[str],
    *,
    choice: Choice,
) -> Var:
    """llm.moe.MoE. choice: filled where it is empty, followed where the layer is computed again."""
    tokens = ops.to(t, x, x.item)
    share = x if at.sequence_parallel else ops.share_of(t, x, at.axis)
    width, real = share.rows, load.routed
    tokens = ops.first_rows(t, share, real)
    del share
    wide = None if cfg.dispatcher == "all_to_all" or at.ep == 1 else load.widest or real
    weight = _routing(t, tokens, cfg, at, wide, choice)
    rows = tokens
    if cfg.latent is not None:
        rows = linear(t, tokens, Weight("latent_in", cfg.latent, cfg.d_model))
    del tokens
    weight = ops.scale(t, weight)
    y = _routed(t, rows, weight, (cfg, choice[1:], wide), at, "moe_act" in recompute)
    del rows, weight
    if cfg.latent is not None:
        y = linear(t, y, Weight("latent_out", cfg.d_model, cfg.latent))
    y = ops.padded(t, y, width)
    if not at.sequence_parallel:
        y = ops.join_shares(t, y, at.axis)
    if cfg.shared_ffn:
        shared = t.again("mlp" in recompute, lambda z: mlp(t, z, cfg, cfg.shared_ffn, at, "shared."), x)
        y = ops.add(t, y, shared)
    return y


def _routing(t: Tape, tokens: Var, cfg: LLMConfig, at: Degrees, most: int | None, choice: Choice) -> Var:
    """The weights [n, k] of the chosen experts. most: tokens to which each rank of ep pads its own, None
    where rows go to their experts alone."""
    n, e, k, acc = tokens.rows, cfg.n_experts, cfg.top_k, t.acc
    wide = ops.to(t, tokens, acc)
    logits = linear(t, wide, Weight("router", e, cfg.d_model, adapts=False), item=acc)
    del wide
    score = ops.unary(t, logits, keeps="output")
    del logits
    if not choice:
        choice += _chosen(t, n, cfg, at, most)
    saved = t.save(choice[0])

    def back(g: Grads) -> Grads:
        return [t.new(n * e, acc)]

    y = t.result(t.node([score], back, saved), t.new(n * k, acc), n, k, acc)
    del score
    if cfg.norm_top_k:
        total = t.new(n, acc)
        saved = t.save(y.store, total)
        node = t.node([y], lambda g: [t.new(n * k, acc)], saved)
        y = t.result(node, t.new(n * k, acc), n, k, acc)
    return y


def _chosen(t: Tape, n: float, cfg: LLMConfig, at: Degrees, most: int | None) -> Choice:
    """The choice of experts by n tokens, and the route of their rows: rows by expert; where rows go to other
    ranks, their order and its inverse; where etp ranks meet, the order of all."""
    e, k, acc = cfg.n_experts, cfg.top_k, t.acc
    biased = t.new(n * e, acc)
    values, order = t.new(n * e, acc), t.new(n * e, 8)
    t.moves(biased.size, 2 * values.size, order.size)
    del biased, values
    # The chosen are a view of the order of all experts, which so lives as long.
    out = [order, t.new(n * k if most is None else at.ep * most * k, 8)]
    t.moves(4 * out[1].size)
    came = at.ep * own_rows(n * k, e, at)
    if at.ep > 1 and most is None:
        t.message("all_to_all", at.group("ep"), 8.0 * e)
        out += [t.new(came, 8), t.new(came, 8)]
    elif at.ep > 1:
        t.message("all_gather", at.group("ep"), out[1].size)
    if at.etp > 1:
        t.message("all_gather", at.group("etp"), 8.0 * e / at.ep * at.etp)
        out.append(t.new(at.etp * came, 8))
    return out


def _routed(
    t: Tape, x: Var, weight: Var, how: tuple[LLMConfig, Choice, int | None], at: Degrees, again: bool
) -> Var:
    """MoE._routed. how: the config, the route, which is kept, and _routing()'s `most`."""
    cfg, route, wide = how
    del how
    came = at.ep * own_rows(x.rows * cfg.top_k, cfg.n_experts, at)
    if wide is not None:
        rows = gather_dispatch(t, x, route, (wide, cfg.top_k, came), at)
        del x, route
        return gather_combine(t, _expert_rows(t, rows, cfg, at, again), weight, wide, at)
    return _all_to_all(t, x, weight, (cfg, route, came), at, again)


def _all_to_all(
    t: Tape, x: Var, weight: Var, how: tuple[LLMConfig, Choice, float], at: Degrees, again: bool
) -> Var:
    cfg, route, came = how
    del how
    n, w, item, k = x.rows, x.width, x.item, cfg.top_k
    m = n * k  # rows sent

    def back_rows(g: Grads) -> Grads:
        made = t.new(m * w, item)
        t.moves(2 * made.size)
        out = t.new(n * w, item)
        t.moves(made.size, out.size)
        return [out]

    index = t.new(m, 8)
    rows = t.result(t.node([x], back_rows, t.save(*route)), t.new(m * w, item), m, w, item)
    t.moves(2 * m * w * item)
    del index, x, route
    if at.ep > 1:
        rows = _exchanged(t, rows, came, at)
        rows = ops.copy(t, rows)
    y = _expert_rows(t, rows, cfg, at, again)
    del rows
    if at.ep > 1:
        y = ops.copy(t, y)
        y = _exchanged(t, y, m, at)
    return _weighted(t, y, weight, (n, k))


def _expert_rows(t: Tape, rows: Var, cfg: LLMConfig, at: Degrees, again: bool) -> Var:
    """MoE._expert_rows."""
    w = rows.width
    if at.etp > 1:
        rows = _met(t, rows, at)
    experts = cfg.n_experts / at.ep
    f = cfg.expert_ffn / at.etp

    def act_down(up: Var, gate: Var | None) -> Var:
        return grouped(t, activate(t, cfg, up, gate), Weight("down", w, f), experts)

    up = grouped(t, rows, Weight("up", f, w), experts)
    gate = grouped(t, rows, Weight("gate", f, w), experts) if cfg.mlp_gated else None
    y = t.again(again, act_down, up, gate)
    del up, gate, rows
    return _summed(t, y, at) if at.etp > 1 else y


def own_rows(rows: float, experts: int, at: Degrees) -> float:
    """Of a rank's rows, those that go to the experts of the rank that is counted."""
    if at.ep_rank is None:
        return rows / at.ep
    each, rest = divmod(rows, experts)
    own = experts // at.ep
    return each * own + min(max(rest - at.ep_rank * own, 0), own)


def _exchanged(t: Tape, x: Var, rows: float, at: Degrees) -> Var:
    """An all-to-all that brings so many rows."""
    n, item, group = x.n, x.item, at.group("ep")
    size = max(n, rows * x.width) * item

    def back(g: Grads) -> Grads:
        out = t.new(n, item)
        t.message("all_to_all", group, size)
        return [out]

    node = t.node([x], back, [])
    out = t.new(rows * x.width, item)
    t.message("all_to_all", group, size)
    return t.result(node, out, rows, x.width, item)


def _meet(t: Tape, n: float, item: int, at: Degrees) -> Storage:
    """gather_rows() of n elements of one rank."""
    leaving = t.new(at.etp * n, item)
    arriving = t.new(at.etp * n, item)
    t.message("all_to_all", at.group("etp"), arriving.size)
    out = t.new(at.etp * n, item)
    t.moves(2 * out.size, leaving.size)
    return out


def _returned(t: Tape, n: float, item: int, at: Degrees) -> Storage:
    """reduce_rows() to n elements of one rank."""
    by_rank = t.new(at.etp * n, item)
    back = t.new(at.etp * n, item)
    t.message("all_to_all", at.group("etp"), back.size)
    del by_rank
    out = t.new(n, item)
    t.moves(2 * back.size, out.size)
    return out


def _met(t: Tape, x: Var, at: Degrees) -> Var:
    n, item = x.n, x.item
    node = t.node([x], lambda g: [_returned(t, n, item, at)], [])
    return t.result(node, _meet(t, n, item, at), at.etp * x.rows, x.width, item)


def _summed(t: Tape, x: Var, at: Degrees) -> Var:
    n, item = x.n / at.etp, x.item
    node = t.node([x], lambda g: [_meet(t, n, item, at)], [])
    return t.result(node, _returned(t, n, item, at), x.rows / at.etp, x.width, item)


def grouped(t: Tape, x: Var, w: Weight, experts: float) -> Var:
    """One grouped product of rows with the weights [out, into] of so many experts."""
    rows, item = x.rows, x.item
    saved = t.save(x.store if t.trains else None)
    out = t.new(rows * w.out, item)
    size = (rows * (w.out + w.into) + experts * w.out * w.into) * item
    flops = 2.0 * rows * w.out * w.into
    t.kernel("grouped", (experts, rows, w.out, w.into), item, flops, size)

    def back(g: Grads) -> Grads:
        t.kernel("grouped", (experts, rows, w.into, w.out), item, flops, size)
        d_x = t.new(rows * w.into, item)
        if t.trains:
            kind, t.kind = t.kind, BACKWARD_WEIGHT
            t.kernel("grouped", (experts, rows, w.out, w.into), item, flops, size)
            t.kind = kind
            if t.halves:
                t.later.append((g[0], *saved) if isinstance(saved, list) else tuple(g))
            else:
                t.gradient(w.name, experts * w.out * w.into, item, expert=True)
        return [d_x]

    return t.result(t.node([x], back, saved, weights=True), out, rows, w.out, item)


def _weighted(t: Tape, rows: Var, weight: Var, shape: tuple[float, float]) -> Var:
    """parallel.expert_parallel.all_to_all._WeightedSum: rows [n k, w] to [n, w]."""
    n, k = shape
    size, w, item, acc = rows.n, rows.width, rows.item, weight.item
    by_choice = t.new(size, item)
    narrow = t.new(n * k, item)
    t.moves(2 * by_choice.size, 2 * by_choice.size)
    out = t.new(n * w, item)
    t.moves(by_choice.size, out.size)
    del by_choice, narrow
    saved = t.save(rows.store, weight.store)

    def back(g: Grads) -> Grads:
        grad = t.new(size, item)
        t.moves(2 * grad.size)
        both = t.new(size, item)
        t.moves(3 * both.size)
        d_weight = t.new(n * k, acc)
        del both
        d_rows = t.new(size, item)
        t.moves(2 * d_rows.size)
        return [d_rows, d_weight]

    return t.result(t.node([rows, weight], back, saved), out, n, w, item)

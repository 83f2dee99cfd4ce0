"""Layers and ends of the language model, each counted alone and remembered by all that determines it."""

from __future__ import annotations

from functools import lru_cache

from llm.config import LLMConfig
from mm.predict.count import ops
from mm.predict.count.attention import attention, joined_columns, mlp
from mm.predict.count.head import embed, enter_rows, loss
from mm.predict.count.mamba import mamba
from mm.predict.count.moe import Choice, moe
from mm.predict.count.ops import Weight, linear
from mm.predict.count.pieces import How, Piece, piece
from mm.predict.count.sizes import Degrees, TokenLoad
from mm.predict.count.tape import Tape, Var


def kept_tokens(at: Degrees, load: TokenLoad) -> float:
    """Tokens that a rank holds between blocks."""
    return load.tokens / (at.tp if at.sequence_parallel else 1)


@lru_cache(maxsize=1 << 14)
def like(cfg: LLMConfig, layer: int) -> int | None:
    """The first attention layer that computes as this one does; None where it is as all others."""
    if cfg.window is None and not cfg.rope_skips:
        return None
    every = (i for i, symbol in enumerate(cfg.symbols) if symbol == "*")
    what = cfg.window_of(layer), cfg.rope_of(layer)
    return next(i for i in every if (cfg.window_of(i), cfg.rope_of(i)) == what)


@lru_cache(maxsize=1 << 14)
def layer_counts(
    cfg: LLMConfig, symbol: str, layer: int | None, at: Degrees, load: TokenLoad, how: How
) -> Piece:
    """One layer of a kind. layer: an index, of like(), or None."""

    def enters(t: Tape) -> Var:
        return t.var(kept_tokens(at, load), cfg.d_model)

    def compute(t: Tape, x: Var | None) -> Var:
        assert x is not None
        return run_layer(t, x, (cfg, symbol, layer), at, load, how.recompute)

    return piece(how, enters, compute)


Kind = tuple[LLMConfig, str, int | None]


def run_layer(t: Tape, x: Var, kind: Kind, at: Degrees, load: TokenLoad, parts: frozenset[str]) -> Var:
    """llm.layer.run_layer."""

    choice: Choice = []  # of experts, which is made once

    def layer(x: Var) -> Var:
        return _layer(t, x, kind, at, load, parts, choice=choice)

    return t.again("full" in parts, layer, x)


def _layer(
    t: Tape, x: Var, kind: Kind, at: Degrees, load: TokenLoad, parts: frozenset[str], *, choice: Choice
) -> Var:
    cfg, symbol, layer = kind

    def norm(x: Var) -> Var:
        return ops.rms_norm(t, x, "norm")

    h = x if cfg.norms == "after" else t.again("norm" in parts, norm, x)
    if symbol == "E":
        y = moe(t, h, cfg, at, load, parts, choice=choice)
    elif symbol == "M":
        y = mamba(t, h, cfg, at, load, parts)
    elif symbol == "*":
        y = attention(t, h, cfg, at, load, layer, again="attention_core" in parts)
    else:
        y = t.again("mlp" in parts, lambda h: mlp(t, h, cfg, cfg.mlp_ffn, at), h)
    if cfg.norms != "before":
        y = t.again("norm" in parts, lambda y: ops.rms_norm(t, y, "norm_after"), y)
    return ops.add(t, x, y)


@lru_cache(maxsize=1 << 12)
def first_counts(cfg: LLMConfig, at: Degrees, tokens: int, rows: tuple[int, ...], how: How) -> Piece:
    """The embedding of tokens, and rows of encoders that enter there."""

    def compute(t: Tape, _: Var | None) -> Var:
        x = embed(t, cfg, at, tokens)
        for n in rows:
            x = enter_rows(t, x, n, learns=how.below)
        return x

    return piece(how, None, compute)


@lru_cache(maxsize=1 << 12)
def last_counts(cfg: LLMConfig, at: Degrees, load: TokenLoad, how: How, *, known: bool = True) -> Piece:
    """The last norm, multi-token prediction and the loss."""

    def enters(t: Tape) -> Var:
        return t.var(kept_tokens(at, load), cfg.d_model)

    def compute(t: Tape, x: Var | None) -> Var:
        assert x is not None
        x = ops.rms_norm(t, x, "norm")
        if cfg.mtp_layers and (how.trains or how.low is not None):  # adapters learn from it too
            x = _multi_token(t, x, cfg, at, load, (how.recompute, known))
        return loss(t, x, cfg, at, load.tokens, load.supervised[0], known=known)

    return piece(how, enters, compute)


def _multi_token(
    t: Tape, x: Var, cfg: LLMConfig, at: Degrees, load: TokenLoad, how: tuple[frozenset[str], bool]
) -> Var:
    """LLM._with_mtp_loss."""
    parts, known = how
    states, totals = x, []
    d = cfg.d_model
    for k in range(cfg.mtp_layers):
        embedded = ops.rms_norm(t, embed(t, cfg, at, load.tokens), "mtp.embed_norm")
        hidden = ops.rms_norm(t, states, "mtp.hidden_norm")
        both = joined_columns(t, embedded, hidden)
        del embedded, hidden
        y = linear(t, both, Weight("mtp.join", d, 2 * d))
        del both
        for i, symbol in enumerate(cfg.mtp_pattern):
            y = run_layer(t, y, (cfg, symbol, None), at, load, parts)
            del i
        states = ops.rms_norm(t, y, "mtp.norm")
        del y
        totals.append(loss(t, states, cfg, at, load.tokens, load.supervised[k + 1], known=known))
    return _attached(t, x, totals)


def _attached(t: Tape, x: Var, losses: list[Var]) -> Var:
    """llm.balance.attach of sums of losses."""
    sizes = [y.n for y in losses]
    acc = t.acc
    node = t.node([x, *losses], lambda g: [g[0], *(t.new(n, acc) for n in sizes)], [])
    return t.result(node, x.store, x.rows, x.width, x.item)

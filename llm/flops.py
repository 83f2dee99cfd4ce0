"""Parameters and forward FLOPs of a language model, from its config alone. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.config import LLMConfig


def layer_params(cfg: LLMConfig, symbol: str) -> tuple[int, int]:
    """(parameters held, parameters used per token) of one layer, its norm included."""
    d = cfg.d_model
    n = 2 * d if cfg.norms == "both" else d  # norms
    if symbol == "M":
        di, bc = cfg.mamba_inner, 2 * cfg.mamba_groups * cfg.mamba_state
        n += d * (2 * di + bc + cfg.mamba_heads) + (di + bc) * (cfg.conv_kernel + 1)
        n += 3 * cfg.mamba_heads + di + di * d
    elif symbol == "*" and cfg.kv_rank is not None:
        n += _latent_params(cfg, cfg.kv_rank)
    elif symbol == "*":
        heads = 2 * cfg.n_heads + 2 * cfg.n_kv_heads
        n += d * cfg.head_dim * heads
        if cfg.attention_bias or cfg.qkv_bias:
            n += cfg.head_dim * (cfg.n_heads + 2 * cfg.n_kv_heads) + d * cfg.attention_bias
        n += cfg.n_heads * cfg.attention_sinks
        if cfg.qk_norm != "none":
            n += cfg.head_dim * (2 if cfg.qk_norm == "head" else cfg.n_heads + cfg.n_kv_heads)
    elif symbol == "-":
        n += _mlp_params(cfg, cfg.mlp_ffn)
    else:
        n += cfg.n_experts * (d + cfg.moe_bias) + (_mlp_params(cfg, cfg.shared_ffn) if cfg.shared_ffn else 0)
        n += 2 * d * cfg.latent if cfg.latent else 0
        one = (2 + cfg.mlp_gated) * cfg.expert_width * cfg.expert_ffn
        one += cfg.moe_bias * ((1 + cfg.mlp_gated) * cfg.expert_ffn + cfg.expert_width)
        return n + cfg.n_experts * one, n + cfg.top_k * one
    return n, n


def _latent_params(cfg: LLMConfig, rank: int) -> int:
    """Of multi-head latent attention, without the norm before it; rank: kv_rank."""
    queries, kept = cfg.n_heads * cfg.head_dim, rank + cfg.rope_width
    n = cfg.d_model * kept + rank + rank * cfg.n_heads * (cfg.head_dim - cfg.rope_width + cfg.value_dim)
    if cfg.q_rank is None:
        n += cfg.d_model * queries
    else:
        n += cfg.q_rank * (cfg.d_model + 1 + queries)
    n += cfg.n_heads * cfg.value_dim * cfg.d_model
    return n + cfg.attention_bias * (kept + (cfg.q_rank or 0) + cfg.d_model)


def _mlp_params(cfg: LLMConfig, ffn: int) -> int:
    matrices = 2 + cfg.mlp_gated
    return matrices * cfg.d_model * ffn + cfg.mlp_bias * ((matrices - 1) * ffn + cfg.d_model)


def mtp_params(cfg: LLMConfig) -> int:
    """Parameters of the stored block of multi-token prediction, 0 without one."""
    if not cfg.mtp_layers:
        return 0
    own = 2 * cfg.d_model * cfg.d_model + 3 * cfg.d_model
    return own + sum(layer_params(cfg, s)[0] for s in cfg.mtp_pattern)


def param_count(cfg: LLMConfig) -> tuple[int, int]:
    """(total, active per token) parameters, embedding and head included.

    The block of multi-token prediction counts in the total only: the next token does not need it.
    """
    outside = (1 if cfg.tied else 2) * cfg.vocab_size * cfg.d_model + cfg.d_model
    layers = [layer_params(cfg, s) for s in cfg.symbols]
    return outside + sum(t for t, _ in layers) + mtp_params(cfg), outside + sum(a for _, a in layers)


def layer_flops(cfg: LLMConfig, symbol: str, lengths: Sequence[int], window: int | None = None) -> float:
    """Forward FLOPs of one layer over packed documents of these lengths, in tokens.

    Counts matrix products, causal attention and the scan. window: of an attention layer.
    """
    tokens = float(sum(lengths))
    out = 2.0 * tokens * layer_params(cfg, symbol)[1]
    if symbol == "*":
        # Scores and values, each over the pairs of a query and a key that it sees.
        out += sum(_pair_flops(cfg) * pairs(n, window) for n in lengths)
    elif symbol == "M":
        out += tokens * _scan_flops(cfg)
    return out


def _scan_flops(cfg: LLMConfig) -> float:
    """FLOPs of the scan of one layer, a token."""
    q, heads = cfg.chunk, cfg.mamba_heads
    within = q * (cfg.mamba_groups * cfg.mamba_state + heads * cfg.mamba_head_dim)
    across = 2 * heads * cfg.mamba_head_dim * cfg.mamba_state
    return 2.0 * (within + across)


def pairs(n: int, window: int | None) -> float:
    """Pairs of a token and one that it sees in a document of n tokens: half of n x n, or a band of it."""
    seen = n if window is None else min(n, window)
    return seen * (n - seen / 2.0)


def _pair_flops(cfg: LLMConfig) -> float:
    """FLOPs of a query's score of a key and of its share of the value, in all heads."""
    return 2.0 * cfg.n_heads * (cfg.head_dim + cfg.value_dim)


def layer_costs(cfg: LLMConfig, lengths: Sequence[int]) -> tuple[float, ...]:
    """Forward FLOPs of each layer, by which layers are partitioned; head_flops() is the work after them."""
    kinds = [(symbol, cfg.window_of(i)) for i, symbol in enumerate(cfg.symbols)]
    by_kind = {kind: layer_flops(cfg, kind[0], lengths, kind[1]) for kind in set(kinds)}
    return tuple(by_kind[kind] for kind in kinds)


def head_flops(cfg: LLMConfig, lengths: Sequence[int], supervised: int | None = None) -> float:
    """Forward FLOPs after the layers: head and loss of `supervised` tokens (None: all), and multi-token
    prediction over all tokens."""
    tokens = float(sum(lengths))
    head = 2.0 * (tokens if supervised is None else supervised) * cfg.vocab_size * cfg.d_model
    block = 4.0 * tokens * cfg.d_model * cfg.d_model
    block += sum(layer_flops(cfg, s, lengths, cfg.window_of(None)) for s in cfg.mtp_pattern)
    return head + cfg.mtp_layers * (head + block)


def flops(cfg: LLMConfig, lengths: Sequence[int], supervised: int | None = None) -> float:
    """Forward FLOPs of packed documents of these lengths in a training step; supervised: as in head_flops."""
    return sum(layer_costs(cfg, lengths)) + head_flops(cfg, lengths, supervised)


class DocumentCost(NamedTuple):
    """flops() of one document: FLOPs a token, a squared token, a supervised token, and a pair of tokens that
    see each other under the window."""

    token: float
    square: float
    supervised: float
    pair: float = 0.0
    window: int = 0

    def of(self, lengths: NDArray[np.int64], supervised: NDArray[np.int64]) -> NDArray[np.float64]:
        """Forward FLOPs of each document, [n]. lengths, supervised: in tokens, [n]."""
        n = lengths.astype(np.float64)
        seen = np.minimum(n, self.window)
        inside = self.pair * seen * (n - seen / 2.0)
        return (self.token + self.square * n) * n + inside + self.supervised * supervised


def document_cost(cfg: LLMConfig) -> DocumentCost:
    """The cost of a document of this model. Without a window flops() is of degree two in a document's length
    and of degree one in its supervised tokens, so three of its values determine it."""
    every = replace(cfg, window=None, window_layers=None, window_rope_theta=None)
    one, two = flops(every, [1], 0), flops(every, [2], 0)
    square = (two - 2.0 * one) / 2.0
    pair = 0.0
    if cfg.window is not None:
        inside = [s == "*" and cfg.window_of(i) is not None for i, s in enumerate(cfg.symbols)]
        again = cfg.mtp_layers * cfg.mtp_pattern.count("*") * (cfg.window_of(None) is not None)
        pair = _pair_flops(cfg) * (sum(inside) + again)
    return DocumentCost(one - square, square - pair / 2.0, flops(cfg, [0], 1), pair, cfg.window or 0)


def weightless_cost(cfg: LLMConfig) -> DocumentCost:
    """The part of document_cost() without weights: scores and values of attention, and the scan."""
    scans = cfg.symbols.count("M") + cfg.mtp_layers * cfg.mtp_pattern.count("M")
    return document_cost(cfg)._replace(token=scans * _scan_flops(cfg), supervised=0.0)

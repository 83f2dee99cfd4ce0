"""Which models are possible, also under the degrees of a layout. Pure."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict
from typing import Literal, get_args, get_origin, get_type_hints

from llm.config import KINDS, LLMConfig
from llm.rotary import check_axes, check_scaling
from parallel.topology.layout import Unfit, check_divides, nearest

# Integers that may be 0, which then means "none".
MAY_BE_ZERO = ("mtp_layers", "shared_ffn")
# Numbers, some of which may be None, that are more than 0.
ABOVE_ZERO = (
    *("routed_scale", "norm_eps", "init_std", "capacity", "embed_scale", "branch_scale", "logit_scale"),
    *("rope_theta", "window_rope_theta", "attention_scale", "attention_cap", "logit_cap"),
)


def check(cfg: LLMConfig, tp: int = 1, ep: int = 1, etp: int = 1) -> None:
    """Raise ValueError for a model that is impossible, or that the degrees tp, ep and etp do not divide.

    The message names values that work.
    """
    _check_pattern("pattern", cfg.pattern)
    if cfg.mtp_layers:
        _check_pattern("mtp_pattern", cfg.mtp_pattern)
    _check_choices(cfg)
    _check_numbers(cfg)
    if cfg.activation == "clamped" and not cfg.mlp_gated:
        raise Unfit("model.llm.activation=clamped needs mlp_gated", [{"mlp_gated": True}], "llm")
    _check_layers(cfg)
    _check_attention(cfg)
    _check_routing(cfg)
    # tp need not divide key/value heads and groups: more ranks share them (parallel.tensor_parallel.heads).
    counts = {"vocab_size": cfg.vocab_size}
    if "*" in cfg.kinds:
        counts["n_heads"] = cfg.n_heads
    if "M" in cfg.kinds:
        counts["mamba_heads"] = cfg.mamba_heads
    if "-" in cfg.kinds:
        counts["mlp_ffn"] = cfg.mlp_ffn
    if "E" in cfg.kinds:
        if cfg.shared_ffn:
            counts["shared_ffn"] = cfg.shared_ffn
        check_divides("model.llm.n_experts", cfg.n_experts, "ep", ep, "llm")
        check_divides("model.llm.expert_ffn", cfg.expert_ffn, "etp", etp, "llm")
        if cfg.moe_bias:
            check_divides("model.llm.latent or d_model", cfg.expert_width, "etp", etp, "llm")
    for what, n in counts.items():
        if n % tp:
            # A proposed degree must divide all of the counts, not only the first that fails.
            works = [{"tp": k} for k in nearest(tp, math.gcd(*counts.values()))]
            raise Unfit(f"model.llm.{what} is {n}, which does not divide by tp={tp}", works, "llm")
    for degree, d in (("ep", ep), ("etp", etp)):
        if d > 1 and "E" not in cfg.kinds:
            why = f"layout.llm.{degree}={d} needs an E layer in model.llm.pattern, given {cfg.pattern!r}"
            raise Unfit(why, [{degree: 1}], "llm")


def _check_pattern(what: str, pattern: str) -> None:
    if not pattern:
        raise ValueError(f"model.llm.{what} is empty; needed: one symbol a layer of M, E, * and -")
    for i, symbol in enumerate(pattern):
        if symbol not in KINDS and not (symbol == "|" and what == "pattern"):
            known = ", ".join(f"{k} ({v})" for k, v in KINDS.items())
            layer = i - pattern[:i].count("|")
            raise ValueError(
                f"model.llm.{what} has {symbol!r} at layer {layer} of {pattern!r}; known: {known}"
            )
    if "" in pattern.split("|"):
        works = "|".join(part for part in pattern.split("|") if part)
        raise Unfit(
            f"model.llm.{what} {pattern!r} has a | with no layer on one side; needed: at least one layer a "
            "stage",
            [{what: works}] if works else (),
            "llm",
        )


def _check_choices(cfg: LLMConfig) -> None:
    for what, kind in get_type_hints(LLMConfig).items():
        value, known = getattr(cfg, what), get_args(kind)
        if get_origin(kind) is Literal and value not in known:
            near = difflib.get_close_matches(str(value), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"model.llm.{what} is {value!r}; {hint}")


def _check_numbers(cfg: LLMConfig) -> None:
    for what, value in asdict(cfg).items():
        if type(value) is int and value < (what not in MAY_BE_ZERO):
            least = 0 if what in MAY_BE_ZERO else 1
            raise ValueError(f"model.llm.{what} is {value}; needed: at least {least}")
    for what in ABOVE_ZERO:
        value = getattr(cfg, what)
        if value is not None and value <= 0:
            raise ValueError(f"model.llm.{what} is {value}; needed: more than 0")
    for what in ("expert_bias_rate", "aux_weight", "z_weight", "mtp_weight"):
        if getattr(cfg, what) < 0:
            raise ValueError(f"model.llm.{what} is {getattr(cfg, what)}; needed: 0 (off) or more")
    if cfg.latent is not None and cfg.latent < 1:
        raise ValueError(f"model.llm.latent is {cfg.latent}; needed: at least 1, or null for d_model")
    for many, few in (("n_heads", "n_kv_heads"), ("mamba_heads", "mamba_groups")):
        n, d = getattr(cfg, many), getattr(cfg, few)
        if n % d:
            works = [{few: k} for k in nearest(d, n)]
            raise Unfit(f"model.llm.{many}={n} is no multiple of {few}={d}", works, "llm")


def _check_layers(cfg: LLMConfig) -> None:
    """Refuse indices of layers that the pattern does not have, or not of the kind that an option is of."""
    for layer in cfg.level_layers:
        if not 0 <= layer < len(cfg.symbols):
            raise ValueError(
                f"model.llm.level_layers has {layer}; needed: a layer's index, 0 to {len(cfg.symbols) - 1}"
            )
    attention = [i for i, symbol in enumerate(cfg.symbols) if symbol == "*"]
    for what in ("rope_skips", "window_layers"):
        for layer in getattr(cfg, what) or ():
            if layer not in attention:
                known = ", ".join(map(str, attention)) or "none"
                raise ValueError(
                    f"model.llm.{what} has {layer}; needed: the index of an attention layer of "
                    f"{cfg.pattern!r}: {known}"
                )


def _check_attention(cfg: LLMConfig) -> None:
    """Refuse options of attention that contradict each other, or that would have no effect."""
    if cfg.attention_bias and cfg.qkv_bias:
        why = "model.llm.attention_bias and qkv_bias are both true; attention_bias has the biases of both"
        raise Unfit(why, [{"qkv_bias": False}, {"attention_bias": False}], "llm")
    for what, none in {"window_layers": None, "window_rope_theta": None}.items():
        if cfg.window is None and getattr(cfg, what) != none:
            why = f"model.llm.{what} without window would have no effect; needed: a window, or none of it"
            raise Unfit(why, [{what: none}], "llm")
    if cfg.rope_theta is None and cfg.rope_scaling is not None:
        raise ValueError("model.llm.rope_scaling without rope_theta; needed: rope_theta, such as 10000")
    if cfg.rope_theta is None and cfg.window_rope_theta is None:
        for what, unset in {"rope_share": 1.0, "rope_skips": (), "rope_axes": None}.items():
            if getattr(cfg, what) != unset:
                raise ValueError(f"model.llm.{what} without rope_theta; needed: rope_theta, such as 10000")
        return
    if not 0 < cfg.rope_share <= 1:
        raise ValueError(f"model.llm.rope_share is {cfg.rope_share}; needed: more than 0, at most 1")
    if cfg.rope_share == 1 and cfg.head_dim % 2:
        even = [{"head_dim": n} for n in (cfg.head_dim - 1, cfg.head_dim + 1) if n]
        raise Unfit(f"model.llm.head_dim={cfg.head_dim} with rope_theta; needed: even", even, "llm")
    if cfg.rope_width % 2 or not cfg.rope_width:
        raise ValueError(
            f"model.llm.rope_share={cfg.rope_share} of head_dim={cfg.head_dim} is {cfg.rope_width} features; "
            "needed: an even number, at least 2"
        )
    if cfg.rope_scaling is not None:
        check_scaling(cfg.rope_scaling, cfg.rope_width // 2)
    if cfg.rope_axes is not None:
        check_axes(cfg.rope_axes, cfg.rope_width // 2)


def _check_routing(cfg: LLMConfig) -> None:
    if cfg.top_k > cfg.n_experts:
        why = f"model.llm.top_k={cfg.top_k} of n_experts={cfg.n_experts}; needed: at most all of them"
        raise Unfit(why, [{"top_k": cfg.n_experts}], "llm")
    groups, best = cfg.expert_groups, cfg.top_groups
    if cfg.n_experts % groups:
        works = [{"expert_groups": k} for k in nearest(groups, cfg.n_experts)]
        why = f"model.llm.n_experts={cfg.n_experts} is no multiple of expert_groups={groups}"
        raise Unfit(why, works, "llm")
    if best > groups:
        why = f"model.llm.top_groups={best} of expert_groups={groups}; needed: at most all of them"
        raise Unfit(why, [{"top_groups": groups}], "llm")
    reach = best * cfg.n_experts // groups
    if cfg.top_k > reach:
        raise Unfit(
            f"model.llm.top_k={cfg.top_k} experts from top_groups={best} of {groups} groups, which hold "
            f"{reach}; needed: at most {reach}",
            [{"top_k": reach}],
            "llm",
        )
    if cfg.pad_experts and cfg.dispatcher != "all_to_all":
        why = "model.llm.pad_experts needs dispatcher=all_to_all, given all_gather"
        raise Unfit(why, [{"dispatcher": "all_to_all"}], "llm")
    if cfg.pad_experts and cfg.capacity is None:
        raise Unfit("model.llm.pad_experts needs a capacity to pad to", [{"capacity": 1.25}], "llm")
    if "E" not in cfg.kinds:
        _check_without_experts(cfg)


def _check_without_experts(cfg: LLMConfig) -> None:
    """Refuse options of experts that have no effect because the model has none."""
    off = {"aux_weight": 0.0, "z_weight": 0.0, "capacity": None, "pad_experts": False, "moe_bias": False}
    for what, none in off.items():
        if (value := getattr(cfg, what)) != none:
            raise Unfit(
                f"model.llm.{what}={value} is of mixtures of experts, but model.llm.pattern {cfg.pattern!r} "
                "has no E layer, so it would have no effect",
                [{what: none}],
                "llm",
            )

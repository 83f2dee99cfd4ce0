"""What a language model is: shapes, checks against a layout, parameter and FLOP counts. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from parallel.layout import check_divides, nearest

KINDS = {"M": "Mamba-2", "E": "mixture of experts", "*": "attention", "-": "dense MLP"}


@dataclass(frozen=True)
class LLMConfig:
    """A hybrid model of the Nemotron-H family (arXiv 2504.03624, 2512.20848).

    pattern: one symbol a layer, M Mamba-2, E mixture of experts, * attention, - dense MLP. Widths count
    features; the inner width of Mamba-2 is mamba_heads * mamba_head_dim. expert_bias_rate: step of the
    routing bias after each global batch (0 leaves it). loss_chunk: tokens whose logits exist at a time.
    """

    pattern: str = "M*E-ME"
    d_model: int = 128
    vocab_size: int = 264
    n_heads: int = 8
    n_kv_heads: int = 4
    head_dim: int = 16
    mamba_heads: int = 16
    mamba_head_dim: int = 16
    mamba_state: int = 16
    mamba_groups: int = 4
    conv_kernel: int = 4
    chunk: int = 64
    n_experts: int = 8
    top_k: int = 2
    expert_ffn: int = 64
    shared_ffn: int = 128
    routed_scale: float = 2.5
    mlp_ffn: int = 256
    norm_eps: float = 1e-5
    init_std: float = 0.02
    expert_bias_rate: float = 1e-3
    loss_chunk: int = 2048
    freeze: bool = False

    @property
    def mamba_inner(self) -> int:
        return self.mamba_heads * self.mamba_head_dim

    @property
    def out_std(self) -> float:
        """Initial deviation of projections into the residual stream: std / sqrt(layers) for hybrids."""
        return self.init_std / max(1, len(self.pattern)) ** 0.5


def check(cfg: LLMConfig, tp: int = 1, ep: int = 1) -> None:
    """Refuse a model that is impossible, or that the degrees do not divide; ValueError names what works."""
    if not cfg.pattern:
        raise ValueError("model.llm.pattern is empty; needed: one symbol a layer of M, E, * and -")
    for i, symbol in enumerate(cfg.pattern):
        if symbol not in KINDS:
            known = ", ".join(f"{k} ({v})" for k, v in KINDS.items())
            raise ValueError(
                f"model.llm.pattern has {symbol!r} at layer {i} of {cfg.pattern!r}; known: {known}"
            )
    for what, value in asdict(cfg).items():
        if type(value) is int and value < 1:
            raise ValueError(f"model.llm.{what} is {value}; needed: at least 1")
    for many, few in (("n_heads", "n_kv_heads"), ("mamba_heads", "mamba_groups")):
        n, d = getattr(cfg, many), getattr(cfg, few)
        if n % d:
            works = " or ".join(f"{few}={k}" for k in nearest(d, n))
            raise ValueError(f"model.llm.{many}={n} is no multiple of {few}={d}; nearest: {works}")
    if cfg.top_k > cfg.n_experts:
        raise ValueError(
            f"model.llm.top_k={cfg.top_k} of n_experts={cfg.n_experts}; needed: at most all of them. "
            f"Nearest: top_k={cfg.n_experts}"
        )
    counts = {"vocab_size": cfg.vocab_size}
    if "*" in cfg.pattern:
        counts |= {"n_heads": cfg.n_heads, "n_kv_heads": cfg.n_kv_heads}
    if "M" in cfg.pattern:
        counts |= {"mamba_heads": cfg.mamba_heads, "mamba_groups": cfg.mamba_groups}
    if "-" in cfg.pattern:
        counts["mlp_ffn"] = cfg.mlp_ffn
    if "E" in cfg.pattern:
        counts["shared_ffn"] = cfg.shared_ffn
        check_divides("model.llm.n_experts", cfg.n_experts, "ep", ep)
    for what, n in counts.items():
        if n % tp:
            # What is proposed must divide all of the counts, not only the first that fails.
            works = " or ".join(f"tp={k}" for k in nearest(tp, math.gcd(*counts.values())))
            raise ValueError(f"model.llm.{what} is {n}, which does not divide by tp={tp}; nearest: {works}")
    if ep > 1 and "E" not in cfg.pattern:
        raise ValueError(f"ep={ep} needs an E layer in the pattern, given {cfg.pattern!r}; nearest: ep=1")


def layer_params(cfg: LLMConfig, symbol: str) -> tuple[int, int]:
    """(parameters held, parameters used per token) of one layer, its norm included."""
    d = cfg.d_model
    if symbol == "M":
        di, bc = cfg.mamba_inner, 2 * cfg.mamba_groups * cfg.mamba_state
        n = d * (2 * di + bc + cfg.mamba_heads) + (di + bc) * (cfg.conv_kernel + 1)
        n += 3 * cfg.mamba_heads + di + di * d
        return n + d, n + d
    if symbol == "*":
        n = d * cfg.head_dim * (2 * cfg.n_heads + 2 * cfg.n_kv_heads)
        return n + d, n + d
    if symbol == "-":
        return 2 * d * cfg.mlp_ffn + d, 2 * d * cfg.mlp_ffn + d
    fixed = cfg.n_experts * d + 2 * d * cfg.shared_ffn + d
    one = 2 * d * cfg.expert_ffn
    return fixed + cfg.n_experts * one, fixed + cfg.top_k * one


def param_count(cfg: LLMConfig) -> tuple[int, int]:
    """(total, active per token) parameters, embedding and head included."""
    outside = 2 * cfg.vocab_size * cfg.d_model + cfg.d_model
    layers = [layer_params(cfg, s) for s in cfg.pattern]
    return outside + sum(t for t, _ in layers), outside + sum(a for _, a in layers)


def flops(cfg: LLMConfig, lengths: Sequence[int]) -> float:
    """Forward FLOPs of packed documents of these lengths: matrix products, causal attention and the scan."""
    tokens = float(sum(lengths))
    out = 2.0 * tokens * cfg.vocab_size * cfg.d_model
    for symbol in cfg.pattern:
        out += 2.0 * tokens * layer_params(cfg, symbol)[1]
        if symbol == "*":
            # Scores and values over the causal half of each document's square.
            out += sum(2.0 * n * n * cfg.n_heads * cfg.head_dim for n in lengths)
        elif symbol == "M":
            q, heads = cfg.chunk, cfg.mamba_heads
            within = q * (cfg.mamba_groups * cfg.mamba_state + heads * cfg.mamba_head_dim)
            across = 2 * heads * cfg.mamba_head_dim * cfg.mamba_state
            out += 2.0 * tokens * (within + across)
    return out

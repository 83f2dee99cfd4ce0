"""What a language model is: shapes, checks against a layout, parameter and FLOP counts. Pure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from parallel.topology.layout import Unfit, check_divides, nearest

KINDS = {"M": "Mamba-2", "E": "mixture of experts", "*": "attention", "-": "dense MLP"}

Activation = Literal["relu2", "gelu", "silu"]


@dataclass(frozen=True)
class LLMConfig:
    """A hybrid model of the Nemotron-H family (arXiv 2504.03624, 2512.20848), or a dense transformer.

    pattern: one symbol a layer, M Mamba-2, E mixture of experts, * attention, - dense MLP; a | between layers
    cuts pipeline stages there. Widths count features; the inner width of Mamba-2 is
    mamba_heads * mamba_head_dim.

    rope_theta: base of rotary positions, None for no positions. attention_bias: of all four projections.
    activation, mlp_gated: of dense MLPs, routed and shared experts alike; gated is act(gate x) * (up x).
    mlp_bias: of dense MLPs and shared experts. tied: the head is the embedding.

    latent: width that routed experts work in (LatentMoE, arXiv 2601.18089), None for d_model.
    shared_ffn: 0 for no shared expert. router, norm_top_k: scores, and whether the chosen ones are divided by
    their sum. expert_groups, top_groups: experts are chosen from the best groups only (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2). expert_bias_rate: step of the routing bias after each global batch (0 leaves
    it). aux_weight, z_weight: of the per-document balance loss and of the squared log-partition of the
    router's logits, means over all tokens of a step. capacity: an expert takes at most
    capacity * tokens * top_k / n_experts of a rank's rows and drops the least probable rest; this breaks the
    exactness of layouts, None is dropless. pad_experts: each expert gets exactly its capacity, the rest zero
    rows, for static shapes.
    dispatcher: how rows reach their experts; changes no result.

    level_layers: layers after which the second and further levels of an encoder's rows are added (DeepStack,
    arXiv 2406.04334).
    mtp_layers: depths of multi-token prediction: one block of pattern mtp_pattern, applied once a depth
    (arXiv 2512.20856, section 2.3); mtp_weight: of the mean over depths of their mean losses.
    loss_chunk: tokens whose logits exist at a time.
    """

    pattern: str = "M*E-ME"
    d_model: int = 128
    vocab_size: int = 264
    n_heads: int = 8
    n_kv_heads: int = 4
    head_dim: int = 16
    rope_theta: float | None = None
    attention_bias: bool = False
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
    latent: int | None = None
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_top_k: bool = True
    routed_scale: float = 2.5
    expert_groups: int = 1
    top_groups: int = 1
    expert_bias_rate: float = 1e-3
    aux_weight: float = 0.0
    z_weight: float = 0.0
    capacity: float | None = None
    pad_experts: bool = False
    dispatcher: Literal["all_to_all", "all_gather"] = "all_to_all"
    mlp_ffn: int = 256
    mlp_gated: bool = False
    mlp_bias: bool = False
    activation: Activation = "relu2"
    mtp_layers: int = 0
    mtp_pattern: str = "*E"
    mtp_weight: float = 0.3
    tied: bool = False
    level_layers: tuple[int, ...] = ()
    norm_eps: float = 1e-5
    init_std: float = 0.02
    loss_chunk: int = 2048
    freeze: bool = False

    @property
    def symbols(self) -> str:
        """One symbol a layer: the pattern without its cuts."""
        return self.pattern.replace("|", "")

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of layers there are, in the block of multi-token prediction too."""
        return frozenset(self.symbols + (self.mtp_pattern if self.mtp_layers else ""))

    @property
    def mamba_inner(self) -> int:
        return self.mamba_heads * self.mamba_head_dim

    @property
    def expert_width(self) -> int:
        """Features of the rows that routed experts take and give."""
        return self.latent or self.d_model

    @property
    def out_std(self) -> float:
        """Initial deviation of projections into the residual stream: std / sqrt(layers), which for a dense
        transformer, whose blocks are two layers here, is GPT-2's std / sqrt(2 blocks)."""
        return self.init_std / max(1, len(self.symbols)) ** 0.5


def embeds_last(cfg: LLMConfig) -> bool:
    """Whether the last pipeline stage needs the embedding too: for its head or for multi-token
    prediction."""
    return cfg.tied or cfg.mtp_layers > 0


# Integers that may be 0, which then means "none".
MAY_BE_ZERO = ("mtp_layers", "shared_ffn")


def check(cfg: LLMConfig, tp: int = 1, ep: int = 1, etp: int = 1) -> None:
    """Refuse a model that is impossible, or that the degrees do not divide; ValueError names what works."""
    _check_pattern("pattern", cfg.pattern)
    if cfg.mtp_layers:
        _check_pattern("mtp_pattern", cfg.mtp_pattern)
    _check_choices(cfg)
    _check_numbers(cfg)
    for layer in cfg.level_layers:
        if not 0 <= layer < len(cfg.symbols):
            raise ValueError(
                f"model.llm.level_layers has {layer}; needed: a layer's index, 0 to {len(cfg.symbols) - 1}"
            )
    _check_routing(cfg)
    # Key/value heads and groups need not divide: ranks beyond them share (parallel.tensor_parallel.heads).
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
    for what, n in counts.items():
        if n % tp:
            # What is proposed must divide all of the counts, not only the first that fails.
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
    for what in ("routed_scale", "norm_eps", "init_std", "rope_theta", "capacity"):
        value = getattr(cfg, what)
        if value is not None and value <= 0:
            raise ValueError(f"model.llm.{what} is {value}; needed: more than 0")
    for what in ("expert_bias_rate", "aux_weight", "z_weight", "mtp_weight"):
        if getattr(cfg, what) < 0:
            raise ValueError(f"model.llm.{what} is {getattr(cfg, what)}; needed: 0 (off) or more")
    if cfg.latent is not None and cfg.latent < 1:
        raise ValueError(f"model.llm.latent is {cfg.latent}; needed: at least 1, or null for d_model")
    if cfg.rope_theta is not None and cfg.head_dim % 2:
        even = [{"head_dim": n} for n in (cfg.head_dim - 1, cfg.head_dim + 1) if n]
        raise Unfit(f"model.llm.head_dim={cfg.head_dim} with rope_theta; needed: even", even, "llm")
    for many, few in (("n_heads", "n_kv_heads"), ("mamba_heads", "mamba_groups")):
        n, d = getattr(cfg, many), getattr(cfg, few)
        if n % d:
            works = [{few: k} for k in nearest(d, n)]
            raise Unfit(f"model.llm.{many}={n} is no multiple of {few}={d}", works, "llm")


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
    """Refuse what would change what is learned if there were experts."""
    off = {"aux_weight": 0.0, "z_weight": 0.0, "capacity": None, "pad_experts": False}
    for what, none in off.items():
        if (value := getattr(cfg, what)) != none:
            raise Unfit(
                f"model.llm.{what}={value} is of mixtures of experts, but model.llm.pattern {cfg.pattern!r} "
                "has no E layer, so it would have no effect",
                [{what: none}],
                "llm",
            )


def layer_params(cfg: LLMConfig, symbol: str) -> tuple[int, int]:
    """(parameters held, parameters used per token) of one layer, its norm included."""
    d = cfg.d_model
    n = d  # the norm
    if symbol == "M":
        di, bc = cfg.mamba_inner, 2 * cfg.mamba_groups * cfg.mamba_state
        n += d * (2 * di + bc + cfg.mamba_heads) + (di + bc) * (cfg.conv_kernel + 1)
        n += 3 * cfg.mamba_heads + di + di * d
    elif symbol == "*":
        heads = 2 * cfg.n_heads + 2 * cfg.n_kv_heads
        n += d * cfg.head_dim * heads
        if cfg.attention_bias:
            n += cfg.head_dim * (cfg.n_heads + 2 * cfg.n_kv_heads) + d
    elif symbol == "-":
        n += _mlp_params(cfg, cfg.mlp_ffn)
    else:
        n += cfg.n_experts * d + (_mlp_params(cfg, cfg.shared_ffn) if cfg.shared_ffn else 0)
        n += 2 * d * cfg.latent if cfg.latent else 0
        one = (2 + cfg.mlp_gated) * cfg.expert_width * cfg.expert_ffn
        return n + cfg.n_experts * one, n + cfg.top_k * one
    return n, n


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
    """(total, active per token) parameters, embedding and head included. The block of multi-token
    prediction is in the total only: it is not needed for the next token."""
    outside = (1 if cfg.tied else 2) * cfg.vocab_size * cfg.d_model + cfg.d_model
    layers = [layer_params(cfg, s) for s in cfg.symbols]
    return outside + sum(t for t, _ in layers) + mtp_params(cfg), outside + sum(a for _, a in layers)


def layer_flops(cfg: LLMConfig, symbol: str, lengths: Sequence[int]) -> float:
    """Forward FLOPs of one layer over packed documents of these lengths: matrix products, causal attention
    and the scan."""
    tokens = float(sum(lengths))
    out = 2.0 * tokens * layer_params(cfg, symbol)[1]
    if symbol == "*":
        # Scores and values over the causal half of each document's square.
        out += sum(2.0 * n * n * cfg.n_heads * cfg.head_dim for n in lengths)
    elif symbol == "M":
        q, heads = cfg.chunk, cfg.mamba_heads
        within = q * (cfg.mamba_groups * cfg.mamba_state + heads * cfg.mamba_head_dim)
        across = 2 * heads * cfg.mamba_head_dim * cfg.mamba_state
        out += 2.0 * tokens * (within + across)
    return out


def layer_costs(cfg: LLMConfig, lengths: Sequence[int]) -> tuple[float, ...]:
    """Forward FLOPs of each layer, for cut_layers(); head_flops() is what comes after them."""
    by_kind = {symbol: layer_flops(cfg, symbol, lengths) for symbol in set(cfg.symbols)}
    return tuple(by_kind[symbol] for symbol in cfg.symbols)


def head_flops(cfg: LLMConfig, lengths: Sequence[int], supervised: int | None = None) -> float:
    """Forward FLOPs after the layers: head and loss of `supervised` tokens (None: all), and multi-token
    prediction."""
    tokens = float(sum(lengths))
    head = 2.0 * (tokens if supervised is None else supervised) * cfg.vocab_size * cfg.d_model
    block = 4.0 * tokens * cfg.d_model * cfg.d_model
    block += sum(layer_flops(cfg, s, lengths) for s in cfg.mtp_pattern)
    return head + cfg.mtp_layers * (head + block)


def flops(cfg: LLMConfig, lengths: Sequence[int], supervised: int | None = None) -> float:
    """Forward FLOPs of a training step's packed documents of these lengths; supervised as in head_flops."""
    return sum(layer_costs(cfg, lengths)) + head_flops(cfg, lengths, supervised)

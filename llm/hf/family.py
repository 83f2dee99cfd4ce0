"""What a family of published models is: how config.json says a model, and where its tensors lie. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llm.config import LLMConfig
from parallel.published.tables import Row

Data = Mapping[str, Any]
TableRow = tuple[Row, str, str]
"""A row of a table of tensors, the prefix of its key there, and that of its parameters here."""


@dataclass(frozen=True)
class Field:
    """One field of a config, under our name and under theirs."""

    ours: str
    theirs: str
    default: Any
    """The value of theirs where a file lacks it."""
    kinds: str = "ME*-"
    """The kinds of layers that read it."""


@dataclass(frozen=True)
class Family:
    """One family of published models."""

    name: str
    """model_type in config.json."""
    title: str
    """What people call it."""
    architecture: str
    """The class that transformers builds, without ForCausalLM."""
    read: Callable[[Data], LLMConfig]
    """The model of a config.json; raises ValueError where ours cannot be it."""
    write: Callable[[LLMConfig], dict[str, Any]]
    """config.json of a model, but for names and dtype; see cannot_say() for whether it says all of it."""
    rows: Callable[[LLMConfig], list[TableRow]]
    """Every tensor that a model may have. Rows whose parameters it lacks do not count."""
    stem: str = ""
    """What is in front of the keys of all tensors but the head; absent where the bare model was saved."""
    embedding: str = "model.embed_tokens.weight"
    """The key of the embedding."""
    ignored: Callable[[str, LLMConfig], bool] = lambda key, cfg: False
    """Whether the tensor of a key is no weight of the model, such as a stored table of rotary speeds."""
    scales_rows: bool = False
    """Whether the factor on embeddings multiplies rows of encoders too, which come in their place."""
    selection_bias: bool = False
    """Whether files hold the bias that experts are selected with; others need it to be zero."""


# The kinds of layers that read a field of LLMConfig; fields that are not here are read by all models.
READ_BY = {
    "*": (
        "n_heads n_kv_heads head_dim rope_theta attention_bias qkv_bias qk_norm rope_scaling rope_axes "
        "rope_share rope_skips window window_layers window_rope_theta attention_scale attention_cap "
        "attention_sinks"
    ),
    "M": "mamba_heads mamba_head_dim mamba_state mamba_groups conv_kernel",
    "E": (
        "n_experts top_k expert_ffn shared_ffn latent router norm_top_k routed_scale expert_groups top_groups"
    ),
    "-": "mlp_ffn",
    "E-": "mlp_gated mlp_bias activation",
}

# Fields that change training, speed or memory alone, and none of what a model computes. Pattern and blocks of
# multi-token prediction are compared in a form of their own.
UNSAID = (
    "pattern mtp_layers mtp_pattern mtp_weight chunk init_std expert_bias_rate aux_weight z_weight capacity "
    "pad_experts dispatcher level_layers loss_chunk freeze source"
)


def computed(cfg: LLMConfig) -> dict[str, Any]:
    """What a model computes: the fields that its layers read, alike for equal models."""
    out = asdict(cfg)
    for kinds, names in READ_BY.items():
        if not cfg.kinds & set(kinds):
            for name in names.split():
                out.pop(name, None)
    for name in UNSAID.split():
        out.pop(name, None)
    blocks = cfg.mtp_pattern if cfg.mtp_layers else ""
    out |= {"pattern": cfg.symbols, "mtp_layers": min(cfg.mtp_layers, 1), "mtp_pattern": blocks}
    return out | (_attention(cfg) if "*" in cfg.kinds else {})


def _attention(cfg: LLMConfig) -> dict[str, Any]:
    """Options of attention for which several values are the same model."""
    attention = tuple(i for i, symbol in enumerate(cfg.symbols) if symbol == "*")
    out: dict[str, Any] = {
        "rope_skips": tuple(sorted(cfg.rope_skips)),
        "attention_scale": cfg.attention_scale or cfg.head_dim**-0.5,
    }
    if cfg.window is not None:
        windowed = attention if cfg.window_layers is None else cfg.window_layers
        out["window_layers"] = tuple(sorted(windowed))
        if cfg.rope_scaling is None:
            out["window_rope_theta"] = cfg.window_rope_theta or cfg.rope_theta
    return out


def cannot_say(family: Family, cfg: LLMConfig) -> str | None:
    """Why config.json of `family` cannot describe a model, in words; None where it can."""
    try:
        back = family.read(family.write(cfg))
    except ValueError as error:
        return f"a {family.title} checkpoint cannot say this model: {error}"
    here, there = computed(cfg), computed(back)
    for name in {**here, **there}:
        ours, needed = here.get(name), there.get(name)
        if not alike(ours, needed):
            return f"a {family.title} checkpoint cannot say {name}={ours!r}; needed: {needed!r}"
    return None


def alike(one: Any, other: Any) -> bool:
    """Whether two values are the same, numbers to the rounding of their inverse."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-14)
    return bool(one == other)

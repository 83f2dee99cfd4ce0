"""Parts of config.json that several families of decoders have, each read and written by one object. Pure.

A family is a list of parts (llm.hf.families). A block of a decoder is two layers here: attention or Mamba-2,
then an MLP or experts; block n is layers 2n and 2n + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llm.checks import check
from llm.config import CLAMP, STEEP, LLMConfig
from llm.hf.family import Data

Options = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Some options of a family, both ways."""

    read: Callable[[Data, Options], Options]
    """Fields of LLMConfig from config.json and from the fields that parts before this one gave."""
    write: Callable[[LLMConfig], Options]
    """Keys of config.json from a model."""


def read_parts(parts: Sequence[Part], data: Data) -> LLMConfig:
    """The model that config.json describes; raises ValueError where ours cannot be it."""
    known: Options = {}
    for part in parts:
        known |= part.read(data, known)
    cfg = LLMConfig(**known)
    check(cfg)
    return cfg


def write_parts(parts: Sequence[Part], cfg: LLMConfig) -> Options:
    """The keys of config.json that all parts write."""
    out: Options = {}
    for part in parts:
        out |= part.write(cfg)
    return out


def field(ours: str, theirs: str, default: Any) -> Part:
    """A value that both have as it is; default: of a file without it."""

    def read(data: Data, known: Options) -> Options:
        given = data.get(theirs)
        return {ours: default if given is None else given}

    return Part(read, lambda cfg: {theirs: getattr(cfg, ours)})


def nullable(ours: str, theirs: str, default: float | None) -> Part:
    """A number or none, where null in a file is none; default: of a file without the key."""
    return Part(
        lambda data, known: {ours: data.get(theirs, default)}, lambda cfg: {theirs: getattr(cfg, ours)}
    )


def head_norms(key: str = "use_qk_norm") -> Part:
    """Whether queries and keys of each head are normed."""
    return Part(
        lambda data, known: {"qk_norm": "head" if data.get(key, False) else "none"},
        lambda cfg: {key: cfg.qk_norm == "head"},
    )


def ours(**values: Any) -> Part:
    """What every model of the family is here, and its files do not say."""
    return Part(lambda data, known: dict(values), lambda cfg: {})


def only(**values: Any) -> Part:
    """Keys that files of the family may have, with the one value that every model of it has."""

    def read(data: Data, known: Options) -> Options:
        for key, needed in values.items():
            if (given := data.get(key, needed)) != needed:
                raise ValueError(f"config.json has {key}={given!r}; needed: {needed!r}")
        return {}

    return Part(read, lambda cfg: dict(values))


def sizes(vocab: int, width: int, eps: float = 1e-6) -> tuple[Part, ...]:
    """What is outside the blocks; values: of files without them."""
    return (
        field("vocab_size", "vocab_size", vocab),
        field("d_model", "hidden_size", width),
        field("norm_eps", "rms_norm_eps", eps),
        field("init_std", "initializer_range", 0.02),
    )


def causal() -> Part:
    """Gemma's attention, which looks back alone."""

    def read(data: Data, known: Options) -> Options:
        if data.get("use_bidirectional_attention"):
            raise ValueError("config.json has use_bidirectional_attention=true; needed: false")
        return {}

    return Part(read, lambda cfg: {})


def tie(*, default: bool = False) -> Part:
    """Whether the head is the embedding; default: in files that do not say it, which differs by family."""
    return field("tied", "tie_word_embeddings", default)


def blocks(count: int, second: str = "-") -> Part:
    """Blocks of attention and a second layer; count: of files without it; second: its symbol."""

    def read(data: Data, known: Options) -> Options:
        return {"pattern": f"*{second}" * data.get("num_hidden_layers", count)}

    return Part(read, lambda cfg: {"num_hidden_layers": len(cfg.symbols) // 2})


def heads(n: int, kv: int | None = None, head_dim: int | None = None, *, whole: bool = False) -> Part:
    """Heads of attention; values: of files without them, None for n_heads and hidden_size / n_heads.

    whole: transformers refuses a width that is no multiple of the heads.
    """

    def read(data: Data, known: Options) -> Options:
        many = data.get("num_attention_heads", n)
        few, dim = data.get("num_key_value_heads", kv), data.get("head_dim", head_dim)
        return {
            "n_heads": many,
            "n_kv_heads": many if few is None else few,
            "head_dim": known["d_model"] // many if dim is None else dim,
        }

    def write(cfg: LLMConfig) -> Options:
        if whole and cfg.d_model % cfg.n_heads:
            raise ValueError(f"d_model={cfg.d_model}; needed: a multiple of n_heads={cfg.n_heads}")
        return {
            "num_attention_heads": cfg.n_heads,
            "num_key_value_heads": cfg.n_kv_heads,
            "head_dim": cfg.head_dim,
        }

    return Part(read, write)


# Names of activations in files; the first of each of ours is written.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}


def activation(key: str = "hidden_act", default: str = "silu") -> Part:
    """Gated MLPs and experts with one activation."""

    def read(data: Data, known: Options) -> Options:
        given = data.get(key) or default
        if given not in ACTIVATIONS:
            raise ValueError(f"config.json has {key}={given!r}; known: {', '.join(ACTIVATIONS)}")
        return {"activation": ACTIVATIONS[given], "mlp_gated": True}

    def write(cfg: LLMConfig) -> Options:
        names = [theirs for theirs, our in ACTIVATIONS.items() if our == cfg.activation]
        if not names:
            raise ValueError(
                f"activation={cfg.activation!r}; needed: one of {', '.join(ACTIVATIONS.values())}"
            )
        return {key: names[0]}

    return Part(read, write)


def clamped() -> Part:
    """The gate of gpt-oss, whose two numbers files may say."""
    numbers = only(swiglu_limit=CLAMP, swiglu_alpha=STEEP)
    # transformers reads hidden_act, and computes the clamped gate whatever it is.
    return Part(
        lambda data, known: numbers.read(data, known) | {"activation": "clamped", "mlp_gated": True},
        lambda cfg: {"hidden_act": "silu", **numbers.write(cfg)},
    )


def multipliers() -> Part:
    """Granite's four; its files have the divisor of the logits."""
    names = {
        "embed_scale": "embedding_multiplier",
        "branch_scale": "residual_multiplier",
        "attention_scale": "attention_multiplier",
    }

    def read(data: Data, known: Options) -> Options:
        factors = {our: float(data.get(theirs, 1.0)) for our, theirs in names.items()}
        return {**factors, "logit_scale": 1.0 / data.get("logits_scaling", 1.0)}

    def write(cfg: LLMConfig) -> Options:
        scale = cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale
        factors = {theirs: getattr(cfg, our) for our, theirs in names.items()}
        return {**factors, "attention_multiplier": scale, "logits_scaling": neat(1.0 / cfg.logit_scale)}

    return Part(read, write)


def query_scale(default: int = 256) -> Part:
    """Gemma's attention_scale: its files have the number of features of which it is the root's inverse."""

    def read(data: Data, known: Options) -> Options:
        return {"attention_scale": data.get("query_pre_attn_scalar", default) ** -0.5}

    def write(cfg: LLMConfig) -> Options:
        features = cfg.head_dim if cfg.attention_scale is None else neat(cfg.attention_scale**-2)
        if not float(features).is_integer():
            raise ValueError(f"attention_scale={cfg.attention_scale}; needed: n ** -0.5 for a whole number n")
        return {"query_pre_attn_scalar": int(features)}

    return Part(read, write)


def scaled_embedding() -> Part:
    """Gemma's factor on embeddings, the root of their width."""
    return Part(lambda data, known: {"embed_scale": known["d_model"] ** 0.5}, lambda cfg: {})


def neat(value: float) -> float:
    """A number that arithmetic put next to a shorter one, as that one."""
    short = float(f"{value:.12g}")
    return short if abs(short - value) <= 1e-14 * abs(value) else value


def no_rope_layers() -> Part:
    """SmolLM3's layers without positions: every fourth, or those with a zero in a list."""

    def read(data: Data, known: Options) -> Options:
        n = len(known["pattern"]) // 2
        step = data.get("no_rope_layer_interval", 4)
        listed = data.get("no_rope_layers") or [int((i + 1) % step != 0) for i in range(n)]
        return {"rope_skips": tuple(2 * i for i, turned in enumerate(listed[:n]) if not turned)}

    def write(cfg: LLMConfig) -> Options:
        attention = [i for i, symbol in enumerate(cfg.symbols) if symbol == "*"]
        return {"no_rope_layers": [int(i not in cfg.rope_skips) for i in attention]}

    return Part(read, write)

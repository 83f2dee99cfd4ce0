"""Parts of config.json that several families of decoders have, each read and written by one object. Pure.

A family is a list of parts (llm.hf.families). A block of a decoder is two layers here: attention or Mamba-2,
then an MLP or experts; block n is layers 2n and 2n + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llm.config import LLMConfig, check
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


def field(ours: str, theirs: str, default: Any, *others: str) -> Part:
    """A value that both have as it is; default: of a file without it; others: its names in other files."""

    def read(data: Data, known: Options) -> Options:
        for name in (theirs, *others):
            if data.get(name) is not None:
                return {ours: data[name]}
        return {ours: default}

    return Part(read, lambda cfg: {theirs: getattr(cfg, ours)})


def ours(**values: Any) -> Part:
    """What every model of the family is here, and its files do not say."""
    return Part(lambda data, known: dict(values), lambda cfg: {})


def needs(**values: Any) -> Part:
    """Options that our model has with these values alone, which are also those of a file without them."""

    def read(data: Data, known: Options) -> Options:
        for theirs, needed in values.items():
            given = data.get(theirs, needed)
            if given != needed:
                raise ValueError(f"config.json has {theirs}={given!r}; needed: {needed!r}")
        return {}

    return Part(read, lambda cfg: dict(values))


def blocks(second: str | Callable[[Data, int], str] = "-") -> Part:
    """num_hidden_layers blocks of attention and a second layer; second: its symbol, or that of a block."""

    def read(data: Data, known: Options) -> Options:
        n = data.get("num_hidden_layers", 32)
        symbols = [second if isinstance(second, str) else second(data, i) for i in range(n)]
        return {"pattern": "".join(f"*{s}" for s in symbols)}

    return Part(read, lambda cfg: {"num_hidden_layers": len(cfg.symbols) // 2})


def sizes(vocab: int, width: int, eps: float = 1e-6) -> tuple[Part, ...]:
    """What is outside the blocks; values: of files without them."""
    return (
        field("vocab_size", "vocab_size", vocab),
        field("d_model", "hidden_size", width),
        field("norm_eps", "rms_norm_eps", eps),
        field("init_std", "initializer_range", 0.02),
    )


def tie(default: bool = False) -> Part:
    """Whether the head is the embedding; default: in files that do not say it, which differs by family."""
    return field("tied", "tie_word_embeddings", default)


def heads(n: int, kv: int | None = None, head_dim: int | None = None, *, whole: bool = False) -> Part:
    """Heads of attention; values: of files without them, None for n_heads and hidden_size / n_heads.

    whole: transformers refuses a width that is no multiple of the heads.
    """

    def read(data: Data, known: Options) -> Options:
        many = data.get("num_attention_heads", n)
        few = data.get("num_key_value_heads", kv)
        dim = data.get("head_dim", head_dim)
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
        return {key: next(theirs for theirs, our in ACTIVATIONS.items() if our == cfg.activation)}

    return Part(read, write)


def softmax_experts(key: str, count: int, chosen: int, norm: bool | None = None) -> Part:
    """Experts with softmax scores and no shared one, selected without bias; count, chosen: of files without.

    key: of their number. norm: norm_topk_prob of files without it; None: always normed, and never said.
    """

    def read(data: Data, known: Options) -> Options:
        n = data.get(key, data.get("num_local_experts", data.get("num_experts", count)))
        normed = True if norm is None else data.get("norm_topk_prob", norm)
        return {
            "n_experts": n,
            "top_k": data.get("num_experts_per_tok", chosen),
            "norm_top_k": normed,
            "router": "softmax",
            "shared_ffn": 0,
            "routed_scale": 1.0,
            "expert_bias_rate": 0.0,
        }

    def write(cfg: LLMConfig) -> Options:
        said = {} if norm is None else {"norm_topk_prob": cfg.norm_top_k}
        return {key: cfg.n_experts, "num_experts_per_tok": cfg.top_k, **said}

    return Part(read, write)

"""config.json to LLMConfig and back, in the family that it names. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llm.config import LLMConfig
from llm.hf.family import Data, Family, alike, cannot_say, computed
from llm.hf.inside import language_config
from llm.hf.registry import FAMILIES, family_named, family_of
from llm.source import Source


def read_config(data: Data) -> LLMConfig:
    """The language model that config.json describes, also that of a whole model with other parts.

    Raises ValueError for an unknown model_type, and, with the value needed, where our model cannot be it.
    """
    data = language_config(data)
    family = family_of(data)
    return replace(family.read(data), source=read_source(data, family.name))


def export_family(cfg: LLMConfig, name: str | None = None) -> Family:
    """The family that a model is written as: `name`; else the one that it was read from, or the first of
    FAMILIES, whose config.json can say it. Raises ValueError, with the reasons, where none can."""
    if name is not None:
        family = family_named(name)
        why = cannot_say(family, cfg)
        if why:
            raise ValueError(why)
        return family
    first = [family_named(cfg.source.family)] if cfg.source else []
    reasons = []
    for family in [*first, *(f for f in FAMILIES.values() if f not in first)]:
        why = cannot_say(family, cfg)
        if not why:
            return family
        reasons.append(why)
    raise ValueError("; ".join(reasons))


def write_config(cfg: LLMConfig, dtype: str, family: str | None = None) -> dict[str, Any]:
    """config.json of a model; dtype: of its weights ("bfloat16"); family: see export_family().

    Options that only training reads (balance losses, capacity, mtp_weight) are not part of it. Raises
    ValueError where no family can express the model.
    """
    return config_of(export_family(cfg, family), cfg, dtype)


def config_of(family: Family, cfg: LLMConfig, dtype: str) -> dict[str, Any]:
    """config.json of a model in a family that can say it."""
    head = {"architectures": [f"{family.architecture}ForCausalLM"], "model_type": family.name}
    return {**head, "torch_dtype": dtype, **family.write(cfg), **write_source(cfg.source)}


def read_source(data: Data, family: str) -> Source:
    """What other programs read: the longest document, and ids of special tokens, which may be negative for
    none."""

    def one(key: str) -> int | None:
        given = data.get(key)
        return None if given is None or given < 0 else int(given)

    ends = data.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    context = data.get("max_position_embeddings")
    return Source(family, context, one("bos_token_id"), tuple(i for i in ends if i >= 0), one("pad_token_id"))


def write_source(source: Source | None) -> dict[str, Any]:
    """The same; ids are null where they are not known, as the classes' own may be beyond the vocabulary."""
    ends = list(source.eos) if source else []
    out: dict[str, Any] = {
        "bos_token_id": source.bos if source else None,
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
        "pad_token_id": source.pad if source else None,
    }
    if source is not None and source.context is not None:
        out["max_position_embeddings"] = source.context
    return out


# Keys that may differ from the file: the chunk of the scan, initial weights, what other programs read.
FREE = (
    *("chunk_size", "mamba_chunk_size", "initializer_range", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def check_same(cfg: LLMConfig, published: LLMConfig) -> None:
    """Raise ValueError where the weights of `published`, from read_config(), do not fit `cfg`; it names the
    published fields."""
    assert published.source is not None
    family = family_named(published.source.family)
    here, there = computed(cfg), computed(published)
    if all(alike(here.get(key), there.get(key)) for key in {**here, **there}):
        return
    wrong = []
    try:
        mine, theirs = family.write(cfg), family.write(published)
        wrong = [
            f"{key} is {theirs.get(key)!r} there and {mine.get(key)!r} here"
            for key in {**theirs, **mine}
            if key not in FREE and mine.get(key) != theirs.get(key)
        ]
    except ValueError:
        pass  # the family has no words for ours: our own fields follow
    wrong = wrong or [
        f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        for key in {**there, **here}
        if not alike(here.get(key), there.get(key))
    ]
    raise ValueError(f"config.json describes another model: {'; '.join(wrong)}")

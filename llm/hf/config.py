"""config.json to LLMConfig and back, in the family that it names. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llm.config import LLMConfig
from llm.hf.family import Data, Family, alike, cannot_say, computed
from llm.hf.registry import FAMILIES, family_named, family_of


def read_config(data: Data) -> LLMConfig:
    """The model that config.json describes.

    Raises ValueError for an unknown model_type, and, with the value needed, where our model cannot be it.
    """
    family = family_of(data)
    return replace(family.read(data), family=family.name)


def export_family(cfg: LLMConfig, name: str | None = None) -> Family:
    """The family that a model is written as: `name`; else the one that it was read from, or the first of
    FAMILIES, whose config.json can say it. Raises ValueError, with the reasons, where none can."""
    if name is not None:
        family = family_named(name)
        why = cannot_say(family, cfg)
        if why:
            raise ValueError(why)
        return family
    first = [family_named(cfg.family)] if cfg.family else []
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
    return {**head, "torch_dtype": dtype, **family.write(cfg)}


# Keys that may differ from the file: the chunk of the scan, initial weights, what other programs read.
FREE = (
    *("chunk_size", "mamba_chunk_size", "initializer_range", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def check_same(cfg: LLMConfig, published: LLMConfig) -> None:
    """Raise ValueError where the weights of `published`, from read_config(), do not fit `cfg`; it names the
    published fields."""
    assert published.family is not None
    family = family_named(published.family)
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

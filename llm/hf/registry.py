"""Which families there are, by model_type. Pure."""

from __future__ import annotations

from llm.hf import families as f
from llm.hf import mixtures as m
from llm.hf.family import Data, Family
from llm.hf.nemotron_h import NEMOTRON_H

# In the order in which they are tried for a model that was not imported.
ALL = (
    *(NEMOTRON_H, f.LLAMA, f.MISTRAL, f.MIXTRAL, f.QWEN2, f.QWEN3, f.QWEN3_MOE, f.SMOLLM3, f.PHI3, f.OLMO2),
    *(
        f.OLMO3,
        f.GEMMA2,
        f.GEMMA3,
        f.GLM4_MOE,
        f.GRANITE,
        f.GRANITE_HYBRID,
        f.BAMBA,
        m.GPT_OSS,
        m.DEEPSEEK_V3,
    ),
)
FAMILIES: dict[str, Family] = {family.name: family for family in ALL}


def family_named(name: str) -> Family:
    """The family `name`; raises ValueError for one that is not known, with those that are."""
    if name not in FAMILIES:
        raise ValueError(f"{name!r} is no family of language models here; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(data: Data) -> Family:
    """The family of a config.json, by its model_type. Raises ValueError where it is not known."""
    name = data.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"config.json has model_type={name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]

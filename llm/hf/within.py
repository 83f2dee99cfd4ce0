"""Language models that whole models have under a name of their own, as the plain family says them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm.hf.rope import INTERLEAVED, SECTIONS


@dataclass(frozen=True)
class Within:
    """A section's language model: a plain family with positions of three axes.

    family: its model_type. absent: values of files that leave them out. sections: of these files, the rotated
    pairs of each axis; interleaved: whether they take turns, which some files do not say.
    """

    family: str
    absent: Mapping[str, Any]
    sections: tuple[int, int, int]
    interleaved: bool


WITHIN = {
    "qwen2_5_vl_text": Within(
        "qwen2",
        {
            "vocab_size": 152064,
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_window_layers": 80,
        },
        (16, 24, 24),
        interleaved=False,
    ),
    "qwen3_vl_text": Within(
        "qwen3",
        {"rope_theta": 500000.0},
        (24, 20, 20),
        interleaved=True,
    ),
}
# Whole models whose files may have the language model's keys beside the other parts, without a section.
FLAT = {"qwen2_5_vl": "qwen2_5_vl_text"}


def flat(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The language model of a config.json without a section for it; empty where it must have one."""
    kind = FLAT.get(str(data.get("model_type")))
    return [] if kind is None else [{**data, "model_type": kind}]


def plain(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """A section as config.json of its plain family; one of a plain family as it is."""
    within = WITHIN.get(str(section.get("model_type")))
    if within is None:
        return section
    key = "rope_scaling" if section.get("rope_scaling") else "rope_parameters"
    rope = {SECTIONS: list(within.sections), **(section.get(key) or {})}
    if within.interleaved:
        rope[INTERLEAVED] = True
    return {**within.absent, **section, key: rope, "model_type": within.family}

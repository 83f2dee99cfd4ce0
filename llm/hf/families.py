"""The families of language models that can be read and written, each a list of parts and a table. Pure.

To add one: its parts of config.json (llm.hf.parts, with the defaults of its configuration class), and the
rows in which its tensors differ from those of llm.hf.decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm.hf.decoder import TABLE, Rows, block_rows, ignored, listed_experts
from llm.hf.family import Data, Family
from llm.hf.nemotron_h import NEMOTRON_H
from llm.hf.parts import (
    Part,
    activation,
    blocks,
    field,
    heads,
    needs,
    read_parts,
    sizes,
    softmax_experts,
    tie,
    write_parts,
)
from llm.hf.rope import rope


def decoder(name: str, title: str, architecture: str, parts: Sequence[Part], **table: Rows) -> Family:
    """A family of decoders; table: rows of attention, dense and experts that are not the usual ones."""
    named = {"attention": "*", "dense": "-", "experts": "E"}
    rows = TABLE | {named[kind]: held for kind, held in table.items()}
    return Family(
        name,
        title,
        architecture,
        lambda data: read_parts(parts, data),
        lambda cfg: write_parts(parts, cfg),
        lambda cfg: block_rows(cfg, rows),
        stem="model.",
        ignored=ignored,
    )


LLAMA = decoder(
    "llama",
    "Llama",
    "Llama",
    (
        *sizes(32000, 4096),
        blocks(),
        heads(32, whole=True),
        field("attention_bias", "attention_bias", default=False),
        field("mlp_ffn", "intermediate_size", 11008),
        field("mlp_bias", "mlp_bias", default=False),
        activation(),
        rope(),
        tie(),
    ),
)

MIXTRAL = decoder(
    "mixtral",
    "Mixtral",
    "Mixtral",
    (
        *sizes(32000, 4096, 1e-5),
        blocks("E"),
        heads(32, 8),
        field("expert_ffn", "intermediate_size", 14336),
        softmax_experts("num_local_experts", 8, 2),
        activation(),
        rope(1e6),
        tie(),
        needs(sliding_window=None),
    ),
    experts=listed_experts("block_sparse_moe", "w1", "w3", "w2"),
)

# The order in which they are tried for a model that was not imported.
FAMILIES: dict[str, Family] = {f.name: f for f in (NEMOTRON_H, LLAMA, MIXTRAL)}


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

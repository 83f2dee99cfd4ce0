"""Tensors of decoders: the rows of blocks that most families share, and their variants. Pure."""

from __future__ import annotations

import re

from llm.config import LLMConfig
from llm.hf.family import TableRow
from parallel.published.tables import Row

Rows = tuple[Row, ...]

OUTSIDE: Rows = (
    Row("model.embed_tokens.weight", ("embed.weight",)),
    Row("model.norm.weight", ("norm.weight",)),
    Row("lm_head.weight", ("head",)),
)

ATTENTION: Rows = (
    Row("input_layernorm.weight", ("norm.weight",)),
    *(Row(f"self_attn.{n}_proj.weight", (f"mixer.{n}",)) for n in "qkv"),
    *(Row(f"self_attn.{n}_proj.bias", (f"mixer.{n}_bias",)) for n in "qkv"),
    Row("self_attn.o_proj.weight", ("mixer.out.weight",)),
    Row("self_attn.o_proj.bias", ("mixer.bias",)),
)

AFTER_ATTENTION: Rows = (Row("post_attention_layernorm.weight", ("norm.weight",)),)

DENSE: Rows = (
    *AFTER_ATTENTION,
    *(Row(f"mlp.{n}_proj.weight", (f"mixer.{n}.weight",)) for n in ("gate", "up", "down")),
    *(Row(f"mlp.{n}_proj.bias", (f"mixer.{n}.bias",)) for n in ("gate", "up")),
    Row("mlp.down_proj.bias", ("mixer.bias",)),
)


def listed_experts(stem: str, gate: str, up: str, down: str) -> Rows:
    """A router and experts that files list one by one, below `stem`."""
    names = {"gate": gate, "up": up, "down": down}
    return (
        *AFTER_ATTENTION,
        Row(f"{stem}.gate.weight", ("mixer.router.weight",)),
        *(Row(f"{stem}.experts.{{e}}.{n}.weight", (f"mixer.experts.{ours}",)) for ours, n in names.items()),
    )


EXPERTS = listed_experts("mlp", "gate_proj", "up_proj", "down_proj")

TABLE: dict[str, Rows] = {"*": ATTENTION, "-": DENSE, "E": EXPERTS}


def block_rows(cfg: LLMConfig, table: dict[str, Rows], outside: Rows = OUTSIDE) -> list[TableRow]:
    """The rows of a model in blocks of two layers; table: those of each kind of layer."""
    out = [(row, "", "") for row in outside]
    for i, symbol in enumerate(cfg.symbols):
        out += [(row, f"model.layers.{i // 2}.", f"layers.{i}.") for row in table[symbol]]
    return out


EXTRA = re.compile(r"model[.]layers[.](\d+)[.]")


def ignored(key: str, cfg: LLMConfig) -> bool:
    """Stored rotary speeds, and blocks of multi-token prediction behind the last, as transformers does."""
    if key.endswith("rotary_emb.inv_freq"):
        return True
    block = EXTRA.match(key)
    return block is not None and int(block[1]) >= len(cfg.symbols) // 2

"""Tensors of decoders: the rows of blocks that most families share, and their variants. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from llm.config import LLMConfig
from llm.hf.family import TableRow
from llm.hf.nemotron_h import mamba_rows
from parallel.published.tables import Row

Rows = tuple[Row, ...]

EMBED = Row("model.embed_tokens.weight", ("embed.weight",))
HEAD = Row("lm_head.weight", ("head",))
OUTSIDE: Rows = (EMBED, Row("model.norm.weight", ("norm.weight",)), HEAD)


def norms(before: str | None, after: str | None = None) -> Rows:
    """The norms of a layer, by their names there."""
    named = (("norm.weight", before), ("norm_after.weight", after))
    return tuple(Row(f"{theirs}.weight", (ours,)) for ours, theirs in named if theirs is not None)


# Below self_attn. there and mixer. here.
OUT: Rows = (
    Row("self_attn.o_proj.weight", ("mixer.out.weight",)),
    Row("self_attn.o_proj.bias", ("mixer.bias",)),
    Row("self_attn.q_norm.weight", ("mixer.q_norm",)),
    Row("self_attn.k_norm.weight", ("mixer.k_norm",)),
)
APART: Rows = (
    *(Row(f"self_attn.{n}_proj.weight", (f"mixer.{n}",)) for n in "qkv"),
    *(Row(f"self_attn.{n}_proj.bias", (f"mixer.{n}_bias",)) for n in "qkv"),
    *OUT,
)
FUSED: Rows = (
    Row("self_attn.qkv_proj.weight", ("mixer.q", "mixer.k", "mixer.v")),
    *OUT,
)


def dense(stem: str = "mlp") -> Rows:
    """A gated MLP below `stem`."""
    return (
        *(Row(f"{stem}.{n}_proj.weight", (f"mixer.{n}.weight",)) for n in ("gate", "up", "down")),
        *(Row(f"{stem}.{n}_proj.bias", (f"mixer.{n}.bias",)) for n in ("gate", "up")),
        Row(f"{stem}.down_proj.bias", ("mixer.bias",)),
    )


def joined_dense(gate_up: str, down: str, mixer: str = "mixer") -> Rows:
    """A gated MLP whose gate and up are one tensor; mixer: its place here."""
    return (
        Row(f"{gate_up}.weight", (f"{mixer}.gate.weight", f"{mixer}.up.weight")),
        Row(f"{down}.weight", (f"{mixer}.down.weight",)),
    )


PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def listed_experts(stem: str, names: Mapping[str, str] = PROJECTIONS) -> Rows:
    """A router and experts that files list one by one, below `stem`, with a shared one where there is one."""
    return (
        Row(f"{stem}.gate.weight", ("mixer.router.weight",)),
        Row(f"{stem}.gate.e_score_correction_bias", ("mixer.expert_bias",)),
        *(Row(f"{stem}.experts.{{e}}.{names[n]}.weight", (f"mixer.experts.{n}",)) for n in names),
        *(Row(f"{stem}.shared_experts.{n}_proj.weight", (f"mixer.shared.{n}.weight",)) for n in names),
    )


# Granite's experts, stacked, gate and up in one tensor, and its shared one.
STACKED: Rows = (
    Row("block_sparse_moe.router.layer.weight", ("mixer.router.weight",)),
    Row("block_sparse_moe.input_linear.weight", ("mixer.experts.gate", "mixer.experts.up"), dim=1),
    Row("block_sparse_moe.output_linear.weight", ("mixer.experts.down",)),
)
GRANITE_SHARED = joined_dense("shared_mlp.input_linear", "shared_mlp.output_linear", "mixer.shared")
GRANITE_DENSE = joined_dense("shared_mlp.input_linear", "shared_mlp.output_linear")

# Multi-head latent attention.
LATENT: Rows = (
    Row("self_attn.q_proj.weight", ("mixer.q.weight",)),
    Row("self_attn.q_a_proj.weight", ("mixer.q_down",)),
    Row("self_attn.q_a_proj.bias", ("mixer.q_down_bias",)),
    Row("self_attn.q_a_layernorm.weight", ("mixer.q_norm",)),
    Row("self_attn.q_b_proj.weight", ("mixer.q_up.weight",)),
    Row("self_attn.kv_a_proj_with_mqa.weight", ("mixer.kv_down",)),
    Row("self_attn.kv_a_proj_with_mqa.bias", ("mixer.kv_down_bias",)),
    Row("self_attn.kv_a_layernorm.weight", ("mixer.kv_norm",)),
    Row("self_attn.kv_b_proj.weight", ("mixer.kv_up.weight",)),
    *OUT[:2],
)
# gpt-oss's experts: stacked, input features first, features of gate and up taking turns; all with biases.
GATE_UP = ("mixer.experts.gate", "mixer.experts.up")
CLAMPED: Rows = (
    Row("mlp.router.weight", ("mixer.router.weight",)),
    Row("mlp.router.bias", ("mixer.router.bias",)),
    Row("mlp.experts.gate_up_proj", GATE_UP, dim=1, mixed=True, flipped=True),
    Row("mlp.experts.gate_up_proj_bias", tuple(f"{name}_bias" for name in GATE_UP), dim=1, mixed=True),
    Row("mlp.experts.down_proj", ("mixer.experts.down",), dim=1, flipped=True),
    Row("mlp.experts.down_proj_bias", ("mixer.experts.down_bias",)),
)
SINKS: Rows = (Row("self_attn.sinks", ("mixer.sinks",)),)

FIRST, SECOND = norms("input_layernorm"), norms("post_attention_layernorm")

# Rows of each kind of layer: below model.layers.N there, below layers.2N or layers.2N+1 here.
TABLE: dict[str, Rows] = {
    "M": (*FIRST, *mamba_rows("mamba")),
    "*": (*FIRST, *APART),
    "-": (*SECOND, *dense()),
    "E": (*SECOND, *listed_experts("mlp")),
}


def block_rows(cfg: LLMConfig, table: dict[str, Rows], outside: Rows) -> list[TableRow]:
    """The rows of a model in blocks of two layers; table: those of each kind of layer."""
    out = [(row, "", "") for row in outside]
    for i, symbol in enumerate(cfg.symbols):
        out += [(row, f"model.layers.{i // 2}.", f"layers.{i}.") for row in table[symbol]]
    return out


def stored_speeds(key: str, cfg: LLMConfig) -> bool:
    """Tables of rotary speeds, which older files hold though they follow from config.json."""
    return key.endswith("rotary_emb.inv_freq")


def one_block_more(key: str, cfg: LLMConfig) -> bool:
    """The block of multi-token prediction behind the last block, which transformers leaves out too."""
    return stored_speeds(key, cfg) or key.startswith(f"model.layers.{len(cfg.symbols) // 2}.")

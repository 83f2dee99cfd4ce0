"""Tensors of a published Nemotron-H checkpoint and our parameters: one table, read in both directions.

Published checkpoints fuse the input projections and the convolutions of Mamba-2; here each is a parameter of
its own, which tp shards evenly. They list experts one by one; here experts are stacked for grouped products.
"""

from __future__ import annotations

from llm.config import LLMConfig
from parallel.published import Row

OUTSIDE = (
    Row("backbone.embeddings.weight", ("embed.weight",)),
    Row("backbone.norm_f.weight", ("norm.weight",)),
    Row("lm_head.weight", ("head",)),
)

# Below backbone.layers.N there and layers.N here. A table, so its rows are alike in form.
LAYER: dict[str, tuple[Row, ...]] = {
    "M": (
        Row("norm.weight", ("norm.weight",)),
        Row("mixer.in_proj.weight", tuple(f"mixer.in_{n}" for n in ("z", "x", "b", "c", "dt"))),
        Row("mixer.conv1d.weight", tuple(f"mixer.conv_{n}" for n in ("x", "b", "c")), tail=(1, -1)),
        Row("mixer.conv1d.bias", tuple(f"mixer.conv_bias_{n}" for n in ("x", "b", "c"))),
        Row("mixer.A_log", ("mixer.scalars.a_log",)),
        Row("mixer.D", ("mixer.scalars.d",)),
        Row("mixer.dt_bias", ("mixer.scalars.dt_bias",)),
        Row("mixer.norm.weight", ("mixer.norm",)),
        Row("mixer.out_proj.weight", ("mixer.out.weight",)),
    ),
    "*": (
        Row("norm.weight", ("norm.weight",)),
        Row("mixer.q_proj.weight", ("mixer.q",)),
        Row("mixer.k_proj.weight", ("mixer.k",)),
        Row("mixer.v_proj.weight", ("mixer.v",)),
        Row("mixer.o_proj.weight", ("mixer.out.weight",)),
    ),
    "E": (
        Row("norm.weight", ("norm.weight",)),
        Row("mixer.gate.weight", ("mixer.router.weight",)),
        Row("mixer.gate.e_score_correction_bias", ("mixer.expert_bias",)),
        Row("mixer.experts.{e}.up_proj.weight", ("mixer.experts.up",)),
        Row("mixer.experts.{e}.down_proj.weight", ("mixer.experts.down",)),
        Row("mixer.fc1_latent_proj.weight", ("mixer.latent_in.weight",)),
        Row("mixer.fc2_latent_proj.weight", ("mixer.latent_out.weight",)),
        Row("mixer.shared_experts.up_proj.weight", ("mixer.shared.up.weight",)),
        Row("mixer.shared_experts.up_proj.bias", ("mixer.shared.up.bias",)),
        Row("mixer.shared_experts.down_proj.weight", ("mixer.shared.down.weight",)),
        Row("mixer.shared_experts.down_proj.bias", ("mixer.shared.bias",)),
    ),
    "-": (
        Row("norm.weight", ("norm.weight",)),
        Row("mixer.up_proj.weight", ("mixer.up.weight",)),
        Row("mixer.up_proj.bias", ("mixer.up.bias",)),
        Row("mixer.down_proj.weight", ("mixer.down.weight",)),
        Row("mixer.down_proj.bias", ("mixer.bias",)),
    ),
}

# The block of multi-token prediction: below its first and its last layer there, below mtp here.
MTP_FIRST = (
    Row("enorm.weight", ("embed_norm.weight",)),
    Row("hnorm.weight", ("hidden_norm.weight",)),
    Row("eh_proj.weight", ("join.weight",)),
)
MTP_LAST = (Row("final_layernorm.weight", ("norm.weight",)),)


def table_rows(cfg: LLMConfig) -> list[tuple[Row, str, str]]:
    """(row, prefix there, prefix here) of every tensor that a model of this config may have."""
    rows = [(row, "", "") for row in OUTSIDE]
    for i, symbol in enumerate(cfg.symbols):
        rows += [(row, f"backbone.layers.{i}.", f"layers.{i}.") for row in LAYER[symbol]]
    if cfg.mtp_layers:
        rows += [(row, "mtp.layers.0.", "mtp.") for row in MTP_FIRST]
        for i, symbol in enumerate(cfg.mtp_pattern):
            rows += [(row, f"mtp.layers.{i}.", f"mtp.layers.{i}.") for row in LAYER[symbol]]
        rows += [(row, f"mtp.layers.{len(cfg.mtp_pattern) - 1}.", "mtp.") for row in MTP_LAST]
    return rows

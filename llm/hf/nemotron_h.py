"""The Nemotron-H family: config.json from one table of fields, tensors from another. Pure.

Published checkpoints fuse the input projections and the convolutions of Mamba-2; here each is a parameter of
its own, which tp shards evenly. They list experts one by one; here experts are stacked for grouped products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm.checks import check
from llm.config import LLMConfig
from llm.hf.family import Data, Family, Field, TableRow
from parallel.published.tables import Row

# Names of layer kinds in config.json, the newest first; older ones are read too.
KIND_NAMES = {
    "M": ("linear_attention", "mamba"),
    "E": ("moe",),
    "*": ("full_attention", "attention"),
    "-": ("mlp",),
}


# Defaults are those of the published configuration class, which writes only differences from them.
# A table, so its rows are alike in form.
FIELDS = (
    Field("vocab_size", "vocab_size", 131072),
    Field("d_model", "hidden_size", 4096),
    Field("norm_eps", "layer_norm_epsilon", 1e-5),
    Field("init_std", "initializer_range", 0.02),
    Field("n_heads", "num_attention_heads", 32, "*"),
    Field("n_kv_heads", "num_key_value_heads", 8, "*"),
    Field("head_dim", "head_dim", 128, "*"),
    Field("mamba_heads", "mamba_num_heads", 128, "M"),
    Field("mamba_head_dim", "mamba_head_dim", 64, "M"),
    Field("mamba_state", "ssm_state_size", 128, "M"),
    Field("mamba_groups", "n_groups", 8, "M"),
    Field("conv_kernel", "conv_kernel", 4, "M"),
    Field("chunk", "chunk_size", 128, "M"),
    Field("n_experts", "n_routed_experts", 8, "E"),
    Field("top_k", "num_experts_per_tok", 2, "E"),
    Field("expert_ffn", "moe_intermediate_size", 7688, "E"),
    Field("shared_ffn", "moe_shared_expert_intermediate_size", 7688, "E"),
    Field("latent", "moe_latent_size", None, "E"),
    Field("routed_scale", "routed_scaling_factor", 1.0, "E"),
    Field("norm_top_k", "norm_topk_prob", True, "E"),
    Field("expert_groups", "n_group", 1, "E"),
    Field("top_groups", "topk_group", 1, "E"),
    Field("mlp_ffn", "intermediate_size", 21504, "-"),
    Field("mlp_bias", "mlp_bias", False, "E-"),
)

# Names of fields in some versions of the published class -> their names above.
ALIASES = {
    "layer_types": "layers_block_type",
    "num_local_experts": "n_routed_experts",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_chunk_size": "chunk_size",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_limit": "time_step_limit",
}

ACTIVATIONS = {"relu2": "relu2", "silu": "silu", "gelu": "gelu"}

# Options that our model does not have: theirs -> the value needed, which is also that of a file without it.
# attention_bias and rope_theta are in published files, but the published code uses neither.
FIXED: dict[str, Any] = {
    "tie_word_embeddings": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "mamba_hidden_act": "silu",
    "n_shared_experts": 1,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}


def read(data: Data) -> LLMConfig:
    """The model that config.json describes.

    Fields of layer kinds that are not in the pattern keep our defaults. mtp_layers is the number of stored
    blocks, one at most. The file does not give how often the block is applied; mtp_layers may be raised for
    the same weights. Raises ValueError, with the value needed, where our model cannot be it.
    """
    data = {ALIASES.get(theirs, theirs): value for theirs, value in data.items()}
    for theirs, needed in FIXED.items():
        given = data.get(theirs, needed)
        if given != needed:
            raise ValueError(f"config.json has {theirs}={given!r}; needed: {needed!r}")
    time_steps_are_free(data)
    pattern = _pattern(data, "hybrid_override_pattern", "layers_block_type")
    if pattern is None:
        raise ValueError("config.json has neither hybrid_override_pattern nor layers_block_type")
    stored = data.get("num_nextn_predict_layers") or 0
    if stored > 1:
        raise ValueError(
            f"config.json has num_nextn_predict_layers={stored}; needed: one stored block or none"
        )
    mtp_pattern = _pattern(data, "mtp_hybrid_override_pattern", "mtp_layers_block_type") or "*E"
    cfg = LLMConfig(pattern=pattern, mtp_layers=stored, mtp_pattern=mtp_pattern)
    used = {f.ours: data.get(f.theirs, f.default) for f in FIELDS if cfg.kinds & set(f.kinds)}
    for f in FIELDS:
        if used.get(f.ours, f.default) is None and f.default is not None:
            raise ValueError(f"config.json has {f.theirs}=null; needed: a value, such as {f.default!r}")
    used["activation"] = data.get("mlp_hidden_act", "relu2")
    if used["activation"] not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"config.json has mlp_hidden_act={used['activation']!r}; known: {known}")
    if used.get("mlp_bias") and used.get("latent"):
        raise ValueError(
            "config.json has mlp_bias with moe_latent_size; needed: latent projections without bias"
        )
    cfg = replace(cfg, **used)
    check(cfg)
    return cfg


def write(cfg: LLMConfig) -> dict[str, Any]:
    """config.json of a model, without options that only training reads (balance losses, capacity)."""
    if "E" in cfg.kinds and not cfg.shared_ffn:
        raise ValueError("shared_ffn=0; needed: a shared expert")
    out: dict[str, Any] = dict(FIXED)
    # Both spellings: a reader of one ignores the other.
    out["hybrid_override_pattern"] = cfg.symbols
    out["layers_block_type"] = [KIND_NAMES[s][0] for s in cfg.symbols]
    out["num_hidden_layers"] = len(cfg.symbols)
    out["mlp_hidden_act"] = cfg.activation
    out["attention_bias"] = False
    out |= {f.theirs: getattr(cfg, f.ours) for f in FIELDS if cfg.kinds & set(f.kinds)}
    out["num_nextn_predict_layers"] = min(cfg.mtp_layers, 1)
    if cfg.mtp_layers:
        out["mtp_hybrid_override_pattern"] = cfg.mtp_pattern
        out["mtp_layers_block_type"] = [KIND_NAMES[s][0] for s in cfg.mtp_pattern]
    return out


def time_steps_are_free(data: Data) -> None:
    """Refuse a config.json that clamps the time steps of Mamba-2, which ours does not."""
    limits = [_number(x) for x in data.get("time_step_limit") or (0.0, math.inf)]
    if limits != [0.0, math.inf]:
        raise ValueError(
            f"config.json clamps time steps to {limits}; needed: time_step_limit=[0.0, Infinity]"
        )


def _number(value: Any) -> float:
    """A float; files may write infinity as an object, for which JSON has no number."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def _pattern(data: Mapping[str, Any], as_string: str, as_list: str) -> str | None:
    """One symbol a layer, from either of the two spellings; None where the file has neither."""
    if data.get(as_string) is not None:
        return str(data[as_string])
    names = data.get(as_list)
    if names is None:
        return None
    symbols = {name: symbol for symbol, known in KIND_NAMES.items() for name in known}
    unknown = sorted({str(n) for n in names} - symbols.keys())
    if unknown:
        raise ValueError(f"config.json has {unknown[0]!r} in {as_list}; known: {', '.join(symbols)}")
    return "".join(symbols[n] for n in names)


OUTSIDE = (
    Row("backbone.embeddings.weight", ("embed.weight",)),
    Row("backbone.norm_f.weight", ("norm.weight",)),
    Row("lm_head.weight", ("head",)),
)


def mamba_rows(stem: str) -> tuple[Row, ...]:
    """The mixer of Mamba-2 below `stem`."""
    return (
        Row(f"{stem}.in_proj.weight", tuple(f"mixer.in_{n}" for n in ("z", "x", "b", "c", "dt"))),
        Row(f"{stem}.conv1d.weight", tuple(f"mixer.conv_{n}" for n in ("x", "b", "c")), tail=(1, -1)),
        Row(f"{stem}.conv1d.bias", tuple(f"mixer.conv_bias_{n}" for n in ("x", "b", "c"))),
        Row(f"{stem}.A_log", ("mixer.scalars.a_log",)),
        Row(f"{stem}.D", ("mixer.scalars.d",)),
        Row(f"{stem}.dt_bias", ("mixer.scalars.dt_bias",)),
        Row(f"{stem}.norm.weight", ("mixer.norm",)),
        Row(f"{stem}.out_proj.weight", ("mixer.out.weight",)),
    )


# Below backbone.layers.N there and layers.N here. A table, so its rows are alike in form.
LAYER: dict[str, tuple[Row, ...]] = {
    "M": (Row("norm.weight", ("norm.weight",)), *mamba_rows("mixer")),
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


def rows(cfg: LLMConfig) -> list[TableRow]:
    """(row, prefix there, prefix here) of every tensor that a model of this config may have."""
    out = [(row, "", "") for row in OUTSIDE]
    for i, symbol in enumerate(cfg.symbols):
        out += [(row, f"backbone.layers.{i}.", f"layers.{i}.") for row in LAYER[symbol]]
    if cfg.mtp_layers:
        out += [(row, "mtp.layers.0.", "mtp.") for row in MTP_FIRST]
        for i, symbol in enumerate(cfg.mtp_pattern):
            out += [(row, f"mtp.layers.{i}.", f"mtp.layers.{i}.") for row in LAYER[symbol]]
        out += [(row, f"mtp.layers.{len(cfg.mtp_pattern) - 1}.", "mtp.") for row in MTP_LAST]
    return out


NEMOTRON_H = Family(
    "nemotron_h",
    "Nemotron-H",
    "NemotronH",
    read,
    write,
    rows,
    stem="backbone.",
    embedding="backbone.embeddings.weight",
    selection_bias=True,
)

"""The vision towers of Qwen2.5-VL, Qwen3-VL and Qwen3.5: their config.json, tensors, processors' outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from encoders.contract import Encoder
from encoders.hf.family import Family, Part, Rows
from encoders.hf.maps import blocks, both, fused, row_parallel, rows
from encoders.hf.processor import encoder_config, packed_batch, pictures, videos
from encoders.hf.vision import activation, fields, square
from encoders.vision import families
from encoders.vision.tokens import Grid, window_order
from parallel.published import Row
from parallel.sequence.host import to_device

BLOCK = [
    *both("norm1", "norm1"),
    *fused("attn.qkv"),
    *row_parallel("attn.proj", "attention.out"),
    *both("norm2", "norm2"),
]
GATED = [
    *both("mlp.gate_proj", "mlp.gate"),
    *both("mlp.up_proj", "mlp.up"),
    *row_parallel("mlp.down_proj", "mlp.down"),
]
PLAIN = [*both("mlp.linear_fc1", "mlp.up"), *row_parallel("mlp.linear_fc2", "mlp.down")]


# Fields of both towers; each class has defaults of its own.
SIZES: dict[str, tuple[str, Any]] = {
    "width": ("hidden_size", None),
    "heads": ("num_heads", None),
    "layers": ("depth", None),
    "mlp": ("intermediate_size", None),
    "channels": ("in_channels", None),
    "merge": ("spatial_merge_size", None),
    "merged": ("out_hidden_size", None),
}


def packed_features(encoder: Encoder, inputs: Mapping[str, Any]) -> Tensor:
    """Last hidden state [patches, width] of pixel_values with image_grid_thw, or of pixel_values_videos with
    video_grid_thw; of Qwen2.5-VL window by window, as its class gives it."""
    vision, cfg = encoder_config(encoder)
    kind = "image" if "image_grid_thw" in inputs else "video"
    values = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
    grids = inputs[f"{kind}_grid_thw"].tolist()
    states = vision.states(packed_batch(values, grids))
    if not cfg.window:
        return states
    orders = [window_order(Grid(*g), cfg.window, cfg.merge) for g in grids]
    first = np.cumsum([0, *(len(x) for x in orders)])
    index = np.concatenate([x + n for x, n in zip(orders, first, strict=False)] or [first[:0]])
    squares = states.view(-1, cfg.merge**2, cfg.width)
    return squares.index_select(0, to_device(index, states.device)).view(-1, cfg.width)


def options(part: Part, defaults: Any) -> dict[str, Any]:
    """What both towers say alike. defaults: the family's Config."""
    rope = part.field("rope_parameters", {})
    return {
        **fields(part, {ours: (theirs, getattr(defaults, ours)) for ours, (theirs, _) in SIZES.items()}),
        "patch": square(part, "patch_size", defaults.patch),
        "frames": square(part, "temporal_patch_size", defaults.frames),
        "rope_base": rope.get("rope_theta", 10000.0),
        "pictures": pictures(part, defaults.pictures),
        "videos": videos(part, defaults.videos),
    }


def qwen25_options(part: Part) -> dict[str, Any]:
    out = options(part, families.Qwen25VLConfig())
    side = out["patch"] * out["merge"]
    return {
        **out,
        "activation": activation(part, "silu"),
        "window": part.field("window_size", 112) // side * out["merge"],
        "full_layers": tuple(part.field("fullatt_block_indexes", (7, 15, 23, 31))),
        "tokens_per_second": part.field("tokens_per_second", 4),
    }


def patch_row(cfg: Any) -> Row:
    """The embedding of patches, a convolution over time too."""
    return Row("patch_embed.proj.weight", ("patch.weight",), (cfg.channels, cfg.frames, cfg.patch, cfg.patch))


def qwen25_rows(cfg: Any) -> Rows:
    return [
        (patch_row(cfg), "", ""),
        *blocks([*BLOCK, *GATED], cfg.layers, "blocks.{n}."),
        *rows([("merger.ln_q.weight", ("merger.norm.weight",))]),
        *rows(both("merger.mlp.0", "merger.up")),
        *rows(row_parallel("merger.mlp.2", "merger.down")),
    ]


QWEN25 = Family(
    encoder="qwen2_5_vl",
    model_types=("qwen2_5_vl_vision", "qwen2_5_vl"),
    probe="patch_embed.proj.weight",
    options=qwen25_options,
    rows=qwen25_rows,
    unused=(),
    features=packed_features,
    free=("pictures", "videos"),
)


def qwen3_options(part: Part) -> dict[str, Any]:
    count = part.field("num_position_embeddings", 2304)
    plain = str(part.config.get("model_type")).startswith("qwen3_5")
    return {
        **options(part, families.Qwen3VLConfig()),
        "activation": activation(part, "gelu_pytorch_tanh"),
        "table": math.isqrt(count),
        "levels": () if plain else tuple(part.field("deepstack_visual_indexes", (8, 16, 24))),
    }


def merger(there: str, here: str) -> Rows:
    """An MLP that merges patches."""
    return [
        *rows(both(f"{there}.norm", f"{here}.norm")),
        *rows(both(f"{there}.linear_fc1", f"{here}.up")),
        *rows(row_parallel(f"{there}.linear_fc2", f"{here}.down")),
    ]


def qwen3_rows(cfg: Any) -> Rows:
    out: Rows = [
        (patch_row(cfg), "", ""),
        *rows([("patch_embed.proj.bias", ("patch.bias",)), ("pos_embed.weight", ("position",))]),
        *blocks([*BLOCK, *PLAIN], cfg.layers, "blocks.{n}."),
        *merger("merger", "merger"),
    ]
    for j in range(len(cfg.levels)):
        out += merger(f"deepstack_merger_list.{j}", f"level_mergers.{j}")
    return out


QWEN3 = Family(
    encoder="qwen3_vl",
    model_types=(
        "qwen3_vl_vision",
        "qwen3_vl_moe_vision",
        "qwen3_5_vision",
        "qwen3_5_moe_vision",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen3_5",
        "qwen3_5_moe",
    ),
    probe="patch_embed.proj.weight",
    options=qwen3_options,
    rows=qwen3_rows,
    unused=(),
    features=packed_features,
    free=("pictures", "videos"),
)

FAMILIES = (QWEN25, QWEN3)

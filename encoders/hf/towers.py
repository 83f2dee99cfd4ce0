"""The vision towers of InternVL and Pixtral: their config.json and tensors."""

from __future__ import annotations

from typing import Any

from encoders.hf.family import Family, Part, Rows
from encoders.hf.maps import blocks, both, row_parallel, rows, separate
from encoders.hf.processor import dense_features, pictures, sized_features
from encoders.hf.vision import FREE, activation, biases, class_rows, convolution, fields, sized, square
from encoders.vision import families
from parallel.published import Row

SIZES = {
    "width": ("hidden_size", 1024),
    "heads": ("num_attention_heads", 16),
    "layers": ("num_hidden_layers", 24),
    "channels": ("num_channels", 3),
    "mlp": ("intermediate_size", 4096),
}
NORMS = {"layer_norm": "layer", "rms_norm": "rms"}


def internvl_options(part: Part) -> dict[str, Any]:
    if part.field("use_qk_norm", False):
        raise ValueError("config.json has use_qk_norm=true, as InternViT-6B has; needed: false")
    if not part.field("use_absolute_position_embeddings", True):
        raise ValueError("config.json has use_absolute_position_embeddings=false; needed: true")
    norm, pooled = part.field("norm_type", "layer_norm"), part.field("use_mean_pooling", True)
    if norm not in NORMS or (norm == "rms_norm" and not pooled):
        raise ValueError(
            f"config.json has norm_type={norm!r}, use_mean_pooling={pooled}; needed: layer_norm, or rms_norm "
            "with mean pooling"
        )
    qkv = {n: ("attention_bias", False) for n in "qkv"}
    return {
        **fields(part, {**SIZES, "eps": ("layer_norm_eps", 1e-6)}),
        "activation": activation(part, "gelu"),
        "biases": biases(part, qkv, ("patch", "out", "mlp")),
        "norm": NORMS[norm],
        "single": norm == "rms_norm",
        "final_norm": not pooled,
        **sized(part, families.InternVLConfig().pictures, 14, 448),
    }


INTERNVL_BLOCK = [
    *both("layernorm_before", "norm1"),
    *separate([f"attention.{n}_proj" for n in "qkv"]),
    *row_parallel("attention.projection_layer", "attention.out"),
    ("lambda_1", ("scale1",)),
    *both("layernorm_after", "norm2"),
    *both("mlp.fc1", "mlp.up"),
    *row_parallel("mlp.fc2", "mlp.down"),
    ("lambda_2", ("scale2",)),
]

INTERNVL = Family(
    encoder="internvl",
    model_types=("internvl_vision", "internvl"),
    probe="embeddings.patch_embeddings.projection.weight",
    options=internvl_options,
    rows=lambda cfg: class_rows(cfg, INTERNVL_BLOCK, "encoder.layer.{n}.", "layernorm"),
    unused=(r"embeddings\.mask_token",),
    features=dense_features,
    free=FREE,
)


def pixtral_options(part: Part) -> dict[str, Any]:
    rope = part.field("rope_parameters", {})
    return {
        **fields(part, SIZES),
        "activation": activation(part, "gelu"),
        "patch": square(part, "patch_size", 16),
        "rope_base": rope.get("rope_theta", part.field("rope_theta", 10000.0)),
        "pictures": pictures(part, families.PixtralConfig().pictures),
    }


PIXTRAL_BLOCK = [
    ("attention_norm.weight", ("norm1.weight",)),
    *separate([f"attention.{n}_proj" for n in "qkv"]),
    ("attention.o_proj.weight", ("attention.out.weight",)),
    ("ffn_norm.weight", ("norm2.weight",)),
    *[(f"feed_forward.{n}_proj.weight", (f"mlp.{n}.weight",)) for n in ("gate", "up", "down")],
]


def pixtral_rows(cfg: Any) -> Rows:
    return [
        (Row("patch_conv.weight", ("patch.weight",), convolution(cfg)), "", ""),
        *rows([("ln_pre.weight", ("pre_norm.weight",))]),
        *blocks(PIXTRAL_BLOCK, cfg.layers, "transformer.layers.{n}."),
    ]


PIXTRAL = Family(
    encoder="pixtral",
    model_types=("pixtral",),
    probe="patch_conv.weight",
    options=pixtral_options,
    rows=pixtral_rows,
    unused=(),
    features=sized_features,
    free=FREE,
)

FAMILIES = (INTERNVL, PIXTRAL)

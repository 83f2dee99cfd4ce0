"""Published vision families: their config.json, their tensors, their processors' outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from encoders.contract import Encoder, ItemBatch, Meta
from encoders.hf.family import Family, Part, Rows
from encoders.vision.model import VisionTransformer
from encoders.vision.pictures import patches_of
from parallel.published import Row, Shape

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}
FREE = ("pictures", "layers", "final_norm", "prefix_rows")


def fields(part: Part, names: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Options from fields of config.json. names: by option, the field and the value where it is absent."""
    return {ours: part.field(theirs, default) for ours, (theirs, default) in names.items()}


def activation(part: Part, default: str, field: str = "hidden_act") -> str:
    """Our name of the activation. Raises ValueError for one that ours has not."""
    given = part.field(field, default)
    if given not in ACTIVATIONS:
        raise ValueError(f"config.json has {field}={given!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[given]


def square(part: Part, field: str, default: int) -> int:
    """A side in pixels that may be given as two. Raises ValueError where they differ."""
    given = part.field(field, default)
    sides = set(given) if isinstance(given, Sequence) else {given}
    if len(sides) != 1:
        raise ValueError(f"config.json has {field}={given}; needed: a square")
    return int(sides.pop())


SIZES = {
    "width": ("hidden_size", 768),
    "heads": ("num_attention_heads", 12),
    "layers": ("num_hidden_layers", 12),
    "mlp": ("intermediate_size", 3072),
    "channels": ("num_channels", 3),
}


def pixel_batch(cfg: Any, pixels: Tensor) -> ItemBatch:
    """pixel_values [n, channels, height, width] as a batch."""
    down, across = (cfg.merge * (size // cfg.side) for size in pixels.shape[-2:])
    meta: Meta = {"down": down, "across": across}
    values = (
        torch.cat([patches_of(cfg, x) for x in pixels]) if len(pixels) else pixels.new_zeros(0, cfg.inputs)
    )
    return ItemBatch(values, (down * across,) * len(pixels), (meta,) * len(pixels))


def dense_features(encoder: Encoder, inputs: Mapping[str, Any]) -> Tensor:
    """Last hidden state [n, tokens, width] of pixel_values."""
    assert isinstance(encoder, VisionTransformer)
    pixels = inputs["pixel_values"]
    tokens = encoder.states(pixel_batch(encoder.cfg, pixels))
    return tokens.view(len(pixels), -1, tokens.shape[-1]) if len(pixels) else tokens[None][:0]


def convolution(cfg: Any) -> Shape:
    """Dims after the first of a convolution's weight that embeds patches."""
    return (cfg.channels, cfg.patch, cfg.patch)


def blocks(rows: Sequence[tuple[str, tuple[str, ...]]], layers: int, there: str) -> Rows:
    """The rows of each block. rows: (linear map or norm there, here), whose weight and bias go together
    where it names no parameter of its own; there: the prefix, with the layer's number as {n}."""
    out: Rows = []
    for n in range(layers):
        out += [(Row(key, ours), there.format(n=n), f"blocks.{n}.") for key, ours in rows]
    return out


def both(there: str, here: str) -> list[tuple[str, tuple[str, ...]]]:
    """The weight and the bias of a map that is a module here."""
    return [(f"{there}.{kind}", (f"{here}.{kind}",)) for kind in ("weight", "bias")]


def row_parallel(there: str, here: str) -> list[tuple[str, tuple[str, ...]]]:
    """The weight and the bias of a map whose bias is added after the sum over tp: here = module.down."""
    return [(f"{there}.weight", (f"{here}.weight",)), (f"{there}.bias", (f"{here.rpartition('.')[0]}.bias",))]


def separate(there: str, names: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Queries, keys and values that are linear maps of their own there. names: of the three."""
    out: list[tuple[str, tuple[str, ...]]] = []
    for ours, theirs in zip("qkv", names, strict=True):
        out.append((f"{there}{theirs}.weight", (f"attention.{ours}",)))
        out.append((f"{there}{theirs}.bias", (f"attention.bias_{ours}",)))
    return out


def siglip_options(part: Part) -> dict[str, Any]:
    patch, size = square(part, "patch_size", 16), square(part, "image_size", 224)
    return {
        **fields(part, {**SIZES, "eps": ("layer_norm_eps", 1e-6)}),
        "activation": activation(part, "gelu_pytorch_tanh"),
        "patch": patch,
        "table": size // patch,
        "pictures": {"fit": "exact", "height": size, "width": size},
    }


CLIP_BLOCK = [
    *both("layer_norm1", "norm1"),
    *separate("self_attn.", ("q_proj", "k_proj", "v_proj")),
    *row_parallel("self_attn.out_proj", "attention.out"),
    *both("layer_norm2", "norm2"),
    *both("mlp.fc1", "mlp.up"),
    *row_parallel("mlp.fc2", "mlp.down"),
]


def siglip_rows(cfg: Any) -> Rows:
    return [
        (Row("embeddings.patch_embedding.weight", ("patch.weight",), convolution(cfg)), "", ""),
        (Row("embeddings.patch_embedding.bias", ("patch.bias",)), "", ""),
        (Row("embeddings.position_embedding.weight", ("position",)), "", ""),
        *blocks(CLIP_BLOCK, cfg.layers, "encoder.layers.{n}."),
        *[(Row(f"post_layernorm.{kind}", (f"norm.{kind}",)), "", "") for kind in ("weight", "bias")],
    ]


SIGLIP = Family(
    encoder="siglip",
    model_types=("siglip_vision_model", "siglip"),
    probe="embeddings.patch_embedding.weight",
    options=siglip_options,
    rows=siglip_rows,
    unused=(r"head\..*", r"embeddings\.position_ids"),
    features=dense_features,
    free=FREE,
)

FAMILIES = (SIGLIP,)

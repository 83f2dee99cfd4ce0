"""Published vision families: their config.json and their tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from encoders.hf.family import Family, Part, Rows
from encoders.hf.maps import Pairs, blocks, both, fused, row_parallel, rows, separate
from encoders.hf.processor import budget, dense_features, padded_features, pictures, radio_features
from encoders.vision import families
from encoders.vision.config import Pictures
from parallel.published import Row, Shape

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}
FREE = ("pictures", "videos", "layers", "final_norm", "prefix_rows", "merge", "levels")
SIZES = {
    "width": ("hidden_size", 768),
    "heads": ("num_attention_heads", 12),
    "layers": ("num_hidden_layers", 12),
    "channels": ("num_channels", 3),
}
MLP = {"mlp": ("intermediate_size", 3072)}


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


def sized(part: Part, default: Pictures, patch: int, image: int = 224) -> dict[str, Any]:
    """Patch, table and pictures of a family that is trained at one size."""
    patch, size = square(part, "patch_size", patch), square(part, "image_size", image)
    edge = max(size, default.edge) if default.fit == "crop" else size
    fitted = Pictures(**{**vars(default), "height": size, "width": size, "edge": edge})
    return {"patch": patch, "table": size // patch, "pictures": pictures(part, fitted)}


def biases(part: Part, names: Mapping[str, tuple[str, bool]], always: tuple[str, ...]) -> tuple[str, ...]:
    """The maps that have a bias: those of `always`, and those whose field of config.json says so."""
    return (*always, *(ours for ours, (theirs, default) in names.items() if part.field(theirs, default)))


def convolution(cfg: Any) -> Shape:
    """Dims after the first of a convolution's weight that embeds patches."""
    return (cfg.channels, cfg.patch, cfg.patch)


def patch_rows(key: str, tail: Shape = ()) -> Rows:
    """The embedding of patches."""
    return [
        (Row(f"{key}.weight", ("patch.weight",), tail), "", ""),
        (Row(f"{key}.bias", ("patch.bias",)), "", ""),
    ]


CLIP_BLOCK = [
    *both("layer_norm1", "norm1"),
    *separate([f"self_attn.{n}_proj" for n in "qkv"]),
    *row_parallel("self_attn.out_proj", "attention.out"),
    *both("layer_norm2", "norm2"),
    *both("mlp.fc1", "mlp.up"),
    *row_parallel("mlp.fc2", "mlp.down"),
]


def siglip_options(part: Part) -> dict[str, Any]:
    return {
        **fields(part, {**SIZES, **MLP, "eps": ("layer_norm_eps", 1e-6)}),
        "activation": activation(part, "gelu_pytorch_tanh"),
        **sized(part, families.SiglipConfig().pictures, 16),
    }


def siglip_rows(cfg: Any) -> Rows:
    return [
        *patch_rows("embeddings.patch_embedding", () if cfg.channels_last else convolution(cfg)),
        *rows([("embeddings.position_embedding.weight", ("position",))]),
        *blocks(CLIP_BLOCK, cfg.layers, "encoder.layers.{n}."),
        *rows(both("post_layernorm", "norm")),
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


def siglip2_options(part: Part) -> dict[str, Any]:
    count = part.field("num_patches", 256)
    side = round(count**0.5)
    if side**2 != count:
        raise ValueError(f"config.json has num_patches={count}; needed: a square number")
    return {
        **fields(part, {**SIZES, **MLP, "eps": ("layer_norm_eps", 1e-6)}),
        "activation": activation(part, "gelu_pytorch_tanh"),
        "patch": square(part, "patch_size", 16),
        "table": side,
        "pictures": pictures(part, families.Siglip2Config().pictures),
    }


SIGLIP2 = Family(
    encoder="siglip2",
    model_types=("siglip2_vision_model", "siglip2"),
    probe="embeddings.patch_embedding.weight",
    options=siglip2_options,
    rows=siglip_rows,
    unused=(r"head\..*",),
    features=padded_features,
    free=FREE,
)


def clip_options(part: Part) -> dict[str, Any]:
    return {
        **fields(part, {**SIZES, **MLP, "eps": ("layer_norm_eps", 1e-5)}),
        "activation": activation(part, "quick_gelu"),
        **sized(part, families.ClipConfig().pictures, 32),
    }


def clip_rows(cfg: Any) -> Rows:
    return [
        *patch_rows("embeddings.patch_embedding", convolution(cfg)),
        (Row("embeddings.class_embedding", ("class_token",), lead=-1), "", ""),
        *rows([("embeddings.position_embedding.weight", ("position",))]),
        *rows(both("pre_layrnorm", "pre_norm")),
        *blocks(CLIP_BLOCK, cfg.layers, "encoder.layers.{n}."),
    ]


CLIP = Family(
    encoder="clip",
    model_types=("clip_vision_model", "clip"),
    probe="embeddings.patch_embedding.weight",
    options=clip_options,
    rows=clip_rows,
    unused=(r"post_layernorm\..*", r"embeddings\.position_ids"),
    features=dense_features,
    free=FREE,
)

VIT_ATTENTION = [
    *separate([f"attention.attention.{n}" for n in ("query", "key", "value")]),
    *row_parallel("attention.output.dense", "attention.out"),
]
VIT_BLOCK = [
    *both("layernorm_before", "norm1"),
    *VIT_ATTENTION,
    *both("layernorm_after", "norm2"),
    *both("intermediate.dense", "mlp.up"),
    *row_parallel("output.dense", "mlp.down"),
]
QKV_BIAS = {n: ("qkv_bias", True) for n in "qkv"}


def image_vit_options(part: Part) -> dict[str, Any]:
    return {
        **fields(part, {**SIZES, **MLP, "eps": ("layer_norm_eps", 1e-12)}),
        "activation": activation(part, "gelu"),
        "biases": biases(part, QKV_BIAS, ("patch", "out", "mlp")),
        **sized(part, families.ImageViTConfig().pictures, 16),
    }


def class_rows(cfg: Any, block: Pairs, there: str, norm: str) -> Rows:
    """The tensors of ViT and DINOv2, whose tables and tokens have a batch of one."""
    return [
        *patch_rows("embeddings.patch_embeddings.projection", convolution(cfg)),
        (Row("embeddings.cls_token", ("class_token",), lead=1), "", ""),
        (Row("embeddings.register_tokens", ("registers",), lead=1), "", ""),
        (Row("embeddings.position_embeddings", ("position",), lead=1), "", ""),
        *blocks(block, cfg.layers, there),
        *rows(both(norm, "norm")),
    ]


IMAGE_VIT = Family(
    encoder="image_vit",
    model_types=("vit",),
    probe="embeddings.patch_embeddings.projection.weight",
    options=image_vit_options,
    rows=lambda cfg: class_rows(cfg, VIT_BLOCK, "encoder.layer.{n}.", "layernorm"),
    unused=(r"pooler\..*", r"embeddings\.mask_token"),
    features=dense_features,
    free=FREE,
)


def swiglu(width: int) -> int:
    """Hidden width of a gated MLP: two thirds, rounded up to a multiple of 8."""
    return (int(width * 2 / 3) + 7) // 8 * 8


def dinov2_options(part: Part) -> dict[str, Any]:
    out = fields(part, {**SIZES, "eps": ("layer_norm_eps", 1e-6)})
    with_registers = part.config.get("model_type") == "dinov2_with_registers"
    out["registers"] = part.field("num_register_tokens", 4) if with_registers else 0
    hidden, gated = int(out["width"] * part.field("mlp_ratio", 4)), part.field("use_swiglu_ffn", False)
    size = 16 if with_registers else 14
    return {
        **out,
        "interpolation": "bicubic_antialias" if with_registers else "bicubic_single",
        "mlp": swiglu(hidden) if gated else hidden,
        "gated": gated,
        "activation": "silu" if gated else activation(part, "gelu"),
        "biases": biases(part, QKV_BIAS, ("patch", "out", "mlp")),
        **sized(part, families.Dinov2Config().pictures, size),
    }


DINOV2_BLOCK = [
    *both("norm1", "norm1"),
    *VIT_ATTENTION,
    ("layer_scale1.lambda1", ("scale1",)),
    *both("norm2", "norm2"),
    ("layer_scale2.lambda1", ("scale2",)),
]
DINOV2_MLP = [*both("mlp.fc1", "mlp.up"), *row_parallel("mlp.fc2", "mlp.down")]
DINOV2_GATED: Pairs = [
    *((f"mlp.weights_in.{k}", (f"mlp.gate.{k}", f"mlp.up.{k}")) for k in ("weight", "bias")),
    *row_parallel("mlp.weights_out", "mlp.down"),
]


def dinov2_rows(cfg: Any) -> Rows:
    block = [*DINOV2_BLOCK, *(DINOV2_GATED if cfg.gated else DINOV2_MLP)]
    return class_rows(cfg, block, "encoder.layer.{n}.", "layernorm")


DINOV2 = Family(
    encoder="dinov2",
    model_types=("dinov2", "dinov2_with_registers"),
    probe="embeddings.patch_embeddings.projection.weight",
    options=dinov2_options,
    rows=dinov2_rows,
    unused=(r"embeddings\.mask_token",),
    features=dense_features,
    free=FREE,
)


def dinov3_options(part: Part) -> dict[str, Any]:
    sizes = {**SIZES, "width": ("hidden_size", 384), "heads": ("num_attention_heads", 6)}
    named = {"q": ("query_bias", True), "k": ("key_bias", False), "v": ("value_bias", True)}
    named |= {"out": ("proj_bias", True), "mlp": ("mlp_bias", True)}
    taken = sized(part, families.Dinov3Config().pictures, 16)
    more = {"mlp": ("intermediate_size", 1536), "eps": ("layer_norm_eps", 1e-5)}
    more |= {"registers": ("num_register_tokens", 0), "gated": ("use_gated_mlp", False)}
    more |= {"rope_base": ("rope_theta", 100.0)}
    return {
        **fields(part, {**sizes, **more}),
        "activation": activation(part, "gelu"),
        "biases": biases(part, named, ("patch",)),
        "patch": taken["patch"],
        "pictures": taken["pictures"],
    }


DINOV3_BLOCK = [
    *both("norm1", "norm1"),
    *separate([f"attention.{n}_proj" for n in "qkv"]),
    *row_parallel("attention.o_proj", "attention.out"),
    ("layer_scale1.lambda1", ("scale1",)),
    *both("norm2", "norm2"),
    *both("mlp.gate_proj", "mlp.gate"),
    *both("mlp.up_proj", "mlp.up"),
    *row_parallel("mlp.down_proj", "mlp.down"),
    ("layer_scale2.lambda1", ("scale2",)),
]


def dinov3_rows(cfg: Any) -> Rows:
    return [
        *patch_rows("embeddings.patch_embeddings", convolution(cfg)),
        (Row("embeddings.cls_token", ("class_token",), lead=1), "", ""),
        (Row("embeddings.register_tokens", ("registers",), lead=1), "", ""),
        *blocks(DINOV3_BLOCK, cfg.layers, "layer.{n}."),
        *rows(both("norm", "norm")),
    ]


DINOV3 = Family(
    encoder="dinov3",
    model_types=("dinov3_vit",),
    probe="embeddings.patch_embeddings.weight",
    options=dinov3_options,
    rows=dinov3_rows,
    unused=(r"embeddings\.mask_token", r"rope_embeddings\..*"),
    features=dense_features,
    free=FREE,
    spellings=((r"^model\.layer\.", "layer."),),
)
RADIO_BLOCK = [
    *both("norm1", "norm1"),
    *fused("attn.qkv"),
    *row_parallel("attn.proj", "attention.out"),
    ("layer_scale1.lambda1", ("scale1",)),
    *both("norm2", "norm2"),
    *DINOV2_MLP,
    ("layer_scale2.lambda1", ("scale2",)),
]


def radio_options(part: Part) -> dict[str, Any]:
    """Layer scales that a folder lacks are 1; mean and std are those of its input conditioner."""
    if part.field("use_swiglu_ffn", False):
        raise ValueError("config.json has use_swiglu_ffn=true; needed: false")
    out = fields(
        part,
        {
            **SIZES,
            "width": ("hidden_size", 1280),
            "heads": ("num_attention_heads", 16),
            "layers": ("num_hidden_layers", 32),
            "eps": ("layer_norm_eps", 1e-6),
        },
    )
    patch = square(part, "patch_size", 16)
    prefix = part.field("num_cls_tokens", 3) + part.field("num_registers", 7)
    default = vars(families.RadioConfig().pictures)
    for ours in ("mean", "std"):
        default = {**default, ours: tuple(part.field(f"norm_{ours}", default[ours]))}
        key = part.prefix.removesuffix("model.") + f"input_conditioner.norm_{ours}"
        if key in part.folder.shapes():
            default[ours] = tuple(part.folder.read(key, ()).flatten().tolist())
    return {
        **out,
        "mlp": int(out["width"] * part.field("mlp_ratio", 4.0)),
        "activation": activation(part, "gelu"),
        "biases": biases(part, QKV_BIAS, ("out", "mlp")),
        "patch": patch,
        "class_tokens": prefix,
        "layer_scale": "blocks.0.layer_scale1.lambda1" in part.shapes(),
        "table": part.field("max_img_size", 2048) // patch,
        "pictures": budget(part, Pictures(**default), 2) or default,
    }


def radio_rows(cfg: Any) -> Rows:
    return [
        *patch_rows("patch_generator.embedder"),
        *rows([("patch_generator.cls_token.token", ("class_token",))]),
        (Row("patch_generator.pos_embed", ("position",), lead=1), "", ""),
        *blocks(RADIO_BLOCK, cfg.layers, "blocks.{n}."),
    ]


RADIO = Family(
    encoder="radio",
    model_types=("radio",),
    probe="patch_generator.embedder.weight",
    options=radio_options,
    rows=radio_rows,
    unused=(r"patch_generator\.video_embedder\..*",),
    features=radio_features,
    free=FREE,
)

FAMILIES = (SIGLIP, SIGLIP2, CLIP, IMAGE_VIT, DINOV2, DINOV3, RADIO)

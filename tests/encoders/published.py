"""Tiny random models of published vision families in transformers: the oracles of ours, and their folders."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tests.llm.oracle  # noqa: F401  makes transformers importable

import transformers  # isort: skip
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig  # isort: skip
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (  # isort: skip
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig  # isort: skip
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel  # isort: skip

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
MLP = {"intermediate_size": 36}
PATCH = {"patch_size": 4, "image_size": 16}
QWEN = {"depth": 4, "hidden_size": 24, "intermediate_size": 36, "num_heads": 3, "patch_size": 4}

# By name: the class, its config, and options of it.
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig, {**SIZES, **MLP, **PATCH}),
    "siglip2": (
        transformers.Siglip2VisionModel,
        transformers.Siglip2VisionConfig,
        {**SIZES, **MLP, "patch_size": 4, "num_patches": 16},
    ),
    "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig, {**SIZES, **MLP, **PATCH}),
    "image_vit": (transformers.ViTModel, transformers.ViTConfig, {**SIZES, **MLP, **PATCH}),
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config, {**SIZES, **PATCH, "mlp_ratio": 2}),
    "dinov2_giant": (
        transformers.Dinov2Model,
        transformers.Dinov2Config,
        {**SIZES, **PATCH, "mlp_ratio": 2, "use_swiglu_ffn": True},
    ),
    "dinov2_registers": (
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig,
        {**SIZES, **PATCH, "mlp_ratio": 2, "num_register_tokens": 2},
    ),
    "dinov3": (
        transformers.DINOv3ViTModel,
        transformers.DINOv3ViTConfig,
        {**SIZES, **MLP, **PATCH, "num_register_tokens": 2},
    ),
    "dinov3_gated": (
        transformers.DINOv3ViTModel,
        transformers.DINOv3ViTConfig,
        {**SIZES, **MLP, **PATCH, "use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 1},
    ),
    "radio": (
        transformers.RadioModel,
        transformers.RadioConfig,
        {**SIZES, **PATCH, "mlp_ratio": 2.0, "max_img_size": 24, "num_cls_tokens": 2, "num_registers": 3},
    ),
    "qwen2_5_vl": (
        Qwen2_5_VisionTransformerPretrainedModel,
        Qwen2_5_VLVisionConfig,
        {**QWEN, "out_hidden_size": 20, "window_size": 16, "fullatt_block_indexes": [1, 3]},
    ),
    "qwen3_vl": (
        Qwen3VLVisionModel,
        Qwen3VLVisionConfig,
        {**QWEN, "out_hidden_size": 20, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]},
    ),
}
NAMES = list(MODELS)


FLAGS = {
    "dinov3": ("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias", "use_gated_mlp"),
    "dinov2": ("qkv_bias", "use_swiglu_ffn"),
    "dinov2_registers": ("qkv_bias", "use_swiglu_ffn"),
    "image_vit": ("qkv_bias",),
    "radio": ("qkv_bias",),
}


def random_options(name: str, seed: int, most_heads: int = 5) -> dict[str, Any]:
    """Odd heads, biases there or not, gated or not, any patch; at least two layers of an even number of heads
    where at most two heads are wanted, for two ranks to share."""
    r = random.Random(f"{name}/{seed}")
    even = most_heads == 2
    heads, layers = 2 if even else r.randint(1, most_heads), r.randint(2 if even else 1, 3)
    patch = r.choice([2, 3, 5])
    options: dict[str, Any] = {"hidden_size": heads * r.choice([4, 8]), "patch_size": patch}
    if name.startswith("qwen"):
        options |= {"depth": layers, "num_heads": heads}
    else:
        options |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    if name == "qwen2_5_vl":
        options |= {"fullatt_block_indexes": [layers - 1], "window_size": 2 * patch * r.randint(1, 3)}
    if name == "qwen3_vl":
        options["deepstack_visual_indexes"] = r.choice([[], [0], list(range(layers))])
    if "image_size" in MODELS[name][2]:
        options["image_size"] = patch * r.randint(1, 4)
    if name == "radio":
        options["max_img_size"] = patch * r.randint(1, 6)
    return options | {flag: r.random() < 0.5 for flag in FLAGS.get(name, ())}


def oracle(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
    """transformers' model with weights in which nothing is at a special value that could hide a mistake."""
    kind, config, fixed = MODELS[name]
    model = kind(config(**{**fixed, **options}, attn_implementation="sdpa")).eval()
    for p in model.parameters():
        p.data = p.data.to(dtype)  # to() would change the buffers too, which from_pretrained() does not
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=gen) + (0.7 if p.ndim == 1 else 0.0))
    return model


def saved(model: nn.Module, folder: Path) -> Path:
    """The folder that the model is saved in."""
    save: Callable[..., Any] = model.save_pretrained  # type: ignore[assignment]
    save(folder)
    return folder


def inputs(name: str, model: Any, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """What a processor could give, of several sizes."""
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=gen, dtype=torch.float64).to(dtype) * 2 - 1

    patch = model.config.patch_size
    if name.startswith("qwen"):
        numbers = 3 * 2 * patch**2
        found = []
        for grids in ([[1, 4, 6]], [[1, 6, 10], [1, 2, 2], [2, 6, 6]]):
            grid = torch.tensor(grids)
            found.append({"pixel_values": draw(int(grid.prod(1).sum()), numbers), "image_grid_thw": grid})
        return found
    if name == "siglip2":
        shapes = torch.tensor([[4, 4], [3, 5], [2, 7]])
        mask = (torch.arange(18)[None] < shapes.prod(1)[:, None]).int()
        return [
            {
                "pixel_values": draw(3, 18, 3 * patch**2),
                "pixel_attention_mask": mask,
                "spatial_shapes": shapes,
            }
        ]
    found = [
        {"pixel_values": draw(2, 3, *size)}
        for size in ((16, 16), (12, 24), (28, 8) if name == "radio" else (29, 10))
    ]
    if name == "radio":  # which takes whole patches alone
        sides = [[n // patch * patch for n in x["pixel_values"].shape[-2:]] for x in found]
        found = [
            {"pixel_values": x["pixel_values"][..., :h, :w]} for x, (h, w) in zip(found, sides, strict=True)
        ]
    if name == "radio":
        grid = torch.tensor([[2, 3], [4, 4]])
        found.append({"pixel_values": draw(22, 3 * patch**2), "image_grid_hw": grid})
    return found


def run(name: str, model: Any, given: Mapping[str, Any]) -> Tensor:
    """The oracle's last hidden state."""
    given = dict(given)
    if name.startswith("qwen"):
        out = model(given["pixel_values"], grid_thw=given["image_grid_thw"])
    elif name in ("siglip", "clip", "image_vit"):
        out = model(**given, interpolate_pos_encoding=True)
    else:
        out = model(**given)
    states: Tensor = out.last_hidden_state
    return states


def real(name: str, given: Mapping[str, Any], states: Tensor) -> Tensor:
    """Without the padding, whose states mean nothing."""
    return states[given["pixel_attention_mask"].bool()] if name == "siglip2" else states

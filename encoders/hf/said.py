"""What folders of published encoders say of them: config.json and processors from options, family by family.

The tables of fields are those that the families are read by; written() tries that what is written reads back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from encoders.hf import towers, vision
from encoders.hf.qwen import SIZES as SIZES_OF_QWEN
from encoders.hf.said_audio import SOUND
from encoders.hf.saying import Names, Rest, Said, named
from encoders.vision.config import Pictures, VisionConfig
from parallel.published import Shape

# Names of transformers, the first of ours each.
ACTIVATIONS = {ours: theirs for theirs, ours in reversed(vision.ACTIVATIONS.items())}


def norm(key: str, width: int) -> Rest:
    """A norm that changes nothing of what ours computes."""
    return {f"{key}.weight": ((width,), 1.0), f"{key}.bias": ((width,), 0.0)}


RESAMPLE = {"bilinear": 2, "bicubic": 3}


def picture_processor(kind: str, pictures: Pictures) -> dict[str, Any]:
    """preprocessor_config.json of pictures; kind: the class of transformers."""
    out: dict[str, Any] = {
        "image_processor_type": kind,
        "do_resize": pictures.fit != "none",
        "resample": RESAMPLE[pictures.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pictures.mean),
        "image_std": list(pictures.std),
    }
    size = {"height": pictures.height, "width": pictures.width}
    if pictures.fit == "exact":
        return {**out, "size": size, "do_center_crop": False, "crop_size": size}
    if pictures.fit == "crop":
        edge = {"shortest_edge": pictures.edge}
        return {**out, "size": edge, "do_center_crop": True, "crop_size": size}
    if pictures.fit == "patches":
        return {**out, "max_num_patches": pictures.most}
    if pictures.fit == "smart":
        return {**out, "min_pixels": pictures.least, "max_pixels": pictures.most}
    if pictures.fit == "tiles":
        tiles = {"min_patches": pictures.least, "max_patches": pictures.most}
        return {**out, "size": size, "crop_to_patches": True, **tiles}
    if pictures.fit == "longest":
        return {**out, "size": {"longest_edge": pictures.edge}}
    return out


def square_sizes(cfg: VisionConfig) -> dict[str, Any]:
    """Patch and size of the pictures that the table of positions is made for."""
    return {"patch_size": cfg.patch, "image_size": cfg.table * cfg.patch}


def common(cfg: VisionConfig, kind: str, names: Names) -> dict[str, Any]:
    """What the configs of most vision towers say. kind: model_type."""
    return {"model_type": kind, **named(cfg, names), "hidden_act": ACTIVATIONS[cfg.activation]}


EPS: Names = {"eps": ("layer_norm_eps", None)}
PLAIN: Names = {**vision.SIZES, **vision.MLP, **EPS}


def siglip(cfg: VisionConfig) -> dict[str, Any]:
    # Without the pooling head, so that vLLM takes the features and pools nothing.
    out = {**common(cfg, "siglip_vision_model", PLAIN), "vision_use_head": False}
    return {**out, **square_sizes(cfg)}


def siglip2(cfg: VisionConfig) -> dict[str, Any]:
    out = common(cfg, "siglip2_vision_model", PLAIN)
    return {**out, "patch_size": cfg.patch, "num_patches": cfg.table**2, "vision_use_head": False}


def clip(cfg: VisionConfig) -> dict[str, Any]:
    return {**common(cfg, "clip_vision_model", PLAIN), **square_sizes(cfg), "projection_dim": cfg.width}


def image_vit(cfg: VisionConfig) -> dict[str, Any]:
    out = common(cfg, "vit", PLAIN)
    return {**out, **square_sizes(cfg), "qkv_bias": "q" in cfg.biases}


def dinov2(cfg: VisionConfig) -> dict[str, Any]:
    registers = cfg.interpolation == "bicubic_antialias"
    out = common(cfg, "dinov2_with_registers" if registers else "dinov2", {**vision.SIZES, **EPS})
    out |= {"num_register_tokens": cfg.registers} if registers else {}
    ratio = ratio_of(cfg)
    return {
        **out,
        **square_sizes(cfg),
        "hidden_act": "gelu" if cfg.gated else out["hidden_act"],
        "mlp_ratio": ratio,
        "use_swiglu_ffn": cfg.gated,
        "qkv_bias": "q" in cfg.biases,
    }


def ratio_of(cfg: VisionConfig) -> float:
    """The factor from which DINOv2 and RADIO work out the width of the MLP."""
    if not cfg.gated:
        ratio = cfg.mlp / cfg.width
        if ratio == int(ratio):
            return int(ratio)
        return ratio if int(cfg.width * ratio) == cfg.mlp else (cfg.mlp + 0.5) / cfg.width
    wanted = (hidden / cfg.width for hidden in range(3 * cfg.mlp // 2 - 16, 3 * cfg.mlp // 2 + 16))
    fits = (r for r in wanted if r > 0 and vision.swiglu(int(cfg.width * r)) == cfg.mlp)
    whole = [r for r in range(1, 9) if vision.swiglu(cfg.width * r) == cfg.mlp]
    return whole[0] if whole else next(fits, cfg.mlp / cfg.width)


def dinov3(cfg: VisionConfig) -> dict[str, Any]:
    names = {**PLAIN, "registers": ("num_register_tokens", 0), "gated": ("use_gated_mlp", False)}
    out = common(cfg, "dinov3_vit", {**names, "rope_base": ("rope_theta", 100.0)})
    biases = {"q": "query_bias", "k": "key_bias", "v": "value_bias", "out": "proj_bias", "mlp": "mlp_bias"}
    out |= {theirs: ours in cfg.biases for ours, theirs in biases.items()}
    # Positions are rotary, so that a size is that of pictures alone.
    return {**out, "patch_size": cfg.patch, "image_size": cfg.pictures.height}


def radio(cfg: VisionConfig) -> dict[str, Any]:
    classes = 3 if cfg.class_tokens == 10 else cfg.class_tokens  # of 10 tokens, 3 are for the summary
    return {
        **common(cfg, "radio", {**vision.SIZES, **EPS}),
        "patch_size": cfg.patch,
        "mlp_ratio": float(ratio_of(cfg)),
        "max_img_size": cfg.table * cfg.patch,
        "image_size": cfg.table * cfg.patch,
        "num_cls_tokens": classes,
        "num_registers": cfg.class_tokens - classes,
        "summary_idxs": [0, 1] if cfg.class_tokens > 1 else [0],
        "qkv_bias": "q" in cfg.biases,
        "norm_mean": list(cfg.pictures.mean),
        "norm_std": list(cfg.pictures.std),
    }


def internvl(cfg: VisionConfig) -> dict[str, Any]:
    sides = {name: [side, side] for name, side in square_sizes(cfg).items()}
    return {
        **common(cfg, "internvl_vision", PLAIN),
        **sides,
        "attention_bias": "q" in cfg.biases,
        "norm_type": next(theirs for theirs, ours in towers.NORMS.items() if ours == cfg.norm),
        "use_mean_pooling": not cfg.final_norm,
        "use_qk_norm": False,
        "use_absolute_position_embeddings": True,
    }


def pixtral(cfg: VisionConfig) -> dict[str, Any]:
    side = -(-cfg.pictures.edge // cfg.patch) * cfg.patch
    return {
        **common(cfg, "pixtral", {**vision.SIZES, **vision.MLP}),
        "patch_size": cfg.patch,
        "image_size": side,  # its table of rotations is of pictures up to this size
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_base},
    }


def pixtral_processor(cfg: VisionConfig) -> dict[str, Any]:
    patch = {"height": cfg.patch, "width": cfg.patch}
    return {**picture_processor("PixtralImageProcessor", cfg.pictures), "patch_size": patch}


def processor(kind: str) -> Callable[[Any], dict[str, Any]]:
    """The settings of a processor of pictures of the class `kind`."""
    return lambda cfg: picture_processor(kind, cfg.pictures)


def conditioner(cfg: VisionConfig) -> Rest:
    """RADIO's mean and std of pictures, and which of its tokens are a summary."""
    out: dict[str, Any] = {}
    for name, values in (("mean", cfg.pictures.mean), ("std", cfg.pictures.std)):
        out[f"radio_model.input_conditioner.norm_{name}"] = ((len(values), 1, 1), tuple(values))
    idxs = (0, 1) if cfg.class_tokens > 1 else (0,)
    return {**out, "radio_model.summary_idxs": ((len(idxs),), idxs)}


def final(key: str) -> Callable[[Any], Rest]:
    """The norm after the last layer, where the encoder is without."""
    return lambda cfg: {} if cfg.final_norm else norm(key, cfg.width)


def with_mask(key: str, lead: Shape = ()) -> Callable[[Any], Rest]:
    """The same, with the token of masked patches; lead: dims of 1 that it has first."""
    return lambda cfg: {**final(key)(cfg), "embeddings.mask_token": ((*lead, 1, cfg.width), 0.0)}


def qwen(cfg: VisionConfig) -> dict[str, Any]:
    """What both of Qwen's towers say alike."""
    return {
        **named(cfg, SIZES_OF_QWEN),
        "patch_size": cfg.patch,
        "temporal_patch_size": cfg.frames,
        "hidden_act": ACTIVATIONS[cfg.activation],
        "rope_parameters": {"rope_type": "axial", "rope_theta": cfg.rope_base},
    }


def qwen25(cfg: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_vl_vision",
        **qwen(cfg),
        "window_size": cfg.window * cfg.patch,
        "fullatt_block_indexes": list(cfg.full_layers),
        "tokens_per_second": cfg.tokens_per_second,
    }


def qwen3(cfg: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "qwen3_vl_vision",
        **qwen(cfg),
        "num_position_embeddings": cfg.table**2,
        "deepstack_visual_indexes": list(cfg.levels),
    }


def qwen_patches(cfg: VisionConfig) -> dict[str, int]:
    return {"patch_size": cfg.patch, "temporal_patch_size": cfg.frames, "merge_size": cfg.merge}


def qwen_processor(cfg: VisionConfig) -> dict[str, Any]:
    return {**picture_processor("Qwen2VLImageProcessor", cfg.pictures), **qwen_patches(cfg)}


def qwen_video(kind: str) -> Callable[[VisionConfig], dict[str, Any]]:
    """The settings of a processor of videos of the class `kind`."""

    def said(cfg: VisionConfig) -> dict[str, Any]:
        how, block = cfg.videos, (cfg.patch * cfg.merge) ** 2
        tokens = {"cap_pixels_per_frame": True, "max_video_tokens": how.cap // block} if how.cap else {}
        return {
            "video_processor_type": kind,
            "size": {"shortest_edge": how.least, "longest_edge": how.most},
            "do_sample_frames": how.sample != "all",
            "fps": how.fps,
            "min_frames": how.least_frames,
            "max_frames": how.most_frames,
            "image_mean": list(cfg.pictures.mean),
            "image_std": list(cfg.pictures.std),
            **qwen_patches(cfg),
            **tokens,
        }

    return said


TOWER = "vision_model."  # of SigLIP and CLIP, which have a text tower too

SAID: dict[str, Said] = {
    "qwen2_5_vl": Said(qwen25, qwen_processor, video=qwen_video("Qwen2VLVideoProcessor")),
    "qwen3_vl": Said(qwen3, qwen_processor, video=qwen_video("Qwen3VLVideoProcessor")),
    "siglip": Said(
        siglip, processor("SiglipImageProcessor"), final("vision_model.post_layernorm"), "vision_model."
    ),
    "siglip2": Said(
        siglip2, processor("Siglip2ImageProcessor"), final("vision_model.post_layernorm"), "vision_model."
    ),
    "clip": Said(
        clip,
        processor("CLIPImageProcessor"),
        lambda cfg: norm(f"{TOWER}post_layernorm", cfg.width),
        TOWER,
    ),
    "image_vit": Said(image_vit, processor("ViTImageProcessor"), final("layernorm")),
    "dinov2": Said(dinov2, processor("BitImageProcessor"), with_mask("layernorm")),
    "dinov3": Said(dinov3, processor("DINOv3ViTImageProcessor"), with_mask("norm", (1,))),
    "internvl": Said(internvl, processor("GotOcr2ImageProcessor")),
    "pixtral": Said(pixtral, pixtral_processor),
    "radio": Said(radio, processor("CLIPImageProcessor"), conditioner, "radio_model.model."),
    **SOUND,
}

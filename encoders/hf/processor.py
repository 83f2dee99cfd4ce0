"""Settings of published image processors as options, and what processors give as batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from encoders.contract import Encoder, ItemBatch, Meta
from encoders.hf.family import Part
from encoders.vision.config import Pictures, Videos, VisionConfig
from encoders.vision.model import VisionTransformer
from encoders.vision.pictures import patches_of

RESAMPLE = {2: "bilinear", 3: "bicubic"}


def pictures(part: Part, default: Pictures) -> dict[str, Any]:
    """Options of pictures from the folder's image processor, those of `default` where it says nothing.

    Raises ValueError for settings that ours has not.
    """
    said = {k: v for k, v in part.processor.items() if v is not None}
    out: dict[str, Any] = dict(vars(default))
    if abs(said.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9 or not said.get("do_rescale", True):
        raise ValueError("the image processor does not divide pixels by 255; needed: one that does")
    if said.get("resample") in RESAMPLE:
        out["resample"] = RESAMPLE[said["resample"]]
    elif "resample" in said:
        raise ValueError(f"the image processor has resample={said['resample']}; known: 2 and 3")
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in said and said.get("do_normalize", True):
            out[ours] = tuple(said[theirs])
    if default.fit in ("exact", "crop"):
        out |= _fit(said, default)
    elif default.fit == "tiles":
        out |= _tiles(said, default)
    elif default.fit == "longest":
        out["edge"] = said.get("size", {}).get("longest_edge", default.edge)
    elif default.fit == "patches":
        out["most"] = said.get("max_num_patches", default.most)
    elif default.fit == "smart":
        size = said.get("size", {})
        out["least"] = said.get("min_pixels", size.get("shortest_edge", default.least))
        out["most"] = said.get("max_pixels", size.get("longest_edge", default.most))
    return out


def videos(part: Part, default: Videos) -> dict[str, Any]:
    """Options of videos from the folder's video processor, those of `default` where it says nothing.

    Raises ValueError for settings that ours has not.
    """
    said = {k: v for k, v in part.video.items() if v is not None}
    out: dict[str, Any] = dict(vars(default))
    size = said.get("size", {})
    # Qwen2-VL's class takes older names of the bounds first, Qwen3-VL's does not know them.
    older = said if default.area == "frame" else {}
    out["least"] = older.get("min_pixels", size.get("shortest_edge", default.least))
    out["most"] = older.get("max_pixels", size.get("longest_edge", default.most))
    names = {"fps": "fps", "least_frames": "min_frames", "most_frames": "max_frames"}
    out |= {ours: said[theirs] for ours, theirs in names.items() if theirs in said}
    if "do_sample_frames" in said:
        kind = "ends" if default.area == "all" else "stride"
        out["sample"] = kind if said["do_sample_frames"] else "all"
    if said.get("cap_pixels_per_frame") and default.area == "frame":
        raise ValueError("the video processor has cap_pixels_per_frame=true; needed: false")
    if said.get("cap_pixels_per_frame"):
        side = said.get("patch_size", 16) * said.get("merge_size", 2)
        out["cap"] = said.get("max_video_tokens", 768) * side**2
    return out


def _fit(said: Mapping[str, Any], default: Pictures) -> dict[str, Any]:
    """The resize and crop of a processor of pictures of one size."""
    if not said.get("do_resize", True):
        return {"fit": "none"}
    size = said.get("size")
    crop = said.get("crop_size") if said.get("do_center_crop", default.fit == "crop") else None
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    if isinstance(size, int):  # of old files: the shorter side where a crop follows
        size = {"shortest_edge": size} if crop else {"height": size, "width": size}
    if size is None:
        return {}
    if "shortest_edge" in size and crop:
        return {"fit": "crop", "edge": size["shortest_edge"], **crop}
    if "height" in size and "width" in size and (crop is None or crop == size):
        return {"fit": "exact", "height": size["height"], "width": size["width"]}
    raise ValueError(
        f"the image processor has size={size}, crop_size={crop}; needed: height and width, or shortest_edge "
        "and a crop"
    )


def _tiles(said: Mapping[str, Any], default: Pictures) -> dict[str, Any]:
    """The tiles of InternVL's processor, whose size is that of one."""
    size = said.get("size", {})
    out = {k: size.get(k, getattr(default, k)) for k in ("height", "width")}
    if not said.get("crop_to_patches", False):
        return {**out, "fit": "exact"}
    return {**out, "least": said.get("min_patches", 1), "most": said.get("max_patches", 12)}


def budget(part: Part, default: Pictures, merge: int) -> dict[str, Any] | None:
    """Options of pictures by the image processor of Nemotron Omni; None where the folder has no such one.

    merge: side of the squares of patches that its model makes one row of, where the processor does not say.
    """
    said = part.processor
    if "max_num_patches" not in said or "min_num_patches" not in said:
        return None
    merge = round(1 / said.get("downsample_ratio", 1 / merge))
    most = (said.get("max_model_len", 16384) - 4) * merge**2  # what the language model's context leaves
    if said["max_num_patches"]:
        most = min(most, said["max_num_patches"])
    out = dict(vars(default)) | {"fit": "budget", "after_scale": True, "least": said["min_num_patches"]}
    for ours in ("mean", "std"):
        out[ours] = tuple(said.get(f"norm_{ours}") or said.get(f"image_{ours}") or out[ours])
    return {**out, "most": max(most, said["min_num_patches"])}


def encoder_config(encoder: Encoder) -> tuple[VisionTransformer, VisionConfig]:
    assert isinstance(encoder, VisionTransformer)
    return encoder, encoder.cfg


def dense_batch(cfg: VisionConfig, pixels: Tensor) -> ItemBatch:
    """pixel_values [n, channels, height, width] as a batch."""
    down, across = (cfg.merge * (size // cfg.side) for size in pixels.shape[-2:])
    meta: Meta = {"down": down, "across": across}
    values = torch.cat([pixels.new_zeros(0, cfg.inputs), *(patches_of(cfg, x) for x in pixels)])
    return ItemBatch(values, (down * across,) * len(pixels), (meta,) * len(pixels))


def dense_features(encoder: Encoder, inputs: Mapping[str, Any]) -> Tensor:
    """Last hidden state [n, tokens, width] of pixel_values."""
    vision, cfg = encoder_config(encoder)
    pixels = inputs["pixel_values"]
    tokens = vision.states(dense_batch(cfg, pixels))
    return tokens.view(len(pixels), -1, cfg.width) if len(pixels) else tokens[None][:0]


def packed_batch(values: Tensor, grids: Sequence[Sequence[int]]) -> ItemBatch:
    """Patches end to end as a batch. grids: (down, across) or (frames, down, across) of each item."""
    metas: list[Meta] = []
    for g in grids:
        frames, down, across = (1, *g)[-3:]
        metas.append({"frames": frames, "down": down, "across": across})
    return ItemBatch(values, tuple(math.prod(g) for g in grids), tuple(metas))


def padded_features(encoder: Encoder, inputs: Mapping[str, Any]) -> Tensor:
    """SigLIP 2's last hidden state [n, most, width] of padded patches; that of padding is zero."""
    vision, cfg = encoder_config(encoder)
    pixels, grids = inputs["pixel_values"], inputs["spatial_shapes"].tolist()
    lengths = [math.prod(g) for g in grids]
    values = torch.cat(
        [pixels.new_zeros(0, cfg.inputs), *(x[:n] for x, n in zip(pixels, lengths, strict=True))]
    )
    states = torch.split(vision.states(packed_batch(values, grids)), lengths)
    out = values.new_zeros(len(pixels), pixels.shape[1], cfg.width, dtype=states[0].dtype if states else None)
    for i, (state, n) in enumerate(zip(states, lengths, strict=True)):
        out[i, :n] = state
    return out


def sized_features(encoder: Encoder, inputs: Mapping[str, Any]) -> Tensor:
    """Pixtral's last hidden state [1, all patches, width] of padded pixel_values with image_sizes."""
    vision, cfg = encoder_config(encoder)
    pixels = inputs["pixel_values"]
    sizes = inputs.get("image_sizes")
    if sizes is None:
        return vision.states(dense_batch(cfg, pixels))[None]
    side = cfg.patch
    grids = [(int(h) // side, int(w) // side) for h, w in sizes]
    pairs = zip(pixels, grids, strict=True)
    patches = [patches_of(cfg, x[:, : down * side, : across * side]) for x, (down, across) in pairs]
    return vision.states(packed_batch(torch.cat([pixels.new_zeros(0, cfg.inputs), *patches]), grids))[None]


def radio_features(encoder: Encoder, inputs: Mapping[str, Any]) -> Tensor:
    """RADIO's last hidden state: [n, tokens, width] of pictures in [0, 1], or [all tokens, width] of packed
    patches with image_grid_hw."""
    vision, cfg = encoder_config(encoder)
    pixels = inputs["pixel_values"]
    grids = inputs.get("image_grid_hw")
    planes = pixels if grids is None else pixels.view(-1, cfg.channels, cfg.patch, cfg.patch)
    mean, std = (planes.new_tensor(x, dtype=torch.float32) for x in (cfg.pictures.mean, cfg.pictures.std))
    planes = (planes.float() - mean[:, None, None]) / std[:, None, None]
    planes = planes.to(pixels.dtype)
    if grids is None:
        return dense_features(encoder, {"pixel_values": planes})
    return vision.states(packed_batch(planes.flatten(1), grids.tolist()))

"""From a picture's file to its patches: resize, crop, scale, normalise, as the families' processors do it.

The pixels equal those of transformers' processors with Pillow (DINOv3's: with torch); the sizes follow from
the metadata alone, as the step plan needs them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.compat import decode_image, image_tensor
from encoders.vision.config import Pictures, VisionConfig

MOST_ASPECT = 200  # of Qwen's processor


def fitted(cfg: VisionConfig, height: int, width: int) -> tuple[int, int]:
    """Height and width, in pixels, that a picture is brought to. Pure. Raises ValueError for one of no
    pixels, and for one too long and narrow."""
    how = cfg.pictures
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {height}x{width} pixels; needed: one at least on each side")
    if how.fit == "smart":
        return _smart(how, cfg.side, height, width)
    if how.fit == "patches":
        return _most_patches(how.most, cfg.patch, height, width)
    if how.fit == "none":
        return height, width
    return how.height, how.width


def _smart(how: Pictures, side: int, height: int, width: int) -> tuple[int, int]:
    """Sides rounded to multiples of `side` (half to even), the area then kept between least and most."""
    if max(height, width) > MOST_ASPECT * min(height, width):
        raise ValueError(
            f"a picture of {height}x{width} pixels; needed: a longer side of at most {MOST_ASPECT} times the "
            "shorter, such as parts of this one"
        )
    down, across = round(height / side) * side, round(width / side) * side
    if down * across > how.most:
        by = math.sqrt(height * width / how.most)
        down, across = (max(side, math.floor(n / by / side) * side) for n in (height, width))
    elif down * across < how.least:
        by = math.sqrt(how.least / (height * width))
        down, across = (math.ceil(n * by / side) * side for n in (height, width))
    return down, across


def _most_patches(most: int, patch: int, height: int, width: int) -> tuple[int, int]:
    """The largest size near the picture's aspect, in whole patches, of `most` patches at most; the scale is
    found by halving, to 1e-5, as published."""

    def scaled(by: float) -> tuple[int, int]:
        down, across = (max(patch, math.ceil(n * by / patch) * patch) for n in (height, width))
        return down, across

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        down, across = scaled(middle)
        if (down / patch) * (across / patch) <= most:
            low = middle
        else:
            high = middle
    return scaled(low)


def picture_patches(cfg: VisionConfig, payload: bytes, size: tuple[int, int]) -> Tensor:
    """A picture's file to its patches [n, cfg.inputs], float32, in the order of the tokens.

    size: height and width by the index. Raises ValueError where the file has another one, and for colour
    where the encoder takes grey.
    """
    pixels = decode_image(payload, cfg.channels)
    if tuple(pixels.shape[1:]) != size:
        raise ValueError(f"image is {tuple(pixels.shape[1:])}, its index says {size[0]}x{size[1]}")
    return patches_of(cfg, _normalised(cfg, pixels))


def _normalised(cfg: VisionConfig, pixels: Tensor) -> Tensor:
    """uint8 [channels, height, width] to float32 of the fitted size."""
    how = cfg.pictures
    height, width = fitted(cfg, *pixels.shape[1:])
    if how.after_scale:
        planes = pixels.to(torch.float32) / 255.0
        planes = F.interpolate(planes[None], (height, width), mode=how.resample, antialias=True)[0]
    else:
        planes = _resized(how, pixels, (height, width)).to(torch.float32) / 255.0
    every = zip(planes, how.mean, how.std, strict=False)
    return torch.stack([(plane - mean) / std for plane, mean, std in every])


def _resized(how: Pictures, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [channels, height, width] of `size`, by Pillow; of crop, the middle of what is resized."""
    from PIL import Image

    target = size
    if how.fit == "crop":
        height, width = pixels.shape[1:]
        short = min(height, width)
        target = (how.edge * height // short, how.edge * width // short)
    if target != tuple(pixels.shape[1:]):
        array = pixels.permute(1, 2, 0).numpy()
        image = Image.fromarray(np.ascontiguousarray(array[..., 0] if len(pixels) == 1 else array))
        kind = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[how.resample]
        pixels = image_tensor(np.asarray(image.resize((target[1], target[0]), kind)))
    top, left = ((there - wanted) // 2 for there, wanted in zip(target, size, strict=True))
    return pixels[:, top : top + size[0], left : left + size[1]]


def patches_of(cfg: VisionConfig, planes: Tensor) -> Tensor:
    """Pixels [channels, height, width], or [frames, channels, height, width] of a video in whole tubelets, to
    patches [n, cfg.inputs]; what is left over at the right and below is dropped."""
    if planes.ndim == 3:
        planes = planes.expand(cfg.frames, *planes.shape)
    p, m, t = cfg.patch, cfg.merge, cfg.frames
    down, across = (planes.shape[-2] // cfg.side, planes.shape[-1] // cfg.side)
    x = planes[..., : down * cfg.side, : across * cfg.side]
    shape = (len(x) // t, t, cfg.channels, down, m, p, across, m, p)
    x = x.reshape(shape)
    # From (clip, time, channel, down, m, row, across, m, column): numbers of a patch last.
    order = (0, 3, 6, 4, 7, 1, 5, 8, 2) if cfg.channels_last else (0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.permute(order).reshape(-1, cfg.inputs).contiguous()


def check_pictures(name: str, cfg: VisionConfig) -> None:
    """Raise ValueError for impossible options of cfg.pictures."""
    how = cfg.pictures
    if min(len(how.mean), len(how.std)) < cfg.channels:
        raise ValueError(f"{name} pictures.mean and std have {len(how.mean)} numbers; needed: one a channel")
    if how.fit in ("exact", "crop") and min(how.height, how.width) < cfg.side:
        raise ValueError(
            f"{name} pictures are {how.height}x{how.width} pixels; needed: {cfg.side} at least on each side"
        )
    rest = [n // cfg.patch % cfg.merge for n in (how.height, how.width)]
    if how.fit in ("exact", "crop") and any(rest):
        raise ValueError(
            f"{name} pictures are {how.height // cfg.patch}x{how.width // cfg.patch} patches, merge is "
            f"{cfg.merge}; needed: a merge that divides both"
        )
    if how.fit == "crop" and how.edge < max(how.height, how.width):
        raise ValueError(
            f"{name} pictures.edge is {how.edge}, less than the {how.height}x{how.width} that is cropped; "
            "needed: as much"
        )
    if how.fit in ("smart", "patches") and not 1 <= how.least <= how.most:
        raise ValueError(f"{name} pictures.least is {how.least} and most {how.most}; needed: 1 to most")

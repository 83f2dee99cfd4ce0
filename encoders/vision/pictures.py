"""From a picture's file to its patches: resize, crop, tile, scale, normalise, as families' processors do it.

The pixels equal those of transformers' processors with Pillow (DINOv3's and Nemotron Omni's: with torch).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.contract import Meta
from encoders.media.decode import decode_still
from encoders.media.pictures import image_tensor
from encoders.vision.config import Pictures, VisionConfig
from encoders.vision.sizes import fitted, tiling


def picture_patches(cfg: VisionConfig, payload: bytes, meta: Meta, out: Tensor | None = None) -> Tensor:
    """A picture's file to its patches [n, cfg.inputs], float32, in the order of the tokens.

    meta: height and width by the index, and of a tile its number. out: as of patches_of(). Raises ValueError
    where the file has another size, and for colour where the encoder takes grey.
    """
    how, size = cfg.pictures, (meta["height"], meta["width"])
    if how.fit == "tiles":
        return patches_of(cfg, _scaled(how, _tile(payload, size, how, cfg.channels, meta["tile"])), out)
    return patches_of(cfg, normalised_frame(cfg, _decoded(payload, size, cfg.channels)), out)


def _decoded(payload: bytes, size: tuple[int, int], channels: int) -> Tensor:
    """uint8 [channels, height, width]."""
    pixels = decode_still(payload, channels)
    if tuple(pixels.shape[1:]) != size:
        raise ValueError(f"image is {tuple(pixels.shape[1:])}, its index says {size[0]}x{size[1]}")
    return pixels


def _tile(payload: bytes, size: tuple[int, int], how: Pictures, channels: int, number: int) -> Tensor:
    """uint8 [channels, height, width] of a tile, row by row; the thumbnail comes after the last."""
    grid = tiling(how, *size)
    if number == grid.down * grid.across:
        return _brought(payload, size, how, channels, (how.height, how.width))
    whole = _brought(payload, size, how, channels, (grid.down * how.height, grid.across * how.width))
    row, column = divmod(number, grid.across)
    return whole.narrow(1, row * how.height, how.height).narrow(2, column * how.width, how.width)


@lru_cache(maxsize=2)  # the tiles of a picture are prepared one after another
def _brought(
    payload: bytes, size: tuple[int, int], how: Pictures, channels: int, target: tuple[int, int]
) -> Tensor:
    return _resized(how, _decoded(payload, size, channels), target)


def normalised_frame(cfg: VisionConfig, pixels: Tensor) -> Tensor:
    """uint8 [channels, height, width] to float32 of the fitted size."""
    how = cfg.pictures
    height, width = fitted(cfg, *pixels.shape[1:])
    if how.after_scale:
        planes = pixels.to(torch.float32) / 255.0
        planes = F.interpolate(planes[None], (height, width), mode=how.resample, antialias=True)[0]
    else:
        return _scaled(how, _resized(how, pixels, (height, width)))
    return standard(how, planes)


def _scaled(how: Pictures, pixels: Tensor) -> Tensor:
    """uint8 pixels as normalised float32."""
    return standard(how, pixels.to(torch.float32) / 255.0)


def standard(how: Pictures, planes: Tensor) -> Tensor:
    """Pixels in [0, 1], less the mean and divided by the deviation of their channel."""
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


def patches_of(cfg: VisionConfig, planes: Tensor, out: Tensor | None = None) -> Tensor:
    """Pixels [channels, height, width], or [frames, channels, height, width] of a video in whole tubelets, to
    patches [n, cfg.inputs]; what is left over at the right and below is dropped. out: where they are written,
    contiguous, in its dtype."""
    if planes.ndim == 3:
        planes = planes.expand(cfg.frames, *planes.shape)
    p, m, t = cfg.patch, cfg.merge, cfg.frames
    down, across = (planes.shape[-2] // cfg.side, planes.shape[-1] // cfg.side)
    x = planes[..., : down * cfg.side, : across * cfg.side]
    shape = (len(x) // t, t, cfg.channels, down, m, p, across, m, p)
    x = x.reshape(shape)
    # From (clip, time, channel, down, m, row, across, m, column): numbers of a patch last.
    order = (0, 3, 6, 4, 7, 1, 5, 8, 2) if cfg.channels_last else (0, 3, 6, 4, 7, 2, 1, 5, 8)
    x = x.permute(order)
    if out is None:
        return x.reshape(-1, cfg.inputs).contiguous()
    out.view(x.shape).copy_(x)
    return out


def check_pictures(name: str, cfg: VisionConfig) -> None:
    """Raise ValueError for impossible options of cfg.pictures."""
    how = cfg.pictures
    if min(len(how.mean), len(how.std)) < cfg.channels:
        raise ValueError(f"{name} pictures.mean and std have {len(how.mean)} numbers; needed: one a channel")
    if how.fit in ("exact", "crop", "tiles") and min(how.height, how.width) < cfg.side:
        raise ValueError(
            f"{name} pictures are {how.height}x{how.width} pixels; needed: {cfg.side} at least on each side"
        )
    rest = [n // cfg.patch % cfg.merge for n in (how.height, how.width)]
    if how.fit in ("exact", "crop", "tiles") and any(rest):
        raise ValueError(
            f"{name} pictures are {how.height // cfg.patch}x{how.width // cfg.patch} patches, merge is "
            f"{cfg.merge}; needed: a merge that divides both"
        )
    if how.fit == "crop" and how.edge < max(how.height, how.width):
        raise ValueError(
            f"{name} pictures.edge is {how.edge}, less than the {how.height}x{how.width} that is cropped; "
            "needed: as much"
        )
    if how.fit in ("smart", "patches", "budget", "tiles") and not 1 <= how.least <= how.most:
        raise ValueError(f"{name} pictures.least is {how.least} and most {how.most}; needed: 1 to most")

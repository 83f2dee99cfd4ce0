"""Videos as frames: which frames are taken, their size, their times, and their patches in tubelets.

What follows from a video's metadata (pictures, height, width, fps) needs no pixels. Pixels equal those of the
families' video processors, which resize with torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.contract import Meta
from encoders.media.decode import decode_frames
from encoders.vision.config import Videos, VisionConfig
from encoders.vision.pictures import normalised_frame, patches_of, standard
from encoders.vision.sizes import MOST_ASPECT, fitted, smart_size


def own_rate(how: Videos, meta: Meta) -> float:
    """Frames a second that a video has."""
    return float(meta.get("fps", how.fps))


def taken(cfg: VisionConfig, meta: Meta) -> list[int]:
    """Numbers of the frames that are taken. Raises ValueError where they fill no tubelet."""
    how, n = cfg.videos, meta["pictures"]
    if how.sample == "all":
        found = list(range(n))
    else:
        wanted = n / own_rate(how, meta) * how.fps
        if how.sample == "ends":
            count = min(max(int(wanted), how.least_frames), how.most_frames, n)
            found = np.linspace(0, n - 1, count).round().astype(int).tolist()
        else:
            most = min(how.most_frames, n) // cfg.frames * cfg.frames
            count = math.floor(min(max(wanted, how.least_frames), most) / cfg.frames) * cfg.frames
            found = torch.arange(0, n, n / count).int().tolist() if count else []
    if len(found) < cfg.frames:
        raise ValueError(
            f"a video of {n} frames, of which {len(found)} are taken; needed: {cfg.frames} for a tubelet, or "
            "a still picture"
        )
    return found


def tubelets(cfg: VisionConfig, meta: Meta) -> int:
    """How many groups of cfg.frames frames the taken ones are; the last frame fills up the last group."""
    return -(-len(taken(cfg, meta)) // cfg.frames)


def seconds(cfg: VisionConfig, meta: Meta) -> list[float]:
    """The time of each tubelet: between its first and its last frame."""
    rate, frames = own_rate(cfg.videos, meta), taken(cfg, meta)
    frames += [frames[-1]] * (-len(frames) % cfg.frames)
    ends = zip(frames[:: cfg.frames], frames[cfg.frames - 1 :: cfg.frames], strict=True)
    return [(first / rate + last / rate) / 2 for first, last in ends]


def tubelet_pieces(cfg: VisionConfig, meta: Meta) -> Sequence[str | Meta]:
    """A video as its tubelets, each between its texts; the video itself where there are no texts and its
    frames have no class tokens."""
    how, out = cfg.videos, list[str | Meta]()
    if not (how.frame_tag or how.frame_end or cfg.prefix):
        return (meta,)
    for k, time in enumerate(seconds(cfg, meta)):
        tag = how.frame_tag.replace("{seconds}", f"{time:.1f}")
        own: list[str | Meta] = [tag, {**meta, "group": k}, how.frame_end]
        out += [piece for piece in own if piece]
    return out


def step_seconds(cfg: VisionConfig, meta: Meta) -> float:
    """Seconds from one tubelet to the next, on average: what Qwen2.5-VL's positions in time count by."""
    return cfg.frames * meta["pictures"] / (len(taken(cfg, meta)) * own_rate(cfg.videos, meta))


def video_size(cfg: VisionConfig, meta: Meta) -> tuple[int, int]:
    """Height and width that frames are brought to. Raises ValueError as fitted() does."""
    how, height, width = cfg.videos, meta["height"], meta["width"]
    if cfg.pictures.fit != "smart" or min(height, width) < 1:
        return fitted(cfg, height, width)
    if how.area == "frame":
        return smart_size(cfg.side, height, width, least=how.least, most=how.most)
    n = len(taken(cfg, meta))
    most = how.most
    if how.cap:
        most = max(min(how.cap, how.most // n), int(how.least * 1.05)) * n
    return _of_all(cfg, (height, width), n, most)


def _of_all(cfg: VisionConfig, size: tuple[int, int], n: int, most: int) -> tuple[int, int]:
    """Sides rounded to whole blocks, the pixels of n frames then kept between videos.least and most."""
    side, least, (height, width) = cfg.side, cfg.videos.least, size
    if min(size) < side:
        by = max(side / height, side / width)
        height, width = int(height * by), int(width * by)
    if max(height, width) / min(height, width) > MOST_ASPECT:
        raise ValueError(
            f"a video of {size[0]}x{size[1]} pixels; needed: a longer side of at most {MOST_ASPECT} times "
            "the shorter"
        )
    down, across = round(height / side) * side, round(width / side) * side
    whole = round(n / cfg.frames) * cfg.frames
    if whole * down * across > most:
        by = math.sqrt(n * height * width / most)
        down, across = (max(side, math.floor(x / by / side) * side) for x in (height, width))
    elif whole * down * across < least:
        by = math.sqrt(least / (n * height * width))
        down, across = (math.ceil(x * by / side) * side for x in (height, width))
    return down, across


def video_patches(cfg: VisionConfig, payload: bytes, meta: Meta) -> Tensor:
    """A video's file to its patches [n, cfg.inputs], float32, in the order of the tokens; with `group` in its
    metadata to those of that tubelet. Raises ValueError where the file is not as its index says."""
    how, size = cfg.pictures, (meta["height"], meta["width"])
    target = video_size(cfg, meta) if how.fit == "smart" else size
    frames = _frames(payload, cfg.channels, size, tuple(taken(cfg, meta)), (*target, how.resample))
    frames = torch.cat([frames, *[frames[-1:]] * (-len(frames) % cfg.frames)])
    if "group" in meta:
        frames = frames.narrow(0, meta["group"] * cfg.frames, cfg.frames)
    if how.fit != "smart":
        return patches_of(cfg, torch.stack([normalised_frame(cfg, frame) for frame in frames]))
    planes = frames.to(torch.float32) / 255.0
    return patches_of(cfg, torch.stack([standard(how, frame) for frame in planes]))


@lru_cache(maxsize=2)  # the tubelets of a video are prepared one after another
def _frames(
    payload: bytes,
    channels: int,
    size: tuple[int, int],
    numbers: tuple[int, ...],
    target: tuple[int, int, str],
) -> Tensor:
    """uint8 [frames, channels, *target] of the frames with these numbers, each resized as it is decoded."""
    out = []
    for frame in decode_frames(payload, numbers, channels):
        if tuple(frame.shape[1:]) != size:
            raise ValueError(f"a frame is {tuple(frame.shape[1:])}, its index says {size[0]}x{size[1]}")
        out.append(_resized(frame[None], target[:2], target[2])[0])
    return torch.stack(out)


def _resized(frames: Tensor, size: tuple[int, int], resample: str) -> Tensor:
    """uint8 frames of another size, as torchvision resizes them."""
    if tuple(frames.shape[-2:]) == size:
        return frames
    native = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    x = frames if native else frames.to(torch.float32)
    y = F.interpolate(x, size, mode=resample, align_corners=False, antialias=True)
    return y if native else y.round_().clamp_(0, 255).to(torch.uint8)

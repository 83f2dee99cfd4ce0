"""The sizes that pictures are brought to, from their own size alone. Pure: no pixels are decoded.

The rules are those of the families' image processors.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from encoders.contract import Meta
from encoders.vision.config import Pictures, VisionConfig

MOST_ASPECT = 200  # of Qwen's processor


class Tiling(NamedTuple):
    """A grid of equal tiles, and whether the whole picture follows them as one more."""

    down: int
    across: int
    thumbnail: bool

    @property
    def tiles(self) -> int:
        """How many, the thumbnail included."""
        return self.down * self.across + self.thumbnail


def fitted(cfg: VisionConfig, height: int, width: int) -> tuple[int, int]:
    """Height and width, in pixels, that a picture, or each tile of one, is brought to. Raises ValueError for
    one of no pixels, and for one too long and narrow."""
    how = cfg.pictures
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {height}x{width} pixels; needed: one at least on each side")
    if how.fit == "smart":
        return smart_size(cfg.side, height, width, least=how.least, most=how.most)
    if how.fit == "patches":
        return _most_patches(how.most, cfg.patch, height, width)
    if how.fit == "budget":
        return _budget(cfg, height, width)
    if how.fit == "longest":
        by = max(height / how.edge, width / how.edge, 1.0)
        down, across = (-(-math.floor(n / by) // cfg.patch) * cfg.patch for n in (height, width))
        return down, across
    if how.fit == "none":
        return height, width
    return how.height, how.width


def whole_patches(cfg: VisionConfig, meta: Meta, size: tuple[int, int]) -> tuple[int, int]:
    """Patches (down, across) of a picture that is brought to `size`, whole merged squares of them; the rest
    is dropped. Raises ValueError where there are none."""
    down, across = (cfg.merge * (n // cfg.side) for n in size)
    if not down or not across:
        raise ValueError(
            f"a picture of {meta['height']}x{meta['width']} pixels is {size[0]}x{size[1]} to the encoder; "
            f"needed: {cfg.side} at least on each side"
        )
    return down, across


def tiling(how: Pictures, height: int, width: int) -> Tiling:
    """The grid of how.least to how.most tiles whose aspect is nearest to the picture's.

    Of grids that are as near the larger is taken while the picture has more than half its pixels (InternVL).
    Raises ValueError for a picture of no pixels.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {height}x{width} pixels; needed: one at least on each side")
    down, across = 1, 1
    nearest = math.inf
    for rows, columns in _grids(how.least, how.most):
        off = abs(width / height - columns / rows)
        enough = height * width > 0.5 * how.height * how.width * rows * columns
        if off < nearest or (off == nearest and enough):
            nearest, down, across = off, rows, columns
    return Tiling(down, across, how.thumbnail and down * across > 1)


@lru_cache
def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """(down, across) of all grids of so many tiles, smaller ones first, then narrower ones."""
    sides = range(1, most + 1)
    grids = [(d, a) for a in sides for d in sides if least <= d * a <= most]
    return tuple(sorted(grids, key=math.prod))


def smart_size(side: int, height: int, width: int, *, least: int, most: int) -> tuple[int, int]:
    """Sides rounded to multiples of `side` (half to even), the area then kept between least and most.

    Raises ValueError for a picture that is too long and narrow.
    """
    if max(height, width) > MOST_ASPECT * min(height, width):
        raise ValueError(
            f"a picture of {height}x{width} pixels; needed: a longer side of at most {MOST_ASPECT} times the "
            "shorter, such as parts of this one"
        )
    down, across = round(height / side) * side, round(width / side) * side
    if down * across > most:
        by = math.sqrt(height * width / most)
        down, across = (max(side, math.floor(n / by / side) * side) for n in (height, width))
    elif down * across < least:
        by = math.sqrt(least / (height * width))
        down, across = (math.ceil(n * by / side) * side for n in (height, width))
    return down, across


def _budget(cfg: VisionConfig, height: int, width: int) -> tuple[int, int]:
    """The picture's own grid, scaled to at least and at most so many patches, its sides then made whole
    merged squares (Nemotron Omni). Raises ValueError where a side would have no patch."""
    how, patch, merge = cfg.pictures, cfg.patch, cfg.merge
    down, across = (round(n / patch + 0.5) for n in (height, width))  # the next whole number, mostly
    by = min(math.sqrt(how.most / (down * across)), 1.0)
    down, across = math.floor(by * down), math.floor(by * across)
    if not down or not across:
        raise ValueError(
            f"a picture of {height}x{width} pixels has no row of patches left when it is scaled to "
            f"{how.most} of them; needed: one that is less long and narrow, such as parts of this one"
        )
    if how.most > how.least > down * across:
        by = math.sqrt(how.least / (down * across))
        down, across = math.ceil(by * down), math.ceil(by * across)
    down = _whole(down, across, merge, how.most)
    across = _whole(across, down, merge, how.most)
    return patch * down, patch * across


def _whole(n: int, other: int, merge: int, most: int) -> int:
    """n rounded up to a multiple of merge where n * other stays within most, else down, but not to none."""
    up = -(-n // merge) * merge
    return up if n == up or up * other <= most else max(merge, up - merge)


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

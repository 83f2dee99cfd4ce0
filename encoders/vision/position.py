"""Positions of patches: learned tables that are resized to a picture's grid, and rotary angles in two dims.

How a table is resized is part of a published model: each family has its own filter, and some resize in
float32 whatever the model's dtype is. Rotary angles are float32, as in the families' own code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.vision.config import Interpolation, VisionConfig
from encoders.vision.tokens import Places
from parallel.sequence.host import to_device
from parallel.sharding.dtypes import accumulation_dtype


def resized_all(table: Tensor, sizes: Sequence[tuple[int, int]], how: Interpolation) -> Tensor:
    """resized() to each of the sizes (down, across), end to end: [positions, d]."""
    found = [resized(table, *size, how) for size in sizes]
    return found[0] if len(found) == 1 else torch.cat([table[:0], *found])


def resized(table: Tensor, down: int, across: int, how: Interpolation) -> Tensor:
    """A square table [side * side, d], row by row, as one of down x across positions: [down * across, d].

    The values are those of the family's own code, to the bit. Where that rounds a float64 table to float32,
    gradients here are float64 all the same: rounded ones would depend on how items are split over ranks.
    """
    side = math.isqrt(len(table))
    if how.startswith("bicubic") and (down, across) == (side, side):
        return table
    if how == "corners":
        return _between_corners(table, side, down, across)
    exact = _filtered(table.to(accumulation_dtype(table.dtype)), down, across, how).to(table.dtype)
    if how == "bicubic" or table.dtype != torch.float64:
        return exact
    rounded = _filtered(table.detach().to(torch.float32), down, across, how)
    return exact + (rounded - exact.detach())


def _filtered(table: Tensor, down: int, across: int, how: Interpolation) -> Tensor:
    """resized() in the table's dtype."""
    side = math.isqrt(len(table))
    planes = table.view(1, side, side, -1).permute(0, 3, 1, 2)
    if how == "longer_side":
        most = max(down, across)
        planes = F.interpolate(planes, (most, most), mode="bilinear", align_corners=False)
        planes = planes[..., :down, :across]
    else:
        mode, _, more = how.partition("_")
        planes = F.interpolate(
            planes, (down, across), mode=mode, align_corners=False, antialias=more == "antialias"
        )
    return planes[0].flatten(1).T


def _between_corners(table: Tensor, side: int, down: int, across: int) -> Tensor:
    """Bilinear, with the corners of the table at those of the grid; the weights are float32."""

    def taps(size: int) -> tuple[Tensor, Tensor]:
        """Two positions of the table for each of the grid, and their weights: [2, size]."""
        index = torch.arange(size, dtype=torch.float32, device=table.device)
        source = index * (side - 1) / max(size - 1, 1)
        low = source.floor()
        taps = torch.stack([low, low + 1])
        return taps.long().clamp(max=side - 1), (1 - (source - taps).abs()).clamp(min=0)

    (row, of_row), (column, of_column) = taps(down), taps(across)
    at = row[:, None, :, None] * side + column[None, :, None, :]  # [2, 2, down, across]
    weight = of_row[:, None, :, None] * of_column[None, :, None, :]
    found = F.embedding(at.flatten(2), table) * weight.flatten(2).unsqueeze(-1).to(table.dtype)
    return found.sum((0, 1))


def rotary(cfg: VisionConfig, at: Places, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines [tokens, 1, head_dim] of the angles of tokens, float32; None without.

    A quarter of a head's width turns by the row and a quarter by the column, each pair of numbers being half
    a head apart. Prefix tokens do not turn.
    """
    if cfg.rope == "none":
        return None
    quarter = cfg.head_dim // 4
    step = torch.arange(quarter, dtype=torch.float32, device=device)
    if cfg.rope == "alternating":
        both = 1.0 / cfg.rope_base ** (torch.arange(0, cfg.head_dim, 2, device=device).float() / cfg.head_dim)
        rows, columns = (to_device(x, device).to(torch.float32)[:, None] for x in (at.row, at.column))
        return _angles(cfg, torch.cat([rows * both[0::2], columns * both[1::2]], 1), at)
    if cfg.rope == "axial":
        spread = (2 * step) / (2 * quarter)
        frequency = 1.0 / cfg.rope_base**spread
        place = [to_device(x, device).to(torch.float32) for x in (at.row, at.column)]
    else:
        frequency = 1 / cfg.rope_base ** torch.arange(
            0, 1, 4 / cfg.head_dim, dtype=torch.float32, device=device
        )
        pairs = ((at.row, at.down), (at.column, at.across))
        places = [[to_device(x, device).to(torch.float32) for x in pair] for pair in pairs]
        place = [2 * math.pi * (2.0 * ((x + 0.5) / n) - 1.0) for x, n in places]
    return _angles(cfg, torch.cat([x[:, None] * frequency for x in place], 1), at)


def _angles(cfg: VisionConfig, half: Tensor, at: Places) -> tuple[Tensor, Tensor]:
    """Cosines and sines of angles [tokens, head_dim / 2]; those of prefix tokens are 0."""
    angle, device = torch.cat([half, half], 1), half.device
    if cfg.prefix:
        angle = angle * to_device(at.prefix < 0, device).to(torch.float32)[:, None]
    return angle.cos()[:, None], angle.sin()[:, None]


def turn(x: Tensor, cosine: Tensor, sine: Tensor, *, single: bool) -> Tensor:
    """x [tokens, heads, head_dim] turned by rotary(), computed in float32; in float64 where x is so, except
    where `single` says that the family turns these in float32 too."""
    acc = torch.float32 if single else accumulation_dtype(x.dtype)
    y = x.to(acc)
    first, second = y.chunk(2, -1)
    return (y * cosine.to(acc) + torch.cat([-second, first], -1) * sine.to(acc)).to(x.dtype)

"""A vision transformer at native resolution: images of any size packed end to end, none padded.

Patch embedding, learned row and column positions, pre-norm blocks, then a 2x2 pixel shuffle that makes one
row of four neighbouring patches (arXiv 2404.16821, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encoders.compat import decode_image
from encoders.contract import Encoder, Features, ItemBatch, Meta
from encoders.layers import LayerNorm
from encoders.registry import register
from parallel.axis import Axes
from parallel.layout import check_divides
from parallel.packed import Packing, attention
from parallel.param import constant, declare, local, normal
from parallel.tensor import Linear, enter, leave


@dataclass(frozen=True)
class ViTConfig:
    """patch: pixels a side; channels: 1 or 3; max_grid: patches a side of the largest image."""

    patch: int = 2
    channels: int = 1
    width: int = 96
    heads: int = 12
    layers: int = 4
    mlp: int = 192
    max_grid: int = 64


class Block(nn.Module):
    """Attention and MLP, each x + f(norm(x)), heads and hidden width cut over tp."""

    def __init__(
        self, cfg: ViTConfig, axes: Axes, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        d, self.axes, self.head_dim = cfg.width, axes, cfg.width // cfg.heads
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        std, out_std = d**-0.5 * 0.7, d**-0.5 * 0.7 / (2 * cfg.layers) ** 0.5
        self.norm1, self.norm2 = LayerNorm(d, **kw), LayerNorm(d, **kw)
        for name in ("q", "k", "v"):
            declare(self, name, (d, d), normal(std), shard_dim=0, **kw)
            declare(self, f"bias_{name}", (d,), constant(0.0), shard_dim=0, **kw)
        self.out = Linear(d, d, normal(out_std), shard="row", **kw)
        self.up = Linear(d, cfg.mlp, normal(std), shard="column", bias=True, **kw)
        self.down = Linear(cfg.mlp, d, normal(out_std), shard="row", **kw)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        h = enter(self.norm1(x), self.axes)
        weight = torch.cat([local(self.q), local(self.k), local(self.v)])
        bias = torch.cat([local(self.bias_q), local(self.bias_k), local(self.bias_v)])
        q, k, v = F.linear(h, weight, bias).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        x = x + leave(self.out(attention(q, k, v, packing, causal=False).flatten(1)), self.axes)
        h = F.gelu(self.up(enter(self.norm2(x), self.axes)))
        return x + leave(self.down(h), self.axes)


@register("vit")
class ViT(Encoder):
    """Images (PNG or JPEG; height and width multiples of two patches) to (h / 2p) * (w / 2p) rows."""

    Config = ViTConfig
    tensor_parallel = True

    def __init__(
        self,
        cfg: ViTConfig,
        axes: Axes,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(cfg, axes, device=device, dtype=dtype)
        self.cfg = cfg
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        inputs = cfg.channels * cfg.patch**2
        self.patch = Linear(inputs, cfg.width, normal(inputs**-0.5), bias=True, **kw)
        declare(self, "row_position", (cfg.max_grid, cfg.width), normal(0.1), **kw)
        declare(self, "column_position", (cfg.max_grid, cfg.width), normal(0.1), **kw)
        self.blocks = nn.ModuleList(Block(cfg, axes, **kw) for _ in range(cfg.layers))
        self.norm = LayerNorm(cfg.width, **kw)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    @classmethod
    def grid(cls, cfg: ViTConfig, meta: Meta) -> tuple[int, int]:
        """Patches down and across; ValueError where the image does not fit the patches."""
        height, width = meta["height"], meta["width"]
        side = 2 * cfg.patch
        if height % side or width % side or not height or not width:
            raise ValueError(f"image of {height}x{width} pixels; needed: multiples of {side} (two patches)")
        rows, columns = height // cfg.patch, width // cfg.patch
        if max(rows, columns) > cfg.max_grid:
            raise ValueError(
                f"image of {height}x{width} pixels is {rows}x{columns} patches; max_grid is {cfg.max_grid}"
            )
        return rows, columns

    @classmethod
    def feature_width(cls, cfg: ViTConfig) -> int:
        return 4 * cfg.width

    @classmethod
    def rows(cls, cfg: ViTConfig, meta: Meta) -> int:
        down, across = cls.grid(cfg, meta)
        return down * across // 4

    @classmethod
    def cost(cls, cfg: ViTConfig, meta: Meta) -> float:
        down, across = cls.grid(cfg, meta)
        n, d = float(down * across), cfg.width
        block = 2 * n * (4 * d * d + 2 * d * cfg.mlp) + 4 * n * n * d
        return cfg.layers * block + 2 * n * d * cfg.channels * cfg.patch**2

    @classmethod
    def input_shape(cls, cfg: ViTConfig) -> tuple[int, ...]:
        return (cfg.channels * cfg.patch**2,)

    @classmethod
    def prepare(cls, cfg: ViTConfig, payload: bytes, meta: Meta) -> Tensor:
        """Patches [n, channels p p] in [-1, 1], row by row."""
        image = decode_image(payload, cfg.channels).to(torch.float32) / 127.5 - 1.0
        down, across = cls.grid(cfg, meta)
        p = cfg.patch
        if image.shape[1:] != (down * p, across * p):
            raise ValueError(
                f"image is {tuple(image.shape[1:])}, its index says {meta['height']}x{meta['width']}"
            )
        cut = image.reshape(cfg.channels, down, p, across, p)
        return cut.permute(1, 3, 0, 2, 4).reshape(down * across, -1).contiguous()

    @classmethod
    def check(cls, cfg: ViTConfig, tp: int) -> None:
        check_divides("vit width", cfg.width, "heads", cfg.heads)
        check_divides("vit heads", cfg.heads, "tp", tp)
        check_divides("vit mlp", cfg.mlp, "tp", tp)

    def forward(self, batch: ItemBatch) -> Features:
        cfg, device = self.cfg, batch.values.device
        grids = [self.grid(cfg, m) for m in batch.metas]
        packing = Packing.of(batch.lengths, device)
        row, column, order = (torch.from_numpy(a).to(device) for a in _places(grids))
        values = batch.values.to(local(self.patch.weight).dtype)
        x = self.patch(values)
        x = x + local(self.row_position)[row] + local(self.column_position)[column]
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, packing, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, packing)
        x = self.norm(x).index_select(0, order).reshape(-1, 4 * cfg.width)
        return Features(x, tuple(a * b // 4 for a, b in grids))


def _places(grids: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grid row and column of every packed patch, and the order that brings each 2x2 block together."""
    rows, columns, order, first = [], [], [], 0
    for down, across in grids:
        place = np.arange(down * across).reshape(down, across)
        rows.append(place.reshape(-1) // across)
        columns.append(place.reshape(-1) % across)
        blocks = place.reshape(down // 2, 2, across // 2, 2).transpose(0, 2, 1, 3)
        order.append(first + blocks.reshape(-1))
        first += down * across
    none = [np.zeros(0, dtype=np.int64)]
    return tuple(np.concatenate(parts or none) for parts in (rows, columns, order))  # type: ignore[return-value]

"""A vision transformer at native resolution: images of any size packed end to end, none padded.

Patch embedding, learned row and column positions, pre-norm blocks, then a pixel shuffle that makes one row
of a square of neighbouring patches, 2x2 by default (arXiv 2404.16821, section 3.1). The embedding puts
patches in the order of these squares, so that a range of rows is a range of patches in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.context import ItemAttention
from encoders.contract import Features, ItemBatch, Meta, check_positive
from encoders.layers import LayerNorm, enter, leave, run_layer
from encoders.media.decode import decode_still
from encoders.media.pictures import check_channels, rectangle
from encoders.registry import register
from encoders.share import Share, pieces
from encoders.stacked import StackedEncoder
from parallel.sequence.host import to_device
from parallel.sequence.intervals import before
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.low_rank import adapted
from parallel.sharding.param import ParamSpec, constant, declare, local, normal
from parallel.tensor_parallel.joined import joined_linear
from parallel.tensor_parallel.layers import Linear
from parallel.topology.axis import Axes
from parallel.topology.layout import check_divides


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT.

    patch: side of a patch, in pixels.
    channels: 1 for grey pictures, 3 for colour and grey ones.
    merge: side of the square of patches that makes one row.
    width: of hidden states; a row has merge^2 * width features.
    heads: attention heads; they divide width.
    layers: blocks.
    mlp: hidden width of the MLP.
    max_grid: side of the largest image, in patches.
    levels: indices of earlier layers whose outputs are features too (DeepStack, arXiv 2406.04334).
    """

    patch: int = 2
    channels: int = 1
    width: int = 96
    heads: int = 12
    layers: int = 4
    mlp: int = 192
    max_grid: int = 64
    levels: tuple[int, ...] = ()
    merge: int = 2

    @property
    def merged(self) -> int:
        """Patches of a row."""
        return self.merge**2


class Block(nn.Module):
    """Attention and MLP, each x + f(norm(x)); heads and hidden width are sharded over tp."""

    adapts = ("q", "k", "v")

    def __init__(self, cfg: ViTConfig, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        d, self.axes, self.head_dim = cfg.width, axes, cfg.width // cfg.heads
        std, out_std = d**-0.5 * 0.7, d**-0.5 * 0.7 / (2 * cfg.layers) ** 0.5
        self.norm1, self.norm2 = LayerNorm(d, **factory), LayerNorm(d, **factory)
        for name in ("q", "k", "v"):
            declare(self, name, (d, d), ParamSpec(normal(std), shard_dim=0), **factory)
            declare(self, f"bias_{name}", (d,), ParamSpec(constant(0.0), shard_dim=0), **factory)
        self.out = Linear(d, d, normal(out_std), shard="row", **factory)
        self.up = Linear(d, cfg.mlp, normal(std), shard="column", bias=True, **factory)
        self.down = Linear(cfg.mlp, d, normal(out_std), shard="row", **factory)

    def forward(self, x: Tensor, attention: ItemAttention, share: Share) -> Tensor:
        h = enter(self.norm1(x), self.axes, share)
        weights = [adapted(self, name) for name in self.adapts]
        biases = [local(self.bias_q), local(self.bias_k), local(self.bias_v)]
        qkv = torch.unflatten(joined_linear(h, weights, biases), -1, (3, -1, self.head_dim))
        y = attention(qkv[:, 0], qkv[:, 1:])
        x = x + leave(self.out(y.flatten(1)), self.axes, share)
        h = F.gelu(self.up(enter(self.norm2(x), self.axes, share)))
        return x + leave(self.down(h), self.axes, share)


@register("vit")
class ViT(StackedEncoder):
    """Images (PNG or JPEG; height and width multiples of two patches) to (h / 2p) * (w / 2p) rows."""

    Config = ViTConfig
    cfg: ViTConfig

    def add_stem(self, **factory: Unpack[FactoryKwargs]) -> None:
        cfg = self.cfg
        inputs = cfg.channels * cfg.patch**2
        self.patch = Linear(inputs, cfg.width, normal(inputs**-0.5), bias=True, **factory)
        position = ParamSpec(normal(0.1), matrix=False)
        declare(self, "row_position", (cfg.max_grid, cfg.width), position, **factory)
        declare(self, "column_position", (cfg.max_grid, cfg.width), position, **factory)

    def make_block(self, layer: int, **factory: Unpack[FactoryKwargs]) -> Block:
        return Block(self.cfg, self.axes, **factory)

    def add_norm(self, **factory: Unpack[FactoryKwargs]) -> None:
        self.norm = LayerNorm(self.cfg.width, **factory)

    @classmethod
    def grid(cls, cfg: ViTConfig, meta: Meta) -> tuple[int, int]:
        """Patches down and across. Raises ValueError where the image does not fit the patches."""
        height, width = meta["height"], meta["width"]
        side = cfg.merge * cfg.patch
        if height % side or width % side or not height or not width:
            raise ValueError(
                f"image of {height}x{width} pixels; needed: multiples of {side} ({_patches(cfg.merge)})"
            )
        rows, columns = height // cfg.patch, width // cfg.patch
        if max(rows, columns) > cfg.max_grid:
            raise ValueError(
                f"image of {height}x{width} pixels is {rows}x{columns} patches; max_grid is {cfg.max_grid}"
            )
        return rows, columns

    @classmethod
    def feature_width(cls, cfg: ViTConfig) -> int:
        return cfg.merged * cfg.width

    @classmethod
    def rows(cls, cfg: ViTConfig, meta: Meta) -> int:
        down, across = cls.grid(cfg, meta)
        check_channels(meta.get("channels", 1), cfg.channels)  # some indexes lack it
        return down * across // cfg.merged

    @classmethod
    def cost(cls, cfg: ViTConfig, meta: Meta) -> float:
        down, across = cls.grid(cfg, meta)
        n, d = float(down * across), cfg.width
        block = 2 * n * (4 * d * d + 2 * d * cfg.mlp) + 4 * n * n * d
        return cfg.layers * block + cls.stem_cost(cfg, meta)

    @classmethod
    def stem_cost(cls, cfg: ViTConfig, meta: Meta) -> float:
        down, across = cls.grid(cfg, meta)
        return 2.0 * down * across * cfg.width * cfg.channels * cfg.patch**2

    @classmethod
    def feature_levels(cls, cfg: ViTConfig) -> int:
        return 1 + len(cfg.levels)

    @classmethod
    def hidden_width(cls, cfg: ViTConfig, layer: int) -> int:
        """The levels of earlier stages travel with the hidden states."""
        return cfg.width * (1 + sum(level < layer for level in cfg.levels))

    @classmethod
    def tokens_per_row(cls, cfg: ViTConfig) -> int:
        return cfg.merged

    @classmethod
    def input_shape(cls, cfg: ViTConfig) -> tuple[int, ...]:
        return (cfg.channels * cfg.patch**2,)

    @classmethod
    def prepare(cls, cfg: ViTConfig, payload: bytes, meta: Meta) -> Tensor:
        """Patches [n, channels * patch * patch], float32 in [-1, 1], row by row of the grid."""
        patches = _patches_of(cfg, payload, meta, cls.grid(cfg, meta))
        return _scaled(patches, torch.empty(patches.shape, dtype=torch.float32))

    @classmethod
    def prepare_into(cls, cfg: ViTConfig, payload: bytes, meta: Meta, out: Tensor) -> Tensor:
        if out.dtype != torch.float32 or len(out) != cls.input_count(cfg, meta):
            return super().prepare_into(cfg, payload, meta, out)
        return _scaled(_patches_of(cfg, payload, meta, cls.grid(cfg, meta)), out)

    @classmethod
    def example(cls, cfg: ViTConfig, rows: int) -> Meta:
        down, across = rectangle(rows, cfg.max_grid // cfg.merge)
        side = cfg.merge * cfg.patch
        return {"height": down * side, "width": across * side, "channels": cfg.channels}

    @classmethod
    def check(cls, cfg: ViTConfig, tp: int) -> None:
        check_positive("vit", cfg, ("patch", "width", "heads", "layers", "mlp", "max_grid", "merge"))
        if cfg.channels not in (1, 3):
            raise ValueError(f"vit channels is {cfg.channels}; needed: 1 (grey) or 3 (colour)")
        check_divides("vit width", cfg.width, "heads", cfg.heads)
        check_divides("vit heads", cfg.heads, "tp", tp)
        check_divides("vit mlp", cfg.mlp, "tp", tp)
        if list(cfg.levels) != sorted(set(cfg.levels)) or not set(cfg.levels) <= set(range(cfg.layers)):
            raise ValueError(
                f"vit levels are {list(cfg.levels)}; needed: ascending layers of 0-{cfg.layers - 1}, each "
                f"once; nearest: {sorted({min(max(0, i), cfg.layers - 1) for i in cfg.levels})}"
            )

    def forward(self, batch: ItemBatch, hidden: Tensor | None = None) -> Features | Tensor:
        cfg = self.cfg
        grids = [self.grid(cfg, m) for m in batch.metas]
        rows = tuple(a * b // cfg.merged for a, b in grids)
        share = Share.of(rows, self.axes, cfg.merged)
        states = [self._embed(batch, grids, share)] if hidden is None else torch.split(hidden, cfg.width, 1)
        x, levels = states[0], list(states[1:])
        attention = ItemAttention.of(share, self.axes.cp, x.device, self.timeout_s)
        for i, block in zip(self.stage.layers, self.blocks.values(), strict=True):
            x = run_layer(block, self.recompute, x, attention, share)
            if i in cfg.levels:
                levels.append(x)
        if not self.stage.last:
            return torch.cat([x, *levels], 1) if levels else x
        found = [y.reshape(-1, cfg.merged * cfg.width) for y in (self.norm(x), *levels)]
        return Features(torch.stack(found, 1) if levels else found[0], rows, share.part[0] // cfg.merged)

    def _embed(self, batch: ItemBatch, grids: Sequence[tuple[int, int]], share: Share) -> Tensor:
        """The patches that this rank keeps, embedded: [kept, width]."""
        kept = _kept_patches(grids, share, self.cfg.merge)
        kept[0] -= sum(share.lengths[: batch.first])  # batch.values lack the items before batch.first
        patch, row, column = to_device(kept, batch.values.device)
        x: Tensor = self.patch(batch.values.index_select(0, patch).to(local(self.patch.weight).dtype))
        return x + local(self.row_position)[row] + local(self.column_position)[column]


def _patches_of(cfg: ViTConfig, payload: bytes, meta: Meta, grid: tuple[int, int]) -> Tensor:
    """uint8 [n, channels * patch * patch], row by row of the grid."""
    image, (down, across), p = decode_still(payload, cfg.channels), grid, cfg.patch
    if image.shape[1:] != (down * p, across * p):
        raise ValueError(
            f"image is {tuple(image.shape[1:])}, its index says {meta['height']}x{meta['width']}"
        )
    patches = image.reshape(cfg.channels, down, p, across, p).permute(1, 3, 0, 2, 4)
    # Bytes are put in order, not floats, and floats are written once: memory is most of the cost.
    return patches.reshape(down * across, -1)


def _scaled(patches: Tensor, out: Tensor) -> Tensor:
    """uint8 values as float32 in [-1, 1], written to `out`."""
    return out.copy_(patches).div_(127.5).sub_(1.0)


def _patches(n: int) -> str:
    return {1: "a patch", 2: "two patches"}.get(n, f"{n} patches")


def _kept_patches(grids: Sequence[tuple[int, int]], share: Share, merge: int) -> np.ndarray:
    """Packed index, grid row and grid column of this rank's patches, in the order of the squares that make a
    row: int64 [3, kept]."""
    own = pieces(share.lengths, share.part)
    length = np.asarray([p.stop - p.start for p in own], dtype=np.int64)
    first = np.cumsum([0, *share.lengths])

    def each(of_piece: Sequence[int]) -> np.ndarray:
        return np.repeat(np.asarray(of_piece, dtype=np.int64), length)

    across = each([grids[p.item][1] for p in own])
    in_item = np.arange(length.sum()) + each([p.start for p in own]) - each(before(length).tolist())
    block, corner = in_item // merge**2, in_item % merge**2
    row = merge * (block // (across // merge)) + corner // merge
    column = merge * (block % (across // merge)) + corner % merge
    return np.stack([each([int(first[p.item]) for p in own]) + row * across + column, row, column])

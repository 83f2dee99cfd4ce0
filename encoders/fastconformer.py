"""A FastConformer (arXiv 2305.05084): log-mel frames, 8x convolutional subsampling, conformer blocks.

It differs from the published one twice. Positions are rotary instead of relative, so that attention is one
fused call. The convolution module has an RMS norm over groups of channels instead of a batch norm, because
statistics over the batch would depend on dp and statistics over all channels on tp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.compat import log_mel
from encoders.context import ItemAttention, ItemConvolution
from encoders.contract import Features, ItemBatch, Meta, check_positive
from encoders.layers import LayerNorm, enter, leave, run_layer
from encoders.media.decode import read_sound
from encoders.registry import register
from encoders.share import Share, pieces
from encoders.stacked import StackedEncoder
from parallel.sequence.host import to_device
from parallel.sequence.intervals import before, column, numbers
from parallel.sharding.dtypes import FactoryKwargs, accumulation_dtype
from parallel.sharding.low_rank import adapted
from parallel.sharding.param import ParamSpec, constant, declare, local, normal
from parallel.tensor_parallel.joined import joined_linear
from parallel.tensor_parallel.layers import Linear
from parallel.topology.axis import Axes
from parallel.topology.layout import check_divides


@dataclass(frozen=True)
class FastConformerConfig:
    """Sizes of a FastConformer.

    rate: samples a second; clips of another rate are refused.
    mels: mel bands of a frame.
    channels: of the convolutions that subsample.
    width: of hidden states and features.
    heads: attention heads, and groups of the norm in the convolution module; they divide width.
    layers: blocks.
    ffn: hidden width of the feed-forward modules.
    kernel: rows that a row's depthwise convolution sees, odd.
    """

    rate: int = 8000
    mels: int = 40
    channels: int = 32
    width: int = 96
    heads: int = 12
    layers: int = 4
    ffn: int = 192
    kernel: int = 9

    @property
    def window(self) -> int:
        """Samples of 25 ms."""
        return self.rate // 40

    @property
    def hop(self) -> int:
        """Samples of 10 ms."""
        return self.rate // 100


class Subsample(nn.Module):
    """Three convolutions of stride 2 over time and frequency; the second and third are depthwise separable.

    All clips lie along one time axis. Each begins at a multiple of 8 frames and has a gap after it. The gaps
    are zeroed after every convolution, so that a clip sees zeros beyond its ends, as if it were alone.
    """

    def __init__(
        self, mels: int, channels: int, width: int, published: bool = False, **factory: Unpack[FactoryKwargs]
    ) -> None:
        """width: of a row. published: as in Parakeet, ReLU between, biases on depthwise convolutions."""
        super().__init__()
        c, self.mels, self.published = channels, mels, published
        declare(self, "conv", (c, 1, 3, 3), normal(0.5), **factory)
        declare(self, "conv_bias", (c,), constant(0.0), **factory)
        for i in (1, 2):
            declare(self, f"depth{i}", (c, 1, 3, 3), normal(0.4), **factory)
            if published:
                declare(self, f"depth_bias{i}", (c,), constant(0.0), **factory)
            declare(self, f"point{i}", (c, c, 1, 1), normal((2.0 / c) ** 0.5), **factory)
            declare(self, f"point_bias{i}", (c,), constant(0.0), **factory)
        bands = halved(halved(halved(mels)))
        self.out = Linear(c * bands, width, normal((c * bands) ** -0.5), bias=True, **factory)

    def forward(self, frames: Tensor, lengths: Sequence[int]) -> Tensor:
        """frames [sum of lengths, mels] of clips to their rows [sum of ceil(length / 8), width]."""
        slots = [8 * (-(-n // 8) + 1) for n in lengths]
        total = sum(slots) or 8
        starts = before(column(slots))
        x = frames.new_zeros((total, self.mels)).index_copy(0, self._rows(starts, lengths, frames), frames)
        x = x.view(1, 1, total, self.mels)
        counts, at = list(lengths), starts
        for stage in range(3):
            if stage == 0:
                x = F.conv2d(x, local(self.conv), local(self.conv_bias), stride=2, padding=1)
            else:
                depth_bias = local(getattr(self, f"depth_bias{stage}")) if self.published else None
                x = F.conv2d(x, local(getattr(self, f"depth{stage}")), depth_bias, 2, 1, groups=x.shape[1])
                bias = local(getattr(self, f"point_bias{stage}"))
                x = F.conv2d(x, local(getattr(self, f"point{stage}")), bias)
            counts, at = [halved(n) for n in counts], at // 2
            rows = self._rows(at, counts, frames)
            real = torch.zeros(x.shape[2], dtype=x.dtype, device=x.device)
            real[rows] = 1.0
            x = (F.relu(x) if self.published else F.silu(x)) * real.view(1, 1, -1, 1)
        x = x[0].transpose(0, 1).flatten(1).index_select(0, rows)  # [rows, channels * bands]
        y: Tensor = self.out(x)
        return y

    @staticmethod
    def _rows(starts: np.ndarray, counts: Sequence[int], like: Tensor) -> Tensor:
        """starts[i], starts[i] + 1, .. counts[i] of them, for each i: int64, on the device of `like`."""
        rows = numbers([(s, s + n) for s, n in zip(starts, counts, strict=True)])
        return to_device(rows, like.device)


def halved(n: int) -> int:
    """Length after a convolution of width 3, stride 2, padding 1."""
    return (n + 1) // 2


def subsample_flops(rows: int, mels: int, channels: int, width: int) -> float:
    """Forward FLOPs of Subsample for a clip of so many rows, without the gap after it."""
    # Outputs of each stride of 2, time x frequency: 8 frames a row before the first.
    first, second, third = (rows * 2.0 ** (2 - i) * mels / 2 ** (i + 1) for i in range(3))
    convolutions = 2.0 * channels * (9 * first + (9 + channels) * (second + third))
    return float(convolutions + 2.0 * rows * width * channels * mels / 8)


class FeedForward(nn.Module):
    """norm, up, SiLU, down; the hidden width is sharded over tp."""

    def __init__(
        self, cfg: FastConformerConfig, axes: Axes, out_std: float, **factory: Unpack[FactoryKwargs]
    ) -> None:
        super().__init__()
        self.axes = axes
        self.norm = LayerNorm(cfg.width, **factory)
        self.up = Linear(cfg.width, cfg.ffn, normal(cfg.width**-0.5), shard="column", bias=True, **factory)
        self.down = Linear(cfg.ffn, cfg.width, normal(out_std), shard="row", **factory)

    def forward(self, x: Tensor, share: Share) -> Tensor:
        h = F.silu(self.up(enter(self.norm(x), self.axes, share)))
        return leave(self.down(h), self.axes, share)


@dataclass(frozen=True)
class BlockContext:
    """What all blocks use of a batch.

    share: which rows this rank has.
    attention, convolution: how these rows see the other rows of their items.
    angles: cosine and sine [rows, 1, head_dim / 2] of the rows' positions in their items.
    """

    share: Share
    attention: ItemAttention
    convolution: ItemConvolution
    angles: tuple[Tensor, Tensor]


class Block(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, norm; heads and channels are sharded over
    tp."""

    adapts = ("q", "k", "v", "value", "gate")

    def __init__(self, cfg: FastConformerConfig, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        self.axes, self.head_dim = axes, cfg.width // cfg.heads
        d = cfg.width
        std, out_std = d**-0.5, d**-0.5 / (2 * cfg.layers) ** 0.5
        self.ff1, self.ff2 = (FeedForward(cfg, axes, out_std, **factory) for _ in range(2))
        self.norm_att, self.norm_conv, self.norm_out = (LayerNorm(d, **factory) for _ in range(3))
        for name in ("q", "k", "v", "value", "gate"):
            declare(self, name, (d, d), ParamSpec(normal(std), shard_dim=0), **factory)
        self.att_out = Linear(d, d, normal(out_std), shard="row", **factory)
        depth = ParamSpec(normal(cfg.kernel**-0.5), shard_dim=0, matrix=False)
        declare(self, "depth", (d, cfg.kernel), depth, **factory)
        declare(self, "group_norm", (d,), ParamSpec(constant(1.0), shard_dim=0), **factory)
        self.conv_out = Linear(d, d, normal(out_std), shard="row", **factory)

    def forward(self, x: Tensor, ctx: BlockContext) -> Tensor:
        x = x + 0.5 * self.ff1(x, ctx.share)
        x = x + self._attend(x, ctx)
        x = x + self._convolve(x, ctx)
        y: Tensor = self.norm_out(x + 0.5 * self.ff2(x, ctx.share))
        return y

    def _attend(self, x: Tensor, ctx: BlockContext) -> Tensor:
        h = enter(self.norm_att(x), self.axes, ctx.share)
        weights = [adapted(self, name) for name in ("q", "k", "v")]
        q, k, v = torch.unflatten(joined_linear(h, weights), -1, (3, -1, self.head_dim)).unbind(1)
        y = ctx.attention(rotate(q, ctx.angles), torch.stack([rotate(k, ctx.angles), v], 1))
        return leave(self.att_out(y.flatten(1)), self.axes, ctx.share)

    def _convolve(self, x: Tensor, ctx: BlockContext) -> Tensor:
        h = enter(self.norm_conv(x), self.axes, ctx.share)
        h = F.linear(h, adapted(self, "value")) * torch.sigmoid(F.linear(h, adapted(self, "gate")))
        h = ctx.convolution(h, local(self.depth))
        groups = torch.unflatten(h.to(accumulation_dtype(h.dtype)), -1, (-1, self.head_dim))
        h = F.rms_norm(groups, (self.head_dim,), None, 1e-5).flatten(1).to(h.dtype) * local(self.group_norm)
        return leave(self.conv_out(F.silu(h)), self.axes, ctx.share)


def rotary_angles(position: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [rows, 1, head_dim / 2] of the rotary embedding (arXiv 2104.09864)."""
    index = torch.arange(0, head_dim, 2, dtype=torch.float64, device=position.device)
    frequency = 10000.0 ** (-index / head_dim)
    angle = position.to(torch.float64).unsqueeze(1) * frequency
    return angle.cos().to(dtype).unsqueeze(1), angle.sin().to(dtype).unsqueeze(1)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs of features of [rows, heads, head_dim] by their row's angles."""
    cos, sin = angles
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


@register("fastconformer")
class FastConformer(StackedEncoder):
    """Clips (PCM wav at cfg.rate) to ceil(frames / 8) rows, a frame every 10 ms."""

    Config = FastConformerConfig
    cfg: FastConformerConfig

    def add_stem(self, **factory: Unpack[FactoryKwargs]) -> None:
        self.subsample = Subsample(self.cfg.mels, self.cfg.channels, self.cfg.width, **factory)

    def make_block(self, layer: int, **factory: Unpack[FactoryKwargs]) -> Block:
        return Block(self.cfg, self.axes, **factory)

    @classmethod
    def frames(cls, cfg: FastConformerConfig, meta: Meta) -> int:
        """Log-mel frames of a clip. Raises ValueError for a clip of another rate."""
        if meta["rate"] != cfg.rate:
            raise ValueError(f"clip of {meta['rate']} samples a second; this encoder needs {cfg.rate}")
        return meta["samples"] // cfg.hop + 1 if meta["samples"] else 0

    @classmethod
    def feature_width(cls, cfg: FastConformerConfig) -> int:
        return cfg.width

    @classmethod
    def rows(cls, cfg: FastConformerConfig, meta: Meta) -> int:
        return -(-cls.frames(cfg, meta) // 8)

    @classmethod
    def cost(cls, cfg: FastConformerConfig, meta: Meta) -> float:
        n, d = float(cls.rows(cfg, meta)), cfg.width
        block = 2 * n * (4 * d * cfg.ffn + 7 * d * d + d * cfg.kernel) + 4 * n * n * d
        return cfg.layers * block + cls.stem_cost(cfg, meta)

    @classmethod
    def stem_cost(cls, cfg: FastConformerConfig, meta: Meta) -> float:
        return subsample_flops(cls.rows(cfg, meta), cfg.mels, cfg.channels, cfg.width)

    @classmethod
    def input_shape(cls, cfg: FastConformerConfig) -> tuple[int, ...]:
        return (cfg.mels,)

    @classmethod
    def prepare(cls, cfg: FastConformerConfig, payload: bytes, meta: Meta) -> Tensor:
        """Log-mel frames [n, mels], shifted and scaled to about unit range."""
        samples, rate = read_sound(payload)
        if rate != meta["rate"] or len(samples) != meta["samples"]:
            raise ValueError(f"clip has {len(samples)} samples at {rate}, its index says otherwise")
        if not len(samples):
            return torch.zeros((0, cfg.mels))
        frames = log_mel(samples, rate=cfg.rate, mels=cfg.mels, window=cfg.window, hop=cfg.hop)
        return (frames + 2.0) / 3.5  # about zero mean and unit spread for speech at full level

    @classmethod
    def input_count(cls, cfg: FastConformerConfig, meta: Meta) -> int:
        return cls.frames(cfg, meta)

    @classmethod
    def example(cls, cfg: FastConformerConfig, rows: int) -> Meta:
        return {"samples": cfg.hop * (8 * rows - 1), "rate": cfg.rate}

    @classmethod
    def check(cls, cfg: FastConformerConfig, tp: int) -> None:
        sizes = ("rate", "mels", "channels", "width", "heads", "layers", "ffn", "kernel")
        check_positive("fastconformer", cfg, sizes)
        check_divides("fastconformer width", cfg.width, "heads", cfg.heads)
        check_divides("fastconformer heads", cfg.heads, "tp", tp)
        check_divides("fastconformer ffn", cfg.ffn, "tp", tp)
        if cfg.kernel % 2 == 0:
            raise ValueError(f"fastconformer kernel is {cfg.kernel}; needed: odd, nearest: {cfg.kernel + 1}")

    def forward(self, batch: ItemBatch, hidden: Tensor | None = None) -> Features | Tensor:
        cfg, cp = self.cfg, self.axes.cp
        frames = [self.frames(cfg, m) for m in batch.metas]
        rows = tuple(-(-n // 8) for n in frames)
        share = Share.of(rows, self.axes)
        x = self._embed(batch, frames, share) if hidden is None else hidden
        position = numbers([(p.start, p.stop) for p in pieces(share.lengths, share.own)])
        ctx = BlockContext(
            share=share,
            attention=ItemAttention.of(share, cp, x.device, self.timeout_s),
            convolution=ItemConvolution.of(share, cp, cfg.kernel, x.device, self.timeout_s),
            angles=rotary_angles(to_device(position, x.device), cfg.width // cfg.heads, x.dtype),
        )
        for block in self.blocks.values():
            x = run_layer(block, self.recompute, x, ctx)
        return Features(x, rows, share.part[0]) if self.stage.last else x

    def _embed(self, batch: ItemBatch, frames: Sequence[int], share: Share) -> Tensor:
        """The rows that this rank keeps, subsampled from the frames in the batch: [kept, width]."""
        return subsampled(self.subsample, batch, frames, share)


def subsampled(subsample: Subsample, batch: ItemBatch, frames: Sequence[int], share: Share) -> Tensor:
    """The rows that a rank keeps, of clips of so many frames: [kept, width].

    Row r sees frames 8 r - 7 to 8 r + 7, so a rank that starts inside a clip computes the row before too.
    The batch has the frames that this needs: nothing is fetched from other ranks.
    """
    own = pieces(share.lengths, share.part)
    extra = 1 if own and own[0].start else 0
    first = np.cumsum([0, *frames]) - sum(frames[: batch.first])  # row in values of an item's first frame
    spans = []
    for i, p in enumerate(own):
        start = 8 * (p.start - (extra if i == 0 else 0))
        spans.append((int(first[p.item]) + start, int(first[p.item]) + min(8 * p.stop, frames[p.item])))
    low, high = (spans[0][0], spans[-1][1]) if spans else (0, 0)
    needed = batch.values[low:high].to(local(subsample.conv).dtype)
    x: Tensor = subsample(needed, [b - a for a, b in spans])
    return x[extra:]

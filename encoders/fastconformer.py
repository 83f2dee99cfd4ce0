"""A FastConformer (arXiv 2305.05084): log-mel frames, 8x convolutional subsampling, conformer blocks.

Differences from the published one, and why: rotary instead of relative positions, so that attention is one
fused call; a group RMS norm instead of batch norm in the convolution module, because statistics over the
batch would depend on dp and those over all channels on tp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.compat import log_mel, read_wav
from encoders.context import ItemAttention, ItemConvolution
from encoders.contract import Encoder, Features, ItemBatch, Meta, check_positive
from encoders.layers import LayerNorm, enter, leave, run_layer
from encoders.registry import register
from encoders.share import Share, pieces
from parallel.sharding.dtypes import FactoryKwargs, accumulation_dtype
from parallel.sharding.param import ParamSpec, constant, declare, local, normal
from parallel.tensor_parallel.joined import joined_linear
from parallel.tensor_parallel.layers import Linear
from parallel.topology.axis import Axes
from parallel.topology.layout import check_divides
from parallel.topology.stage import Stage, whole


@dataclass(frozen=True)
class FastConformerConfig:
    """rate: samples a second that clips must have; kernel: frames of the depthwise convolution, odd."""

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
    """Three convolutions of stride 2 over time and frequency, the second and third depthwise separable.

    All clips lie along one time axis, each from a multiple of 8 frames on with a gap after it that is zeroed
    after every stage: a clip sees zeros beyond its ends, as if it were alone.
    """

    def __init__(
        self, cfg: FastConformerConfig, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        c, self.mels = cfg.channels, cfg.mels
        factory: FactoryKwargs = {"device": device, "dtype": dtype}
        declare(self, "conv", (c, 1, 3, 3), normal(0.5), **factory)
        declare(self, "conv_bias", (c,), constant(0.0), **factory)
        for i in (1, 2):
            declare(self, f"depth{i}", (c, 1, 3, 3), normal(0.4), **factory)
            declare(self, f"point{i}", (c, c, 1, 1), normal((2.0 / c) ** 0.5), **factory)
            declare(self, f"point_bias{i}", (c,), constant(0.0), **factory)
        bands = halved(halved(halved(cfg.mels)))
        self.out = Linear(c * bands, cfg.width, normal((c * bands) ** -0.5), bias=True, **factory)

    def forward(self, frames: Tensor, lengths: Sequence[int]) -> Tensor:
        slots = [8 * (-(-n // 8) + 1) for n in lengths]
        total = sum(slots) or 8
        starts = np.cumsum([0, *slots[:-1]]) if slots else np.zeros(0, dtype=np.int64)
        x = frames.new_zeros((total, self.mels)).index_copy(0, self._rows(starts, lengths, frames), frames)
        x = x.view(1, 1, total, self.mels)
        counts, at = list(lengths), starts
        for stage in range(3):
            if stage == 0:
                x = F.conv2d(x, local(self.conv), local(self.conv_bias), stride=2, padding=1)
            else:
                x = F.conv2d(x, local(getattr(self, f"depth{stage}")), None, 2, 1, groups=x.shape[1])
                point, bias = (
                    local(getattr(self, f"point{stage}")),
                    local(getattr(self, f"point_bias{stage}")),
                )
                x = F.conv2d(x, point, bias)
            counts, at = [halved(n) for n in counts], at // 2
            rows = self._rows(at, counts, frames)
            real = torch.zeros(x.shape[2], dtype=x.dtype, device=x.device)
            real[rows] = 1.0
            x = F.silu(x) * real.view(1, 1, -1, 1)
        x = x[0].transpose(0, 1).flatten(1).index_select(0, rows)  # [rows, channels * bands]
        return self.out(x)

    @staticmethod
    def _rows(starts: np.ndarray, counts: Sequence[int], like: Tensor) -> Tensor:
        spans = [np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]
        rows = np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)
        return torch.from_numpy(rows).to(like.device)


def halved(n: int) -> int:
    """Length after a convolution of width 3, stride 2, padding 1."""
    return (n + 1) // 2


class FeedForward(nn.Module):
    """norm, up, SiLU, down."""

    def __init__(
        self,
        cfg: FastConformerConfig,
        axes: Axes,
        out_std: float,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.axes = axes
        factory: FactoryKwargs = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(cfg.width, **factory)
        self.up = Linear(cfg.width, cfg.ffn, normal(cfg.width**-0.5), shard="column", bias=True, **factory)
        self.down = Linear(cfg.ffn, cfg.width, normal(out_std), shard="row", **factory)

    def forward(self, x: Tensor, share: Share) -> Tensor:
        h = F.silu(self.up(enter(self.norm(x), self.axes, share)))
        return leave(self.down(h), self.axes, share)


@dataclass(frozen=True)
class Local:
    """What the blocks need of a batch: this rank's share of it, how its rows see others, rotary angles."""

    share: Share
    attention: ItemAttention
    convolution: ItemConvolution
    angles: tuple[Tensor, Tensor]


class Block(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, norm; heads and channels cut over tp."""

    def __init__(
        self,
        cfg: FastConformerConfig,
        axes: Axes,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.axes, self.head_dim = axes, cfg.width // cfg.heads
        d = cfg.width
        factory: FactoryKwargs = {"device": device, "dtype": dtype}
        std, out_std = d**-0.5, d**-0.5 / (2 * cfg.layers) ** 0.5
        self.ff1, self.ff2 = (
            FeedForward(cfg, axes, out_std, **factory),
            FeedForward(cfg, axes, out_std, **factory),
        )
        self.norm_att, self.norm_conv, self.norm_out = (LayerNorm(d, **factory) for _ in range(3))
        for name in ("q", "k", "v", "value", "gate"):
            declare(self, name, (d, d), ParamSpec(normal(std), shard_dim=0), **factory)
        self.att_out = Linear(d, d, normal(out_std), shard="row", **factory)
        declare(self, "depth", (d, cfg.kernel), ParamSpec(normal(cfg.kernel**-0.5), shard_dim=0), **factory)
        declare(self, "group_norm", (d,), ParamSpec(constant(1.0), shard_dim=0), **factory)
        self.conv_out = Linear(d, d, normal(out_std), shard="row", **factory)

    def forward(self, x: Tensor, here: Local) -> Tensor:
        x = x + 0.5 * self.ff1(x, here.share)
        x = x + self._attend(x, here)
        x = x + self._convolve(x, here)
        return self.norm_out(x + 0.5 * self.ff2(x, here.share))

    def _attend(self, x: Tensor, here: Local) -> Tensor:
        h = enter(self.norm_att(x), self.axes, here.share)
        weights = [local(self.q), local(self.k), local(self.v)]
        q, k, v = joined_linear(h, weights).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        y = here.attention(rotate(q, here.angles), torch.stack([rotate(k, here.angles), v], 1))
        return leave(self.att_out(y.flatten(1)), self.axes, here.share)

    def _convolve(self, x: Tensor, here: Local) -> Tensor:
        h = enter(self.norm_conv(x), self.axes, here.share)
        h = F.linear(h, local(self.value)) * torch.sigmoid(F.linear(h, local(self.gate)))
        h = here.convolution(h, local(self.depth))
        groups = h.to(accumulation_dtype(h.dtype)).unflatten(-1, (-1, self.head_dim))
        h = F.rms_norm(groups, (self.head_dim,), None, 1e-5).flatten(1).to(h.dtype) * local(self.group_norm)
        return leave(self.conv_out(F.silu(h)), self.axes, here.share)


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
class FastConformer(Encoder):
    """Clips (PCM wav at cfg.rate) to ceil(frames / 8) rows, a frame every 10 ms."""

    Config = FastConformerConfig
    tensor_parallel = context_parallel = pipeline = True

    def __init__(
        self,
        cfg: FastConformerConfig,
        axes: Axes,
        *,
        stage: Stage | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(cfg, axes, device=device, dtype=dtype)
        self.cfg, self.axes, self.stage = cfg, axes, stage or whole(cfg.layers)
        factory: FactoryKwargs = {"device": device, "dtype": dtype}
        if self.stage.first:
            self.subsample = Subsample(cfg, **factory)
        self.blocks = nn.ModuleDict({str(i): Block(cfg, axes, **factory) for i in self.stage.layers})

    @property
    def layers(self) -> Sequence[nn.Module]:
        return list(self.blocks.values())

    @classmethod
    def frames(cls, cfg: FastConformerConfig, meta: Meta) -> int:
        """Log-mel frames of a clip."""
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
        n, d, c = float(cls.rows(cfg, meta)), cfg.width, cfg.channels
        # Output places of the three stages, time x frequency, per row.
        full, half, quarter = (n * 4 ** (2 - i) * cfg.mels / 2 ** (i + 1) * 2**i for i in range(3))
        stages = 2 * c * (9 * full + (9 + c) * (half + quarter))
        return stages + 2 * n * d * c * cfg.mels / 8

    @classmethod
    def layer_count(cls, cfg: FastConformerConfig) -> int:
        return cfg.layers

    @classmethod
    def hidden_width(cls, cfg: FastConformerConfig, layer: int) -> int:
        return cfg.width

    @classmethod
    def input_shape(cls, cfg: FastConformerConfig) -> tuple[int, ...]:
        return (cfg.mels,)

    @classmethod
    def prepare(cls, cfg: FastConformerConfig, payload: bytes, meta: Meta) -> Tensor:
        """Log-mel frames [n, mels], shifted and scaled to about unit range."""
        samples, rate = read_wav(payload)
        if rate != meta["rate"] or len(samples) != meta["samples"]:
            raise ValueError(f"clip has {len(samples)} samples at {rate}, its index says otherwise")
        if not len(samples):
            return torch.zeros((0, cfg.mels))
        frames = log_mel(samples, rate=cfg.rate, mels=cfg.mels, window=cfg.window, hop=cfg.hop)
        return (frames + 2.0) / 3.5  # about zero mean and unit spread for speech at full level

    @classmethod
    def check(cls, cfg: FastConformerConfig, tp: int) -> None:
        sizes = ("rate", "mels", "channels", "width", "heads", "layers", "ffn", "kernel")
        check_positive("fastconformer", cfg, *sizes)
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
        own = [np.arange(p.start, p.stop) for p in pieces(share.lengths, share.own)]
        position = np.concatenate(own) if own else np.zeros(0, dtype=np.int64)
        here = Local(
            share,
            ItemAttention.of(share, cp, x.device, self.timeout_s),
            ItemConvolution.of(share, cp, cfg.kernel, x.device, self.timeout_s),
            rotary_angles(torch.from_numpy(position).to(x.device), cfg.width // cfg.heads, x.dtype),
        )
        for block in self.blocks.values():
            x = run_layer(block, self.recompute, x, here)
        return Features(x, rows, share.part[0]) if self.stage.last else x

    def _embed(self, batch: ItemBatch, frames: Sequence[int], share: Share) -> Tensor:
        """Subsampled rows that this rank keeps, [kept, width], from the frames of all clips.

        Row r sees frames 8 r - 7 to 8 r + 7: a rank that starts inside a clip computes the row before too.
        Frames are at hand, so that no intermediate rows need to travel.
        """
        own = pieces(share.lengths, share.part)
        extra = 1 if own and own[0].start else 0
        first = np.cumsum([0, *frames]) - sum(frames[: batch.first])  # place in values, of items there
        spans = []
        for i, p in enumerate(own):
            start = 8 * (p.start - (extra if i == 0 else 0))
            spans.append((int(first[p.item]) + start, int(first[p.item]) + min(8 * p.stop, frames[p.item])))
        low, high = (spans[0][0], spans[-1][1]) if spans else (0, 0)
        needed = batch.values[low:high].to(local(self.subsample.conv).dtype)
        return self.subsample(needed, [b - a for a, b in spans])[extra:]

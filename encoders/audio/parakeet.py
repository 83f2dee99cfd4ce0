"""Parakeet's encoder, a FastConformer (arXiv 2305.05084) as published: relative positions, batch norm.

The batch norm uses the running statistics of its folder, whether its weights are trained or not, and never
moves them. Statistics of a batch would depend on which rank has which clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.audio.relative import RelativeAttention
from encoders.audio.sound import Sound, clips_of, left_out, parakeet_frames, read_clip, samples_of
from encoders.context import ItemConvolution
from encoders.contract import Features, ItemBatch, Meta, check_positive
from encoders.fastconformer import Subsample, subsample_flops, subsampled
from encoders.layers import LayerNorm, enter, leave, run_layer
from encoders.registry import register
from encoders.share import Share
from encoders.stacked import StackedEncoder
from encoders.vision.block import MLP
from encoders.vision.config import VisionConfig
from parallel.sharding.dtypes import FactoryKwargs, accumulation_dtype
from parallel.sharding.low_rank import adapted
from parallel.sharding.param import ParamSpec, constant, declare, declare_buffer, local, normal
from parallel.tensor_parallel.joined import joined_linear
from parallel.tensor_parallel.layers import Linear
from parallel.topology.axis import Axes
from parallel.topology.layout import check_divides

SOUND = Sound(mels=80, size=512, emphasis=0.97)
EPS = 1e-5  # of all norms


@dataclass(frozen=True)
class ParakeetConfig:
    """Sizes and switches of Parakeet's encoder.

    width: of hidden states and features. heads: of attention. layers: blocks. ffn: hidden width of the
        feed-forward modules.
    kernel: rows that a row's convolution sees, odd. channels: of the convolutions that subsample.
    bias: of the linear maps of attention and feed-forward modules. conv_bias: of the convolution modules.
    scaled: whether the first rows are multiplied by the root of the width.
    sound: what frames are made of.
    """

    width: int = 1024
    heads: int = 8
    layers: int = 24
    ffn: int = 4096
    kernel: int = 9
    channels: int = 256
    bias: bool = True
    conv_bias: bool = True
    scaled: bool = True
    sound: Sound = field(default_factory=lambda: SOUND)

    @property
    def core(self) -> VisionConfig:
        """The switches of the feed-forward modules."""
        biases = ("mlp",) if self.bias else ()
        return VisionConfig(
            width=self.width,
            heads=self.heads,
            layers=self.layers,
            mlp=self.ffn,
            activation="silu",
            biases=biases,
        )


@dataclass(frozen=True)
class BlockContext:
    """What all blocks use of a batch: which rows this rank has, and how these see others of their clips."""

    share: Share
    attention: RelativeAttention
    convolution: ItemConvolution


class Attention(nn.Module):
    """Attention with relative positions; heads are sharded over tp. A key is scored by its content and by its
    distance, each with a learned vector added to the query."""

    adapts = ("q", "k", "v", "distance")

    def __init__(self, cfg: ParakeetConfig, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        d, self.axes, self.head_dim, self.bias = cfg.width, axes, cfg.width // cfg.heads, cfg.bias
        for name in ("q", "k", "v", "distance"):
            declare(self, name, (d, d), ParamSpec(normal(d**-0.5), shard_dim=0), **factory)
            if cfg.bias and name != "distance":
                declare(self, f"bias_{name}", (d,), ParamSpec(constant(0.0), shard_dim=0), **factory)
        for name in ("to_content", "to_distance"):
            spec = ParamSpec(normal(0.02), shard_dim=0, matrix=False)
            declare(self, name, (cfg.heads, self.head_dim), spec, **factory)
        self.out = Linear(d, d, normal(d**-0.5 / (2 * cfg.layers) ** 0.5), shard="row", **factory)
        if cfg.bias:
            declare(self, "bias_out", (d,), constant(0.0), **factory)

    def forward(self, x: Tensor, ctx: BlockContext) -> Tensor:
        h = enter(x, self.axes, ctx.share)
        weights = [adapted(self, name) for name in ("q", "k", "v")]
        biases = [local(self.bias_q), local(self.bias_k), local(self.bias_v)] if self.bias else None
        q, k, v = torch.unflatten(joined_linear(h, weights, biases), -1, (3, -1, self.head_dim)).unbind(1)
        distances = torch.unflatten(
            F.linear(ctx.attention.waves, adapted(self, "distance")), -1, (-1, self.head_dim)
        )
        content, far = q + local(self.to_content), q + local(self.to_distance)
        y = ctx.attention(content, far, torch.stack([k, v], 1), distances)
        y = leave(self.out(y.flatten(1)), self.axes, ctx.share)
        return y + local(self.bias_out) if self.bias else y


class Convolution(nn.Module):
    """Gated linear unit, depthwise convolution, batch norm by running statistics, SiLU, linear; channels are
    sharded over tp."""

    adapts = ("value", "gate")

    def __init__(self, cfg: ParakeetConfig, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        d, self.axes, self.bias = cfg.width, axes, cfg.conv_bias
        sharded = {"value": d**-0.5, "gate": d**-0.5}
        for name, std in sharded.items():
            declare(self, name, (d, d), ParamSpec(normal(std), shard_dim=0), **factory)
        depth = ParamSpec(normal(cfg.kernel**-0.5), shard_dim=0, matrix=False)
        declare(self, "depth", (d, cfg.kernel), depth, **factory)
        if cfg.conv_bias:
            for name in ("value", "gate", "depth"):
                declare(self, f"bias_{name}", (d,), ParamSpec(constant(0.0), shard_dim=0), **factory)
            declare(self, "bias_out", (d,), constant(0.0), **factory)
        declare(self, "scale", (d,), ParamSpec(constant(1.0), shard_dim=0), **factory)
        declare(self, "shift", (d,), ParamSpec(constant(0.0), shard_dim=0), **factory)
        declare_buffer(self, "mean", (d,), 0.0, **factory)
        declare_buffer(self, "variance", (d,), 1.0, **factory)
        self.out = Linear(d, d, normal(d**-0.5 / (2 * cfg.layers) ** 0.5), shard="row", **factory)

    def forward(self, x: Tensor, ctx: BlockContext) -> Tensor:
        h = enter(x, self.axes, ctx.share)
        biases = [local(self.bias_value), local(self.bias_gate)] if self.bias else None
        value, gate = joined_linear(h, [adapted(self, name) for name in self.adapts], biases).chunk(2, -1)
        h = ctx.convolution(value * torch.sigmoid(gate), local(self.depth))
        h = self._norm(h + local(self.bias_depth) if self.bias else h)
        y = leave(self.out(F.silu(h)), self.axes, ctx.share)
        return y + local(self.bias_out) if self.bias else y

    def _norm(self, x: Tensor) -> Tensor:
        """Batch norm of this tp rank's channels [T, C]."""
        acc, tp, n = accumulation_dtype(x.dtype), self.axes.tp, x.shape[1]
        own = slice(tp.rank * n, (tp.rank + 1) * n)
        mean, variance = (local(b).to(acc)[own] for b in (self.mean, self.variance))
        scale = local(self.scale).to(acc) * torch.rsqrt(variance + EPS)
        return ((x.to(acc) - mean) * scale + local(self.shift).to(acc)).to(x.dtype)


class Block(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, norm."""

    def __init__(self, cfg: ParakeetConfig, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        norms = (
            LayerNorm(cfg.width, eps=EPS, device=factory["device"], dtype=factory["dtype"]) for _ in range(5)
        )
        self.norm_ff1, self.norm_att, self.norm_conv, self.norm_ff2, self.norm_out = norms
        self.ff1, self.ff2 = (MLP(cfg.core, axes, **factory) for _ in range(2))
        self.attention = Attention(cfg, axes, **factory)
        self.convolution = Convolution(cfg, axes, **factory)

    def forward(self, x: Tensor, ctx: BlockContext) -> Tensor:
        x = x + 0.5 * self.ff1(self.norm_ff1(x), ctx.share)
        x = x + self.attention(self.norm_att(x), ctx)
        x = x + self.convolution(self.norm_conv(x), ctx)
        y: Tensor = self.norm_out(x + 0.5 * self.ff2(self.norm_ff2(x), ctx.share))
        return y


@register("parakeet")
class Parakeet(StackedEncoder):
    """Clips (PCM wav of any rate) to ceil(frames / 8) rows, a frame every 10 ms, unpadded.

    Metadata with `frames` are of a clip that is in frames already.
    """

    Config = ParakeetConfig
    cfg: ParakeetConfig

    def add_stem(self, **factory: Unpack[FactoryKwargs]) -> None:
        self.subsample = Subsample(self.cfg.sound.mels, self.cfg.channels, self.cfg.width, True, **factory)

    def make_block(self, layer: int, **factory: Unpack[FactoryKwargs]) -> Block:
        return Block(self.cfg, self.axes, **factory)

    @classmethod
    def frames(cls, cfg: ParakeetConfig, meta: Meta) -> int:
        """Frames of a clip. Raises ValueError for one that is too short for the spread of its bands."""
        if "frames" in meta:
            return meta["frames"]
        n = samples_of(cfg.sound, meta)
        if n < 2 * cfg.sound.hop:
            raise ValueError(
                f"a clip of {n} samples at {cfg.sound.rate} a second has not two frames; needed: at least "
                f"{2 * cfg.sound.hop}"
            )
        return n // cfg.sound.hop

    @classmethod
    def feature_width(cls, cfg: ParakeetConfig) -> int:
        return cfg.width

    @classmethod
    def pieces(cls, cfg: ParakeetConfig, meta: Meta) -> Sequence[Meta]:
        """Clips of a long recording, where cfg.sound.long asks for them."""
        return clips_of(cfg.sound, meta, lambda clip: cls.rows(cfg, clip))

    @classmethod
    def omits(cls, cfg: ParakeetConfig, meta: Meta) -> str:
        return left_out(cfg.sound, meta)

    @classmethod
    def rows(cls, cfg: ParakeetConfig, meta: Meta) -> int:
        return -(-cls.frames(cfg, meta) // 8)

    @classmethod
    def cost(cls, cfg: ParakeetConfig, meta: Meta) -> float:
        n, d = float(cls.rows(cfg, meta)), cfg.width
        block = 2 * n * (4 * d * cfg.ffn + 7 * d * d + d * cfg.kernel) + 8 * n * n * d
        return cfg.layers * block + cls.stem_cost(cfg, meta)

    @classmethod
    def stem_cost(cls, cfg: ParakeetConfig, meta: Meta) -> float:
        return subsample_flops(cls.rows(cfg, meta), cfg.sound.mels, cfg.channels, cfg.width)

    @classmethod
    def input_shape(cls, cfg: ParakeetConfig) -> tuple[int, ...]:
        return (cfg.sound.mels,)

    @classmethod
    def input_count(cls, cfg: ParakeetConfig, meta: Meta) -> int:
        return cls.frames(cfg, meta)

    @classmethod
    def prepare(cls, cfg: ParakeetConfig, payload: bytes, meta: Meta) -> Tensor:
        """Log-mel frames [n, mels]."""
        return parakeet_frames(cfg.sound, read_clip(cfg.sound, payload, meta))

    @classmethod
    def example(cls, cfg: ParakeetConfig, rows: int) -> Meta:
        return {"samples": cfg.sound.hop * 8 * max(1, rows), "rate": cfg.sound.rate}

    @classmethod
    def check(cls, cfg: ParakeetConfig, tp: int) -> None:
        check_positive("parakeet", cfg, ("width", "heads", "layers", "ffn", "kernel", "channels"))
        check_divides("parakeet width", cfg.width, "heads", cfg.heads)
        check_divides("parakeet heads", cfg.heads, "tp", tp)
        check_divides("parakeet ffn", cfg.ffn, "tp", tp)
        check_divides("parakeet mels", cfg.sound.mels, "subsampling", 8)
        if cfg.kernel % 2 == 0:
            raise ValueError(f"parakeet kernel is {cfg.kernel}; needed: odd, nearest: {cfg.kernel + 1}")

    def forward(self, batch: ItemBatch, hidden: Tensor | None = None) -> Features | Tensor:
        cfg, cp = self.cfg, self.axes.cp
        frames = [self.frames(cfg, m) for m in batch.metas]
        rows = tuple(-(-n // 8) for n in frames)
        share = Share.of(rows, self.axes)
        x = hidden
        if x is None:
            x = subsampled(self.subsample, batch, frames, share)
            x = x * cfg.width**0.5 if cfg.scaled else x
        ctx = BlockContext(
            share=share,
            attention=RelativeAttention.of(share, cp, x, self.timeout_s),
            convolution=ItemConvolution.of(share, cp, cfg.kernel, x.device, self.timeout_s),
        )
        for block in self.blocks.values():
            x = run_layer(block, self.recompute, x, ctx)
        return Features(x, rows, share.part[0]) if self.stage.last else x

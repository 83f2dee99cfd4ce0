"""wav2vec 2.0 (arXiv 2006.11477) and HuBERT (arXiv 2106.07447): convolutions over samples, a transformer."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.audio.clips import ClipEncoder
from encoders.audio.sound import Sound, read_clip, samples_of, unit_variance
from encoders.contract import Meta, check_positive
from encoders.layers import LayerNorm
from encoders.registry import register
from encoders.vision.block import MLP, Around, Attention, Block
from encoders.vision.config import VisionConfig
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.param import constant, declare, local, normal
from parallel.tensor_parallel.layers import Linear
from parallel.topology.axis import Axes
from parallel.topology.layout import check_divides


@dataclass(frozen=True)
class Wav2Vec2Config:
    """Sizes and switches of wav2vec 2.0 and HuBERT.

    width: of hidden states and features. heads, layers: of the transformer. mlp: hidden width of its MLPs.
    activation: of the MLPs. eps: of the norms.
    channels, kernels, strides: of the convolutions over samples, one number for each.
    conv_bias: whether these have biases.
    conv_norm: group: a norm over time after the first of them; layer: over channels after each.
    input_norm: whether a norm comes before the linear map to the width.
    reach: rows that a row's position depends on; groups: of that convolution.
    norm_first: whether norms come before attention and MLP, not after (stable layer norm).
    sound: rate, length and scale of samples.
    model_type: the class of transformers that a folder is written for; the two compute the same.
    """

    width: int = 768
    heads: int = 12
    layers: int = 12
    mlp: int = 3072
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu2"] = "gelu"
    eps: float = 1e-5
    channels: tuple[int, ...] = (512,) * 7
    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    conv_norm: Literal["group", "layer"] = "group"
    input_norm: bool = True
    reach: int = 128
    groups: int = 16
    norm_first: bool = False
    sound: Sound = field(default_factory=lambda: Sound(unit=True))
    model_type: Literal["wav2vec2", "hubert"] = "wav2vec2"

    @property
    def core(self) -> VisionConfig:
        """The transformer's switches."""
        return VisionConfig(
            width=self.width,
            heads=self.heads,
            layers=self.layers,
            mlp=self.mlp,
            activation=self.activation,
            eps=self.eps,
            biases=("q", "k", "v", "out", "mlp"),
        )

    def rows(self, samples: int) -> int:
        """Rows of a clip of so many samples."""
        n = samples
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            n = max(0, (n - kernel) // stride + 1)
        return n

    def span(self, start: int, stop: int, layer: int = 0) -> tuple[int, int]:
        """Which inputs [first, last) of convolution number `layer` the rows [start, stop) see."""
        later = zip(self.kernels[layer:], self.strides[layer:], strict=True)
        for kernel, stride in reversed(list(later)):
            start, stop = start * stride, (stop - 1) * stride + kernel
        return start, stop


class PostNormBlock(nn.Module):
    """Attention and MLP, each norm(x + f(x)); heads and hidden width are sharded over tp."""

    def __init__(self, cfg: VisionConfig, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            LayerNorm(cfg.width, eps=cfg.eps, device=factory["device"], dtype=factory["dtype"])
            for _ in range(2)
        )
        self.attention = Attention(cfg, axes, **factory)
        self.mlp = MLP(cfg, axes, **factory)

    def forward(self, x: Tensor, around: Around) -> Tensor:
        x = self.norm1(x + self.attention(x, around, False))
        y: Tensor = self.norm2(x + self.mlp(x, around.share))
        return y


@register("wav2vec2")
class Wav2Vec2(ClipEncoder):
    """Clips (PCM wav of any rate) to a row for every 320 samples or so, unpadded."""

    Config = Wav2Vec2Config
    cfg: Wav2Vec2Config

    def add_stem(self, **factory: Unpack[FactoryKwargs]) -> None:
        cfg, d = self.cfg, self.cfg.width
        for i, (before, after) in enumerate(pairwise((1, *cfg.channels))):
            kernel = cfg.kernels[i]
            declare(
                self, f"conv{i}", (after, before, kernel), normal((2 / (before * kernel)) ** 0.5), **factory
            )
            if cfg.conv_bias:
                declare(self, f"conv{i}_bias", (after,), constant(0.0), **factory)
            if cfg.conv_norm == "layer" or i == 0:
                declare(self, f"conv{i}_norm", (after,), constant(1.0), **factory)
                declare(self, f"conv{i}_shift", (after,), constant(0.0), **factory)
        last = cfg.channels[-1]
        if cfg.input_norm:
            self.input_norm = LayerNorm(last, eps=cfg.eps, device=factory["device"], dtype=factory["dtype"])
        self.input = Linear(last, d, normal(last**-0.5), bias=True, **factory)
        std = 2 * (cfg.reach * d) ** -0.5
        # A weight of one length for each tap, times directions: as published, so that training goes alike.
        declare(
            self, "near_length", (1, 1, cfg.reach), constant(std * (d * d // cfg.groups) ** 0.5), **factory
        )
        declare(self, "near", (d, d // cfg.groups, cfg.reach), normal(std), **factory)
        declare(self, "near_bias", (d,), constant(0.0), **factory)
        if not cfg.norm_first:
            self.first_norm = LayerNorm(d, eps=cfg.eps, device=factory["device"], dtype=factory["dtype"])

    def make_block(self, layer: int, **factory: Unpack[FactoryKwargs]) -> nn.Module:
        if self.cfg.norm_first:
            return Block(self.cfg.core, self.axes, False, **factory)
        return PostNormBlock(self.cfg.core, self.axes, **factory)

    def add_norm(self, **factory: Unpack[FactoryKwargs]) -> None:
        if self.cfg.norm_first:
            self.norm = LayerNorm(
                self.cfg.width, eps=self.cfg.eps, device=factory["device"], dtype=factory["dtype"]
            )

    @property
    def fewest(self) -> int:
        return self.cfg.span(0, 1)[1]

    def _near(self, rows: int, start: int, stop: int) -> tuple[int, int]:
        """The rows [first, last) of a clip that positions of its rows [start, stop) depend on."""
        before = self.cfg.reach // 2
        return max(0, start - before), min(rows, stop + self.cfg.reach - 1 - before)

    def stretch(self, inputs: int, start: int, stop: int) -> tuple[int, int]:
        if self.cfg.conv_norm == "group":
            return 0, inputs  # the norm is over the whole clip
        return self.cfg.span(*self._near(self.cfg.rows(inputs), start, stop))

    def embed(self, x: Tensor, inputs: int, start: int, stop: int) -> Tensor:
        cfg = self.cfg
        rows = cfg.rows(inputs)
        first, last = self._near(rows, start, stop)
        y = x.to(local(self.conv0).dtype).unsqueeze(1)  # [n, 1, samples]
        for i, stride in enumerate(cfg.strides):
            y = self._convolve(y, i, stride)
            if i == 0 and cfg.conv_norm == "group":  # from here on, what the rows see is enough
                y = y[..., slice(*cfg.span(first, last, 1))]
        y = y.transpose(1, 2)  # [n, last - first, channels]
        y = self.input(self.input_norm(y) if cfg.input_norm else y)
        before = cfg.reach // 2
        wide = F.pad(y.transpose(1, 2), (before - (start - first), cfg.reach - 1 - before - (last - stop)))
        near = local(self.near)
        weight = near * (local(self.near_length) / torch.linalg.vector_norm(near, dim=(0, 1), keepdim=True))
        position = F.gelu(F.conv1d(wide, weight, local(self.near_bias), groups=cfg.groups))
        y = y[:, start - first : stop - first] + position.transpose(1, 2)
        z: Tensor = y if cfg.norm_first else self.first_norm(y)
        return z

    def _convolve(self, y: Tensor, i: int, stride: int) -> Tensor:
        """Convolution number i over samples, its norm if it has one, GELU: [n, channels, time]."""
        cfg = self.cfg
        bias = local(getattr(self, f"conv{i}_bias")) if cfg.conv_bias else None
        y = F.conv1d(y, local(getattr(self, f"conv{i}")), bias, stride)
        if cfg.conv_norm == "layer" or i == 0:
            scale, shift = local(getattr(self, f"conv{i}_norm")), local(getattr(self, f"conv{i}_shift"))
            if cfg.conv_norm == "layer":
                y = F.layer_norm(y.transpose(1, 2), scale.shape, scale, shift, 1e-5).transpose(1, 2)
            else:
                y = F.group_norm(y, y.shape[1], scale, shift, 1e-5)
        return F.gelu(y)

    def finish(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x) if self.cfg.norm_first else x
        return y

    @classmethod
    def feature_width(cls, cfg: Wav2Vec2Config) -> int:
        return cfg.width

    @classmethod
    def rows(cls, cfg: Wav2Vec2Config, meta: Meta) -> int:
        n = samples_of(cfg.sound, meta)
        if not cfg.rows(n):
            raise ValueError(
                f"a clip of {n} samples at {cfg.sound.rate} a second gives no row; needed: at least "
                f"{cfg.span(0, 1)[1]}"
            )
        return cfg.rows(n)

    @classmethod
    def cost(cls, cfg: Wav2Vec2Config, meta: Meta) -> float:
        n, d = float(cls.rows(cfg, meta)), cfg.width
        return cfg.layers * (4 * n * d * (2 * d + cfg.mlp) + 4 * n * n * d) + cls.stem_cost(cfg, meta)

    @classmethod
    def stem_cost(cls, cfg: Wav2Vec2Config, meta: Meta) -> float:
        n, total = samples_of(cfg.sound, meta), 0.0
        for i, (before, after) in enumerate(pairwise((1, *cfg.channels))):
            n = max(0, (n - cfg.kernels[i]) // cfg.strides[i] + 1)
            total += 2.0 * n * before * after * cfg.kernels[i]
        return total + 2.0 * n * cfg.width * (cfg.channels[-1] + cfg.width // cfg.groups * cfg.reach)

    @classmethod
    def input_shape(cls, cfg: Wav2Vec2Config) -> tuple[int, ...]:
        return ()

    @classmethod
    def input_count(cls, cfg: Wav2Vec2Config, meta: Meta) -> int:
        return samples_of(cfg.sound, meta)

    @classmethod
    def prepare(cls, cfg: Wav2Vec2Config, payload: bytes, meta: Meta) -> Tensor:
        """Samples [n]."""
        samples = read_clip(cfg.sound, payload, meta)
        return unit_variance(samples) if cfg.sound.unit else samples

    @classmethod
    def example(cls, cfg: Wav2Vec2Config, rows: int) -> Meta:
        return {"samples": cfg.span(0, max(1, rows))[1], "rate": cfg.sound.rate}

    @classmethod
    def check(cls, cfg: Wav2Vec2Config, tp: int) -> None:
        check_positive("wav2vec2", cfg, ("width", "heads", "layers", "mlp", "reach", "groups"))
        check_divides("wav2vec2 width", cfg.width, "heads", cfg.heads)
        check_divides("wav2vec2 width", cfg.width, "groups", cfg.groups)
        check_divides("wav2vec2 heads", cfg.heads, "tp", tp)
        check_divides("wav2vec2 mlp", cfg.mlp, "tp", tp)
        if not len(cfg.channels) == len(cfg.kernels) == len(cfg.strides) > 0:
            raise ValueError(
                f"wav2vec2 has {len(cfg.channels)} channels, {len(cfg.kernels)} kernels and "
                f"{len(cfg.strides)} strides; needed: one of each for each convolution"
            )

"""Whisper's encoder (arXiv 2212.04356): two convolutions over log-mel frames, positions, a transformer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from encoders.audio.clips import ClipEncoder
from encoders.audio.sound import Sound, read_clip, samples_of, whisper_frames
from encoders.contract import Meta, check_positive
from encoders.layers import LayerNorm
from encoders.registry import register
from encoders.vision.block import Block
from encoders.vision.config import VisionConfig
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.param import ParamSpec, constant, declare, local, normal
from parallel.topology.layout import check_divides


@dataclass(frozen=True)
class WhisperConfig:
    """Sizes of Whisper's encoder.

    width: of hidden states and features. heads, layers: of the transformer. mlp: hidden width of its MLPs.
    positions: rows of a clip, whatever its length; a row every two frames.
    activation: of the MLPs.
    sound: what frames are made of; its seconds give two frames a position.
    """

    width: int = 384
    heads: int = 6
    layers: int = 4
    mlp: int = 1536
    positions: int = 1500
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu2"] = "gelu"
    sound: Sound = field(default_factory=Sound)

    @property
    def core(self) -> VisionConfig:
        """The transformer's switches: keys have no bias."""
        return VisionConfig(
            width=self.width,
            heads=self.heads,
            layers=self.layers,
            mlp=self.mlp,
            activation=self.activation,
            eps=1e-5,
            biases=("q", "v", "out", "mlp"),
        )


@register("whisper")
class Whisper(ClipEncoder):
    """Clips (PCM wav of any rate) to cfg.positions rows each: silence fills those that are shorter."""

    Config = WhisperConfig
    cfg: WhisperConfig

    def add_stem(self, **factory: Unpack[FactoryKwargs]) -> None:
        d, mels = self.cfg.width, self.cfg.sound.mels
        declare(self, "conv1", (d, mels, 3), normal((3 * mels) ** -0.5), **factory)
        declare(self, "conv1_bias", (d,), constant(0.0), **factory)
        declare(self, "conv2", (d, d, 3), normal((3 * d) ** -0.5), **factory)
        declare(self, "conv2_bias", (d,), constant(0.0), **factory)
        declare(self, "position", (self.cfg.positions, d), ParamSpec(normal(0.02), trained=False), **factory)

    def make_block(self, layer: int, **factory: Unpack[FactoryKwargs]) -> nn.Module:
        return Block(self.cfg.core, self.axes, False, **factory)

    def add_norm(self, **factory: Unpack[FactoryKwargs]) -> None:
        self.norm = LayerNorm(self.cfg.width, eps=1e-5, device=factory["device"], dtype=factory["dtype"])

    @property
    def fewest(self) -> int:
        return 2 * self.cfg.positions

    def stretch(self, inputs: int, start: int, stop: int) -> tuple[int, int]:
        """Row r sees frames 2 r - 2 to 2 r + 2."""
        return max(0, 2 * start - 2), min(inputs, 2 * stop + 1)

    def embed(self, x: Tensor, inputs: int, start: int, stop: int) -> Tensor:
        first, last = self.stretch(inputs, start, stop)
        weight = local(self.conv1)
        y = F.gelu(F.conv1d(x.to(weight.dtype).transpose(1, 2), weight, local(self.conv1_bias), padding=1))
        # Only true ends of a clip are next to zeros: frames at cut ends were for their neighbours.
        a, b = max(0, 2 * start - 1), min(inputs, 2 * stop)
        y = F.pad(y[..., a - first : b - first], (1 if start == 0 else 0, 0))
        y = F.gelu(F.conv1d(y, local(self.conv2), local(self.conv2_bias), stride=2)).transpose(1, 2)
        assert y.shape[1] == stop - start and last >= b, (inputs, start, stop)
        return y + local(self.position)[start:stop]

    def finish(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y

    @classmethod
    def feature_width(cls, cfg: WhisperConfig) -> int:
        return cfg.width

    @classmethod
    def rows(cls, cfg: WhisperConfig, meta: Meta) -> int:
        if "frames" not in meta:
            samples_of(cfg.sound, meta)  # which refuses a clip without any
        return cfg.positions

    @classmethod
    def filled(cls, cfg: WhisperConfig, meta: Meta) -> int:
        """Positions that are computed of a clip."""
        return cfg.positions

    @classmethod
    def cost(cls, cfg: WhisperConfig, meta: Meta) -> float:
        n, d = float(cls.filled(cfg, meta)), cfg.width
        return cfg.layers * (4 * n * d * (2 * d + cfg.mlp) + 4 * n * n * d) + cls.stem_cost(cfg, meta)

    @classmethod
    def stem_cost(cls, cfg: WhisperConfig, meta: Meta) -> float:
        return 2.0 * cls.filled(cfg, meta) * 3 * cfg.width * (2 * cfg.sound.mels + cfg.width)

    @classmethod
    def input_shape(cls, cfg: WhisperConfig) -> tuple[int, ...]:
        return (cfg.sound.mels,)

    @classmethod
    def input_count(cls, cfg: WhisperConfig, meta: Meta) -> int:
        return 2 * cfg.positions

    @classmethod
    def prepare(cls, cfg: WhisperConfig, payload: bytes, meta: Meta) -> Tensor:
        """Log-mel frames [2 * positions, mels]."""
        return whisper_frames(cfg.sound, read_clip(cfg.sound, payload, meta))

    @classmethod
    def example(cls, cfg: WhisperConfig, rows: int) -> Meta:
        return {"samples": int(cfg.sound.seconds * cfg.sound.rate), "rate": cfg.sound.rate}

    @classmethod
    def check(cls, cfg: WhisperConfig, tp: int) -> None:
        check_positive("whisper", cfg, ("width", "heads", "layers", "mlp", "positions"))
        check_divides("whisper width", cfg.width, "heads", cfg.heads)
        check_divides("whisper heads", cfg.heads, "tp", tp)
        check_divides("whisper mlp", cfg.mlp, "tp", tp)
        frames = int(cfg.sound.seconds * cfg.sound.rate) // cfg.sound.hop
        if frames != 2 * cfg.positions:
            raise ValueError(
                f"whisper positions is {cfg.positions}, and {cfg.sound.seconds:g} s of sound are {frames} "
                f"frames; needed: two frames a position, {2 * cfg.positions}"
            )

"""Audio Flamingo 3's sound tower (arXiv 2507.08128): Whisper's over what is sound, means of pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from encoders.audio.sound import Sound, samples_of
from encoders.audio.whisper import Whisper, WhisperConfig
from encoders.contract import Encoder, Features, ItemBatch, Meta
from encoders.registry import register
from parallel.sequence.host import to_device
from parallel.topology.axis import Axes


@dataclass(frozen=True)
class FlamingoConfig(WhisperConfig):
    """Sizes of the tower; positions: of 30 s, of which a clip takes one every two of its frames."""

    width: int = 1280
    heads: int = 20
    layers: int = 32
    mlp: int = 5120
    sound: Sound = field(default_factory=lambda: Sound(mels=128))


class States(Whisper):
    """Whisper's hidden states of the positions that hold sound, before its last norm."""

    Config = FlamingoConfig

    def finish(self, x: Tensor) -> Tensor:
        return x

    @classmethod
    def rows(cls, cfg: WhisperConfig, meta: Meta) -> int:
        frames = meta["frames"] if "frames" in meta else -(-samples_of(cfg.sound, meta) // cfg.sound.hop)
        return (frames - 1) // 2 + 1


@register("audioflamingo3")
class Flamingo(Encoder):
    """Clips (PCM wav of any rate) to a row every 40 ms of sound, up to 30 s; silence fills no rows.

    A clip with an odd number of states leaves the last of them out, which the others have seen. Every tp rank
    runs the whole tower.
    """

    Config = FlamingoConfig

    def __init__(
        self,
        cfg: FlamingoConfig,
        axes: Axes,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(cfg, axes, device=device, dtype=dtype)
        self.cfg = cfg
        self.states = States(cfg, Axes(), device=device, dtype=dtype)

    @property
    def layers(self) -> list[torch.nn.Module]:
        return list(self.states.layers)

    def forward(self, batch: ItemBatch) -> Features:
        self.states.recompute, self.states.timeout_s = self.recompute, self.timeout_s
        found = self.states(batch)
        lengths = found.rows
        rows = tuple(n // 2 for n in lengths)
        firsts = (0, *accumulate(lengths))
        if any(n % 2 for n in lengths):
            kept = torch.cat([torch.arange(f, f + 2 * n) for f, n in zip(firsts, rows, strict=False)])
            x = found.values.index_select(0, to_device(kept, found.values.device))
        else:
            x = found.values
        return Features(self.states.norm(x.view(-1, 2, x.shape[-1]).mean(1)), rows)

    @classmethod
    def feature_width(cls, cfg: FlamingoConfig) -> int:
        return cfg.width

    @classmethod
    def rows(cls, cfg: FlamingoConfig, meta: Meta) -> int:
        n = States.rows(cfg, meta) // 2
        if n < 1:
            least = 2 * cfg.sound.hop + 1
            raise ValueError(
                f"a clip of {meta.get('samples')} samples has no row; needed: {least} at {cfg.sound.rate} Hz"
            )
        return n

    @classmethod
    def cost(cls, cfg: FlamingoConfig, meta: Meta) -> float:
        n, d = float(States.rows(cfg, meta)), cfg.width
        return cfg.layers * (4 * n * d * (2 * d + cfg.mlp) + 4 * n * n * d) + cls.stem_cost(cfg, meta)

    @classmethod
    def stem_cost(cls, cfg: FlamingoConfig, meta: Meta) -> float:
        return 2.0 * States.rows(cfg, meta) * 3 * cfg.width * (2 * cfg.sound.mels + cfg.width)

    @classmethod
    def input_shape(cls, cfg: FlamingoConfig) -> tuple[int, ...]:
        return States.input_shape(cfg)

    @classmethod
    def input_count(cls, cfg: FlamingoConfig, meta: Meta) -> int:
        return States.input_count(cfg, meta)

    @classmethod
    def prepare(cls, cfg: FlamingoConfig, payload: bytes, meta: Meta) -> Tensor:
        return States.prepare(cfg, payload, meta)

    @classmethod
    def example(cls, cfg: FlamingoConfig, rows: int) -> Meta:
        samples = min(4 * rows * cfg.sound.hop, int(cfg.sound.seconds * cfg.sound.rate))
        return {"samples": samples, "rate": cfg.sound.rate}

    @classmethod
    def check(cls, cfg: FlamingoConfig, tp: int) -> None:
        States.check(cfg, 1)

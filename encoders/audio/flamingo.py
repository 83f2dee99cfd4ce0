"""Audio Flamingo 3's sound tower (arXiv 2507.08128): Whisper's over what is sound, means of pairs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from encoders.audio.sound import Sound, samples_of
from encoders.audio.whisper import Whisper, WhisperConfig
from encoders.contract import Meta
from encoders.registry import register


@dataclass(frozen=True)
class FlamingoConfig(WhisperConfig):
    """Sizes of the tower; positions: of 30 s, of which a clip takes one every two of its frames."""

    width: int = 1280
    heads: int = 20
    layers: int = 32
    mlp: int = 5120
    sound: Sound = field(default_factory=lambda: Sound(mels=128))


@register("audioflamingo3")
class Flamingo(Whisper):
    """Clips (PCM wav of any rate) to a row every 40 ms of sound, up to 30 s; silence fills no rows.

    A row is the mean of a pair of Whisper's states. A clip with an odd number of states leaves the last of
    them out, which the others have seen: it is a token after those of its rows.
    """

    Config = FlamingoConfig

    def finish(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.mean(1))
        return y

    @classmethod
    def filled(cls, cfg: WhisperConfig, meta: Meta) -> int:
        frames = meta["frames"] if "frames" in meta else -(-samples_of(cfg.sound, meta) // cfg.sound.hop)
        return (frames - 1) // 2 + 1

    @classmethod
    def tokens_per_row(cls, cfg: WhisperConfig) -> int:
        return 2

    @classmethod
    def tail_tokens(cls, cfg: WhisperConfig, meta: Meta) -> int:
        return cls.filled(cfg, meta) % 2

    @classmethod
    def rows(cls, cfg: WhisperConfig, meta: Meta) -> int:
        n = cls.filled(cfg, meta) // 2
        if n < 1:
            least = 2 * cfg.sound.hop + 1
            raise ValueError(
                f"a clip of {meta.get('samples')} samples has no row; needed: {least} at {cfg.sound.rate} Hz"
            )
        return n

    @classmethod
    def example(cls, cfg: WhisperConfig, rows: int) -> Meta:
        samples = min(4 * rows * cfg.sound.hop, int(cfg.sound.seconds * cfg.sound.rate))
        return {"samples": samples, "rate": cfg.sound.rate}

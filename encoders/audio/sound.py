"""What the families make of sound before their first layer: samples of one rate, log-mel frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders import compat
from encoders.contract import Meta
from encoders.media.decode import read_sound


@dataclass(frozen=True)
class Sound:
    """Settings of a family's feature extractor.

    rate: samples a second; clips of other rates are resampled.
    seconds: longer clips end there, or go on as clips of their own.
    long: cut: what comes after `seconds` is left out. clips: it is heard too, in clips of `seconds`, the last
        one as long as what is left.
    mels: bands of a frame. size: samples of a Fourier transform; window: of its window; hop: between frames.
    emphasis: share of the sample before that is subtracted from each.
    unit: whether the samples of a clip are brought to zero mean and unit variance.
    """

    rate: int = 16000
    seconds: float = 30.0
    long: Literal["cut", "clips"] = "cut"
    mels: int = 80
    size: int = 400
    window: int = 400
    hop: int = 160
    emphasis: float = 0.0
    unit: bool = False


def samples_of(sound: Sound, meta: Meta) -> int:
    """Samples of a clip once it is resampled and cut. Raises ValueError for a clip without any."""
    most = int(sound.seconds * sound.rate)
    return min(_resampled(sound, meta) - meta.get("clip", 0) * most, most)


def _resampled(sound: Sound, meta: Meta) -> int:
    """Samples of a whole recording at sound.rate. Raises ValueError where there are none."""
    if meta["samples"] < 1:
        raise ValueError("a clip of zero samples, which has nothing to hear; needed: at least one sample")
    return -(-meta["samples"] * sound.rate // meta["rate"])


def clips_of(sound: Sound, meta: Meta, rows: Callable[[Meta], int]) -> Sequence[Meta]:
    """The clips that a recording is heard in; the last is left out where `rows` refuses it as too short."""
    most = int(sound.seconds * sound.rate)
    if sound.long == "cut" or "clip" in meta or "samples" not in meta or _resampled(sound, meta) <= most:
        return (meta,)
    clips: list[Meta] = [{**meta, "clip": k} for k in range(-(-_resampled(sound, meta) // most))]
    try:
        rows(clips[-1])
    except ValueError:
        return clips[:-1]
    return clips


def left_out(sound: Sound, meta: Meta) -> str:
    """What of a recording is not heard, in words; "" where all is."""
    longer = "samples" in meta and _resampled(sound, meta) > int(sound.seconds * sound.rate)
    if sound.long == "clips" or not longer:
        return ""
    return f"sound after {sound.seconds:g} s is left out; options {{sound: {{long: clips}}}} keep it"


def read_clip(sound: Sound, payload: bytes, meta: Meta) -> Tensor:
    """A recording as float32 samples [samples_of()]. Raises ValueError where its index says otherwise."""
    samples, rate = read_sound(payload)
    if rate != meta["rate"] or len(samples) != meta["samples"]:
        raise ValueError(f"clip has {len(samples)} samples at {rate}, its index says otherwise")
    first = meta.get("clip", 0) * int(sound.seconds * sound.rate)
    return compat.resample(samples, rate, sound.rate)[first : first + samples_of(sound, meta)]


def unit_variance(samples: Tensor) -> Tensor:
    """Samples [n] with mean 0 and variance 1; those that are all alike become 0."""
    return (samples - samples.mean()) / torch.sqrt(samples.var(correction=0) + 1e-7)


def whisper_frames(sound: Sound, samples: Tensor) -> Tensor:
    """Frames [seconds * rate / hop, mels] of a clip, silence added to its end; about -1 to 1.

    Log10 of mel bands of the power spectrum, at most 8 below the clip's largest (arXiv 2212.04356).
    """
    n = int(sound.seconds * sound.rate)
    power = _power(sound, F.pad(samples, (0, n - len(samples))), periodic=True, pad="reflect")[:-1]
    bands = (
        (power @ mel_filters(sound.size // 2 + 1, sound.mels, sound.rate, 8000.0)).clamp(min=1e-10).log10()
    )
    return (torch.maximum(bands, bands.max() - 8.0) + 4.0) / 4.0


def parakeet_frames(sound: Sound, samples: Tensor) -> Tensor:
    """Frames [n // hop, mels] of a clip of n samples, each band with mean 0 and variance 1 over the clip."""
    shifted = F.pad(samples, (1, 0))[:-1]
    power = _power(sound, samples - sound.emphasis * shifted, periodic=False, pad="constant")
    filters = mel_filters(sound.size // 2 + 1, sound.mels, sound.rate, sound.rate / 2)
    bands = (power @ filters + 2.0**-24).log()[: len(samples) // sound.hop]
    return (bands - bands.mean(0)) / (bands.std(0) + 1e-5)


def _power(sound: Sound, samples: Tensor, *, periodic: bool, pad: str) -> Tensor:
    """Power spectrum [n // hop + 1, size // 2 + 1] of centred frames."""
    window = torch.hann_window(sound.window, periodic=periodic, dtype=samples.dtype)
    spectrum = torch.stft(
        samples,
        sound.size,
        sound.hop,
        sound.window,
        window,
        center=True,
        pad_mode=pad,
        return_complex=True,
    )
    return spectrum.abs().square().T


@cache
def mel_filters(bins: int, mels: int, rate: int, top: float) -> Tensor:
    """Triangular filters [bins, mels], float32, from 0 to `top` Hz: on Slaney's mel scale, each of unit area
    (Auditory Toolbox, 1998)."""
    edges = _hertz(torch.linspace(0.0, _mel(top), mels + 2, dtype=torch.float64))
    frequency = torch.linspace(0.0, rate // 2, bins, dtype=torch.float64)
    slope = edges - frequency[:, None]  # [bins, mels + 2]
    width = edges[1:] - edges[:-1]
    rising, falling = -slope[:, :-2] / width[:-1], slope[:, 2:] / width[1:]
    return (torch.minimum(rising, falling).clamp(min=0.0) * 2.0 / (edges[2:] - edges[:-2])).float()


BREAK, STEP = 1000.0, math.log(6.4) / 27.0  # of Slaney's scale


def _mel(hertz: float) -> float:
    """Slaney's mel: linear below 1,000 Hz, logarithmic above."""
    if hertz < BREAK:
        return hertz * 3.0 / 200.0
    return 15.0 + math.log(hertz / BREAK) / STEP


def _hertz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15.0, mel * 200.0 / 3.0, BREAK * torch.exp(STEP * (mel - 15.0)))

"""Sounds: how many samples, and the samples, as mono float32."""

from __future__ import annotations

import io
import wave
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoders.media.errors import readable
from encoders.media.limits import BOUNDS

UNKNOWN = 0x7FFF_0000  # bytes: a WAV that was written as a stream states this length or more


def probe_wav(payload: bytes) -> dict[str, int]:
    """samples (of each channel) and rate of a WAV."""
    with readable("the WAV"), wave.open(io.BytesIO(payload)) as f:
        n = _present(f, len(payload))
        out = {"samples": n, "rate": f.getframerate()}
    BOUNDS.check(out)
    return out


def _present(f: wave.Wave_read, size: int) -> int:
    """Samples of each channel that are there. Raises ValueError where the header promises more."""
    frame = f.getsampwidth() * f.getnchannels()
    there = len(f.readframes(min(f.getnframes(), size // frame + 1))) // frame
    f.rewind()
    if there < f.getnframes() and f.getnframes() * frame < UNKNOWN - frame:
        raise ValueError(f"a WAV of {there} samples, its header says {f.getnframes()}")
    return there


def read_wav(payload: bytes) -> tuple[Tensor, int]:
    """PCM wav (8 bit unsigned; 16, 24 or 32 bit signed) to mono float32 samples [n] in [-1, 1], and samples a
    second."""
    with readable("the WAV"), wave.open(io.BytesIO(payload)) as f:
        width, channels, rate = f.getsampwidth(), f.getnchannels(), f.getframerate()
        raw = f.readframes(_present(f, len(payload)))
    return mono(pcm(raw, width).reshape(-1, channels)), rate


def pcm(raw: bytes, width: int) -> np.ndarray:
    """Whole numbers of `width` bytes, little-endian, as float32 in [-1, 1)."""
    if width == 1:
        return (np.frombuffer(raw, "u1").astype(np.float32) - 128.0) / 128.0
    if width == 3:
        numbers = np.zeros((len(raw) // 3, 4), dtype=np.uint8)
        numbers[:, 1:] = np.frombuffer(raw, "u1").reshape(-1, 3)
        return numbers.reshape(-1).view("<i4").astype(np.float32) / float(1 << 31)
    kinds: dict[int, np.dtype[Any]] = {2: np.dtype("<i2"), 4: np.dtype("<i4")}
    if width not in kinds:
        raise ValueError(f"wav with {8 * width}-bit samples; needed: 8, 16, 24 or 32 bit PCM")
    return np.frombuffer(raw, kinds[width]).astype(np.float32) / float(1 << (8 * width - 1))


def mono(samples: np.ndarray) -> Tensor:
    """Samples [n, channels] to their mean over the channels, float32 [n]."""
    return torch.from_numpy(samples.mean(axis=1, dtype=np.float32))

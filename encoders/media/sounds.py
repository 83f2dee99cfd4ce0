"""Sounds: how many samples, and the samples, as mono float32.

WAV of PCM is read by Python's own module. FLAC, Ogg and other WAV are read by soundfile, which counts the
samples of short Vorbis files right, where FFmpeg does not cut the last page. MP3 and the sound of containers
are read by PyAV, since soundfile takes a guess at the length of an MP3 without an index for its whole length.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoders.media.errors import package, readable
from encoders.media.kinds import Kind
from encoders.media.limits import BOUNDS

UNKNOWN = 0x7FFF_0000  # bytes: a WAV that was written as a stream states this length or more


BLOCK = 2**20  # samples of each channel that are read at once
Blocks = Iterator[np.ndarray]  # float32 [n, channels] each


def probe_sound(payload: bytes, kind: Kind) -> dict[str, int]:
    """samples (of each channel) and rate, from the header; of MP3 and containers by decoding all, for no
    header of theirs is exact. Raises ValueError for what cannot be read or is beyond BOUNDS."""
    with readable("the sound"):
        out = _stated(payload, kind)
        if out is None:
            blocks, rate = _blocks(payload, kind)
            out = {"samples": sum(map(len, _bounded(blocks))), "rate": rate}
    if out["rate"] < 1:
        raise ValueError(f"a sound of {out['rate']} samples a second")
    BOUNDS.check(out)
    return out


def read_samples(payload: bytes, kind: Kind) -> tuple[Tensor, int]:
    """Mono float32 samples [n], the mean over the channels, and samples a second."""
    with readable("the sound"):
        blocks, rate = _blocks(payload, kind)
        found = [block.mean(axis=1, dtype=np.float32) for block in _bounded(blocks)]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *found])), rate


def _bounded(blocks: Blocks) -> Blocks:
    """The same blocks; raises ValueError once they are more samples than BOUNDS."""
    n = 0
    for block in blocks:
        n += len(block)
        BOUNDS.check({"samples": n})
        yield block


def _stated(payload: bytes, kind: Kind) -> dict[str, int] | None:
    """What an exact header says; None where only decoding tells."""
    if kind == "wav" and _is_pcm(payload):
        with wave.open(io.BytesIO(payload)) as f:
            return {"samples": _present(f, len(payload)), "rate": f.getframerate()}
    if kind not in ("wav", "sound"):
        return None
    with _soundfile(payload) as f:
        return {"samples": f.frames, "rate": f.samplerate} if f.frames < 2**62 else None  # no length given


def _blocks(payload: bytes, kind: Kind) -> tuple[Blocks, int]:
    """A sound in pieces, and its rate."""
    if kind == "wav" and _is_pcm(payload):
        return _wav_blocks(payload)
    if kind in ("wav", "sound"):
        f = _soundfile(payload)
        return _soundfile_blocks(f), f.samplerate
    return _packed_blocks(payload, kind)


def _is_pcm(payload: bytes) -> bool:
    """Whether Python's own module reads a WAV."""
    try:
        with wave.open(io.BytesIO(payload)) as f:
            return int(f.getsampwidth()) <= 4
    except wave.Error as error:
        if "unknown format" in str(error):
            return False
        raise


def _wav_blocks(payload: bytes) -> tuple[Blocks, int]:
    with wave.open(io.BytesIO(payload)) as f:
        width, channels, rate = f.getsampwidth(), f.getnchannels(), f.getframerate()
        raw = f.readframes(_present(f, len(payload)))
    return iter([pcm(raw, width).reshape(-1, channels)]), rate


def _soundfile(payload: bytes) -> Any:
    return package("soundfile", "FLAC, Ogg, and WAV other than PCM").SoundFile(io.BytesIO(payload))


def _soundfile_blocks(f: Any) -> Blocks:
    with f:
        while len(block := f.read(BLOCK, dtype="float32", always_2d=True)):
            yield block


def _packed_blocks(payload: bytes, kind: Kind) -> tuple[Blocks, int]:
    """The sound of an MP3 or a container, by PyAV."""
    container = package("av", "MP3 and the sound of videos").open(io.BytesIO(payload), format=kind)
    if not container.streams.audio:
        raise ValueError("it has no sound")
    stream = container.streams.audio[0]
    stream.codec_context.thread_count = 1  # a process may fork, and has as many threads as it was given
    frames = container.decode(stream)
    first = next(frames, None)
    if first is None:
        return iter(()), int(stream.codec_context.sample_rate)
    shape = (first.sample_rate, first.layout.nb_channels)

    def blocks() -> Blocks:
        with container:
            for frame in chain((first,), frames):
                if (frame.sample_rate, frame.layout.nb_channels) != shape:
                    raise ValueError("its rate or channels change on the way")
                array = frame.to_ndarray()
                array = array.T if frame.format.is_planar else array.reshape(-1, shape[1])
                yield _unit(array)

    return blocks(), int(shape[0])


def _unit(array: np.ndarray) -> np.ndarray:
    """Samples of any type as float32 in [-1, 1]."""
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    return pcm(np.ascontiguousarray(array).tobytes(), array.dtype.itemsize).reshape(array.shape)


def _present(f: wave.Wave_read, size: int) -> int:
    """Samples of each channel that are there. Raises ValueError where the header promises more."""
    frame = f.getsampwidth() * f.getnchannels()
    there = len(f.readframes(min(f.getnframes(), size // frame + 1))) // frame
    f.rewind()
    if there < f.getnframes() and f.getnframes() * frame < UNKNOWN - frame:
        raise ValueError(f"a WAV of {there} samples, its header says {f.getnframes()}")
    return there


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

"""Speech of a corpus as mono PCM wav: recordings decoded by PyAV, or words said by eSpeak NG."""

from __future__ import annotations

import ctypes
import io
import wave
from pathlib import Path

import numpy as np

SPOKEN_RATE = 8000  # samples a second of synthesised words
# eSpeak NG voices: an accent and a variant. No variant of the evaluation is used in training.
TRAIN_VOICES = (
    *("en-us", "en", "en-us+m1", "en+m1", "en-us+m2", "en-us+m3", "en+m3", "en-us+m6"),
    *("en-us+f1", "en+f1", "en-us+f2", "en-us+f3", "en+f5"),
)
EVAL_VOICES = ("en-us+m4", "en-us+m7", "en-us+f4", "en+f4")


def recording(path: Path, rate: int) -> bytes:
    """A recording in any format that FFmpeg reads, as 16-bit wav of `rate` samples a second.

    A file that is such a wav is taken as it is. Raises ValueError where it cannot be decoded or has no sound.
    """
    if path.suffix == ".wav" and _is_done(path, rate):
        return path.read_bytes()
    import av

    try:
        with av.open(str(path)) as file:
            resampler = av.AudioResampler(format="s16", layout="mono", rate=rate)
            frames = [out for frame in [*file.decode(audio=0), None] for out in resampler.resample(frame)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: no recording that can be decoded ({error})") from error
    if not frames:
        raise ValueError(f"{path}: a recording without sound")
    return _wav(np.concatenate([f.to_ndarray().reshape(-1) for f in frames]).astype("<i2"), rate)


def _is_done(path: Path, rate: int) -> bool:
    """Whether a file is a mono 16-bit PCM wav of this rate, with sound."""
    try:
        with wave.open(str(path)) as f:
            return (f.getnchannels(), f.getsampwidth(), f.getframerate()) == (
                1,
                2,
                rate,
            ) and f.getnframes() > 0
    except (wave.Error, EOFError):
        return False


class Speaker:
    """eSpeak NG through ctypes, in the synchronous mode that passes samples to a callback."""

    def __init__(self) -> None:
        import espeakng_loader

        self._lib = ctypes.CDLL(espeakng_loader.get_library_path())
        synchronous = 2
        data = str(espeakng_loader.get_data_path()).encode()
        self._rate = self._lib.espeak_Initialize(synchronous, 0, data, 0)
        self._heard: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._hear)  # kept here: ctypes holds no reference
        self._lib.espeak_SetSynthCallback(self._callback)

    def _hear(self, samples: object, count: int, events: object) -> int:
        if samples and count > 0:
            self._heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, speed: int, pitch: int) -> bytes:
        """A text as 8 kHz, 8-bit wav; raises ValueError where the voice does not exist."""
        if self._lib.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"eSpeak NG has no voice {voice!r}")
        rate_parameter, pitch_parameter = 1, 3
        self._lib.espeak_SetParameter(rate_parameter, speed, 0)
        self._lib.espeak_SetParameter(pitch_parameter, pitch, 0)
        self._heard = []
        spoken = text.encode() + b"\0"
        utf8 = 1
        # A C function: its arguments have positions only.
        self._lib.espeak_Synth(spoken, len(spoken), 0, 0, 0, utf8, None, None)
        samples = _resample(np.concatenate(self._heard).astype(np.float64), self._rate)
        return _wav(np.clip(np.round(samples * 127.0 + 128.0), 0, 255).astype(np.uint8), SPOKEN_RATE)


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Resample to 8 kHz by truncating the spectrum; trim silence from both ends; scale the peak to 0.9."""
    n = round(len(samples) * SPOKEN_RATE / rate)
    spectrum = np.fft.rfft(samples)[: n // 2 + 1]
    out: np.ndarray = np.fft.irfft(spectrum, n)
    loud = np.flatnonzero(np.abs(out) > 0.03 * np.abs(out).max())
    out = out[max(0, loud[0] - 80) : loud[-1] + 80]
    scaled: np.ndarray = 0.9 * out / np.abs(out).max()
    return scaled


def _wav(samples: np.ndarray, rate: int) -> bytes:
    """Mono samples [n], uint8 or int16, as a wav file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(samples.itemsize)
        f.setframerate(rate)
        f.writeframes(samples.tobytes())
    return buffer.getvalue()

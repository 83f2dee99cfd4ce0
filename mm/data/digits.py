"""Make the shipped digits data set: handwritten digits, spoken digits and text about both.

Images are the UCI handwritten digits (through scikit-learn), speech is synthesised with eSpeak NG (through
espeakng-loader): `pip install -e .[data]`. Evaluation images and evaluation voices never occur in training.
"""

from __future__ import annotations

import ctypes
import io
import json
import random
import tarfile
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mm.data.building import kept_indexes

RATE = 8000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# eSpeak NG voices: an accent and a variant. No variant of the evaluation is used in training.
TRAIN_VOICES = (
    *("en-us", "en", "en-us+m1", "en+m1", "en-us+m2", "en-us+m3", "en+m3", "en-us+m6"),
    *("en-us+f1", "en+f1", "en-us+f2", "en-us+f3", "en+f5"),
)
EVAL_VOICES = ("en-us+m4", "en-us+m7", "en-us+f4", "en+f4")

ATTRIBUTION = """# Attribution

- Images: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning
  Repository (1998), licensed CC BY 4.0, as distributed with scikit-learn (1,797 images of 8 x 8 pixels).
  Changed: scaled from 17 to 256 grey levels, about a quarter laid on a larger blank canvas, stored as PNG.
- Speech: the words "zero" to "nine" synthesised with eSpeak NG (a GPL-3 program; only its output is here),
  resampled to 8 kHz, trimmed, stored as 8-bit PCM. Synthetic speech: a model that learns these clips is not
  a speech recogniser, and nothing here claims so.
- Text: made by `python -m mm data prepare digits`.
"""


@dataclass(frozen=True)
class Pool:
    """Digits to draw from."""

    images: dict[int, list[np.ndarray]]  # by label, uint8 [8, 8] from 0 to 255
    clips: dict[int, list[bytes]]  # by label, wav files


def prepare_digits(out: Path, seed: int = 0, train_samples: int = 860, eval_samples: int = 144) -> list[Path]:
    """Write two training shards, one evaluation shard, their indexes and ATTRIBUTION.md to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    train_images, eval_images = _images(rng)
    train = Pool(train_images, _clips(TRAIN_VOICES, (150, 185, 220), (40, 60), rng))
    held_out = Pool(eval_images, _clips(EVAL_VOICES, (160, 200), (50,), rng))
    half = train_samples // 2
    shards = [
        _write(out / "digits-train-000000.tar", _samples(train, half, rng, "a")),
        _write(out / "digits-train-000001.tar", _samples(train, train_samples - half, rng, "b")),
        _write(out / "digits-eval-000000.tar", _samples(held_out, eval_samples, rng, "e")),
    ]
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION)
    kept_indexes([str(shard) for shard in shards])
    return shards


def _images(rng: random.Random) -> tuple[dict[int, list[np.ndarray]], dict[int, list[np.ndarray]]]:
    """Handwritten digits by label: five sixths to train on, a sixth held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = list(range(len(data.target)))
    rng.shuffle(order)
    held_out = len(order) // 6
    pools = []
    for ids in (order[held_out:], order[:held_out]):
        pool: dict[int, list[np.ndarray]] = {d: [] for d in range(10)}
        for i in ids:
            pool[int(data.target[i])].append((data.images[i] * (255.0 / 16.0)).astype(np.uint8))
        pools.append(pool)
    return pools[0], pools[1]


def _clips(
    voices: Sequence[str], speeds: Sequence[int], pitches: Sequence[int], rng: random.Random
) -> dict[int, list[bytes]]:
    """Spoken digits by label: every voice at every speed and pitch."""
    speaker = Speaker()
    out: dict[int, list[bytes]] = {}
    for digit, word in enumerate(WORDS):
        out[digit] = [speaker.say(word, v, s, p) for v in voices for s in speeds for p in pitches]
        rng.shuffle(out[digit])
    return out


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

    def say(self, word: str, voice: str, speed: int, pitch: int) -> bytes:
        """A word as 8 kHz, 8-bit wav; raises ValueError where the voice does not exist."""
        if self._lib.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"eSpeak NG has no voice {voice!r}")
        rate_parameter, pitch_parameter = 1, 3
        self._lib.espeak_SetParameter(rate_parameter, speed, 0)
        self._lib.espeak_SetParameter(pitch_parameter, pitch, 0)
        self._heard = []
        text = word.encode() + b"\0"
        utf8 = 1
        # A C function: its arguments have positions only.
        self._lib.espeak_Synth(text, len(text), 0, 0, 0, utf8, None, None)
        return _wav(_resample(np.concatenate(self._heard).astype(np.float64), self._rate))


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Resample to 8 kHz by truncating the spectrum; trim silence from both ends; scale the peak to 0.9."""
    n = round(len(samples) * RATE / rate)
    spectrum = np.fft.rfft(samples)[: n // 2 + 1]
    out: np.ndarray = np.fft.irfft(spectrum, n)
    loud = np.flatnonzero(np.abs(out) > 0.03 * np.abs(out).max())
    out = out[max(0, loud[0] - 80) : loud[-1] + 80]
    scaled: np.ndarray = 0.9 * out / np.abs(out).max()
    return scaled


def _wav(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(1)
        f.setframerate(RATE)
        f.writeframes(np.clip(np.round(samples * 127.0 + 128.0), 0, 255).astype(np.uint8).tobytes())
    return buffer.getvalue()


def _png(pixels: np.ndarray, rng: random.Random) -> bytes:
    """A digit as PNG, sometimes in the corner of a larger blank canvas, so that row counts differ."""
    from PIL import Image

    canvas = rng.choices([(8, 8), (8, 12), (12, 8), (12, 12)], weights=[9, 1, 1, 1])[0]
    wide = np.zeros(canvas, dtype=np.uint8)
    wide[:8, :8] = pixels
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _samples(pool: Pool, n: int, rng: random.Random, prefix: str) -> Iterator[dict[str, bytes | str]]:
    """n samples of up to three images and up to two clips, with at least one item each."""
    counts = [(1, 1)] * 12 + [(2, 1)] * 4 + [(3, 1), (1, 2), (2, 2), (1, 0), (0, 1)]
    taken = {d: 0 for d in range(10)}
    spoken = {d: 0 for d in range(10)}
    for k in range(n):
        n_images, n_clips = rng.choice(counts)
        seen = [rng.randrange(10) for _ in range(n_images)]
        heard = [rng.randrange(10) for _ in range(n_clips)]
        sample: dict[str, bytes | str] = {"__key__": f"{prefix}{k:05d}"}
        segments: list[dict[str, object]] = []
        for i, digit in enumerate(seen):
            pixels = pool.images[digit][taken[digit] % len(pool.images[digit])]
            taken[digit] += 1
            sample[f"img{i}.png"] = _png(pixels, rng)
            segments.append({"vision": f"img{i}.png"})
        for i, digit in enumerate(heard):
            sample[f"aud{i}.wav"] = pool.clips[digit][spoken[digit] % len(pool.clips[digit])]
            spoken[digit] += 1
            segments.append({"audio": f"aud{i}.wav"})
        segments += _text("sees", seen, "vision") + _text(" hears", heard, "audio")
        segments.append({"text": f" sum {sum(seen) + sum(heard)}"})
        sample["json"] = json.dumps({"segments": segments}).encode()
        yield sample


def _text(verb: str, digits: Sequence[int], module: str) -> list[dict[str, object]]:
    """Segments that read " sees 3 5"; the digits depend on the module."""
    if not digits:
        return [{"text": f"{verb} none"}]
    out: list[dict[str, object]] = [{"text": verb}]
    for digit in digits:
        out += [{"text": " "}, {"text": str(digit), "depends": module}]
    return out


def _write(path: Path, samples: Iterator[dict[str, bytes | str]]) -> Path:
    from webdataset import TarWriter

    # Plain ustar headers: extended ones would add a kilobyte to every small file.
    with TarWriter(str(path), mtime=0, user="polyrank", group="polyrank", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            tar.write(sample)
    return path

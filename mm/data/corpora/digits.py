"""Make the shipped digits data set: handwritten digits, spoken digits and text about both.

Images are the UCI handwritten digits (through scikit-learn), speech is synthesised with eSpeak NG (through
espeakng-loader): `pip install -e .[data]`. Evaluation images and evaluation voices never occur in training.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mm.data.corpora.shards import WrittenSample, write_shard
from mm.data.corpora.speech import EVAL_VOICES, TRAIN_VOICES, Speaker

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

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
        write_shard(out / "digits-train-000000.tar", _samples(train, half, rng, "a")),
        write_shard(out / "digits-train-000001.tar", _samples(train, train_samples - half, rng, "b")),
        write_shard(out / "digits-eval-000000.tar", _samples(held_out, eval_samples, rng, "e")),
    ]
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION)
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


def _png(pixels: np.ndarray, rng: random.Random) -> bytes:
    """A digit as PNG, sometimes in the corner of a larger blank canvas, so that row counts differ."""
    from PIL import Image

    canvas = rng.choices([(8, 8), (8, 12), (12, 8), (12, 12)], weights=[9, 1, 1, 1])[0]
    wide = np.zeros(canvas, dtype=np.uint8)
    wide[:8, :8] = pixels
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _samples(pool: Pool, n: int, rng: random.Random, prefix: str) -> Iterator[WrittenSample]:
    """n samples of up to three images and up to two clips, with at least one item each."""
    counts = [(1, 1)] * 12 + [(2, 1)] * 4 + [(3, 1), (1, 2), (2, 2), (1, 0), (0, 1)]
    taken = {d: 0 for d in range(10)}
    spoken = {d: 0 for d in range(10)}
    for k in range(n):
        n_images, n_clips = rng.choice(counts)
        seen = [rng.randrange(10) for _ in range(n_images)]
        heard = [rng.randrange(10) for _ in range(n_clips)]
        sample: WrittenSample = {"__key__": f"{prefix}{k:05d}"}
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

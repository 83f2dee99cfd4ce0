"""Which kind of media a payload is, by the ending of its name, and which media a record has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mm.data.published import MODULES

ENDINGS = {
    "image": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    "audio": ("wav", "flac", "mp3", "ogg", "oga", "opus", "m4a"),
    "video": ("mp4", "webm", "mkv", "mov", "avi"),
}
FIELDS = {
    "image": ("image", "images", "image_path", "img"),
    "audio": ("audio", "audios", "sound", "audio_path", "speech"),
    "video": ("video", "videos", "video_path"),
}


class Medium(NamedTuple):
    """A picture, sound or video of a record."""

    kind: str  # "image", "audio" or "video"
    name: str  # of its payload, or its path


def kind_of(name: str) -> str | None:
    """The kind of media that a name ends as; None for everything else."""
    ending = name.rpartition(".")[2].lower()
    return next((kind for kind, endings in ENDINGS.items() if ending in endings), None)


def in_order(names: Iterable[str]) -> list[str]:
    """Names with their numbers in order: img2.jpg before img10.jpg, whatever order a tar has."""
    return sorted(
        names, key=lambda name: [(int(s), "") if s.isdigit() else (-1, s) for s in re.split(r"(\d+)", name)]
    )


def came_with(names: Sequence[str]) -> list[Medium]:
    """The media among the payloads that come with a record, in order."""
    return [Medium(kind, name) for name in in_order(names) if (kind := kind_of(name)) is not None]


def media_of(record: Mapping[str, Any], names: Sequence[str]) -> list[Medium]:
    """The media of a record: what its fields name, found among the payloads that come with it.

    Paths that no payload is called after are taken for payloads in order, where there are as many of each
    kind: a WebDataset calls them after endings. Raises ValueError where the numbers differ.
    """
    named = [m for kind, fields in FIELDS.items() for f in fields for m in _of_field(kind, record.get(f))]
    there = came_with(names)
    if not there or not named:
        return named or there
    known = set(names)
    if all(m.name in known for m in named):
        return named
    want, have = Counter(m.kind for m in named), Counter(m.kind for m in there)
    if want != have:
        raise ValueError(f"it names {counted(want)} and comes with {counted(have)}")
    left = {kind: [m for m in there if m.kind == kind] for kind in have}
    return [left[m.kind].pop(0) for m in named]


def _of_field(kind: str, value: Any) -> list[Medium]:
    values = value if isinstance(value, list) else [value]
    return [Medium(kind, v) for v in values if isinstance(v, str) and v]


def counted(counts: Mapping[str, int]) -> str:
    """Counts by kind in words."""
    return ", ".join(f"{n} of kind {kind}" for kind, n in sorted(counts.items()) if n) or "no media"


def module_of(media: Iterable[Medium]) -> str | None:
    """The module of media that all go to one; None where there are several, or no media."""
    modules = {MODULES[m.kind] for m in media}
    return modules.pop() if len(modules) == 1 else None

"""A text, alone or about what comes with it: WebDataset caption pairs, img2dataset, speech and its words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mm.data.layouts.media import FIELDS, came_with, media_of, module_of
from mm.data.published import MODULES

TEXTS = ("caption", "text", "txt", "TEXT", "transcript", "transcription", "sentence", "content")


def captions(record: Any, names: Sequence[str]) -> dict[str, Any]:
    """The media, then the text about them, which depends on their module where that is one."""
    text = _text(record)
    media = media_of(record, names)
    if not media:
        raise ValueError("it has a caption of nothing: no picture, sound or video comes with it")
    written: dict[str, Any] = {"text": text}
    if (module := module_of(media)) is not None:
        written["depends"] = module
    return {"segments": [*({MODULES[m.kind]: m.name} for m in media), written]}


def text(record: Any, names: Sequence[str]) -> dict[str, Any]:
    """The text alone; what comes with it is left out."""
    return {"segments": [{"text": _text(record)}]}


def is_captions(record: Any, names: Sequence[str]) -> bool:
    """Whether a record has a text, and media that its fields name or that come with it."""
    return is_text(record, names) and bool(came_with(names) or _fields(record))


def is_text(record: Any, names: Sequence[str]) -> bool:
    """Whether a record has a text."""
    return isinstance(record, Mapping) and any(isinstance(record.get(f), str) for f in TEXTS)


def _fields(record: Mapping[str, Any]) -> bool:
    return any(record.get(f) for fields in FIELDS.values() for f in fields)


def _text(record: Any) -> str:
    if not is_text(record, ()):
        have = ", ".join(map(str, record)) if isinstance(record, Mapping) else f"{record!r:.80}"
        raise ValueError(f"it has no text, only {have}; needed: one of {', '.join(TEXTS)} that is a string")
    found: str = next(record[f] for f in TEXTS if isinstance(record.get(f), str))
    if not found.strip():
        raise ValueError("its text is empty")
    return found

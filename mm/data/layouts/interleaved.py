"""Documents of texts and pictures in order, as OBELICS and MMC4 have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mm.data.layouts.media import Medium, media_of
from mm.data.published import MODULES


def interleaved(record: Any, names: Sequence[str]) -> dict[str, Any]:
    """Segments in the order of a document; all of its text is learned.

    OBELICS: lists "texts" and "images" of one length, at each place one of them null. MMC4: "text_list", and
    "image_info" with "image_name" and "matched_text_index", the text that a picture stands before.
    """
    if not is_interleaved(record, names):
        raise ValueError(
            "it is no document of texts and pictures; needed: lists texts and images, or text_list and "
            "image_info"
        )
    order = _mmc4(record) if "text_list" in record else _obelics(record)
    named = [v for is_text, v in order if not is_text]
    media = iter(media_of({"images": named}, names))
    segments: list[dict[str, str]] = []
    for is_text, value in order:
        if is_text:
            segments += [{"text": value}] if value else []
        else:
            medium: Medium = next(media)
            segments.append({MODULES[medium.kind]: medium.name})
    if not any("text" in s for s in segments):
        raise ValueError("it has no text")
    return {"segments": segments}


def is_interleaved(record: Any, names: Sequence[str]) -> bool:
    """Whether a record is such a document."""
    if not isinstance(record, Mapping):
        return False
    pairs = (("texts", "images"), ("text_list", "image_info"))
    return any(isinstance(record.get(a), list) and isinstance(record.get(b), list) for a, b in pairs)


def _obelics(record: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """By place, whether it is a text, and the text or the picture's name."""
    texts, images = record["texts"], record["images"]
    if len(texts) != len(images):
        raise ValueError(f"it has {len(texts)} texts and {len(images)} images; needed: equal lengths")
    out = []
    for i, (text, image) in enumerate(zip(texts, images, strict=True)):
        if text is not None and image is not None:
            raise ValueError(f"place {i} has both a text and an image; needed: null for one of them")
        if text is None and image is None:
            continue  # OBELICS has dropped what stood here
        value = image if text is None else text
        if not isinstance(value, str):
            raise ValueError(f"place {i} has {value!r:.80}; needed: a string")
        out.append((text is not None, value))
    return out


def _mmc4(record: Mapping[str, Any]) -> list[tuple[bool, str]]:
    texts: list[Any] = record["text_list"]
    before: dict[int, list[str]] = {}
    for image in record["image_info"]:
        at = image.get("matched_text_index") if isinstance(image, Mapping) else None
        name = image.get("image_name") if isinstance(image, Mapping) else None
        if not isinstance(at, int) or not 0 <= at < len(texts) or not isinstance(name, str):
            raise ValueError(f"its image_info has {image!r:.80}; needed: image_name and matched_text_index")
        before.setdefault(at, []).append(name)
    if not all(isinstance(t, str) for t in texts):
        raise ValueError("its text_list has something that is no string")
    return [one for i, t in enumerate(texts) for one in [*((False, n) for n in before.get(i, [])), (True, t)]]

"""Samples of a WebDataset tar: which part has the text, and how it is read.

`KEY.jpg` with `KEY.txt` is a caption pair; `KEY.json` may have segments, a conversation or a document. The
record of a part is its json, or a text as the field of its ending; payloads beside it are fields by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mm.data.layouts.find import AUTO, detect, find_layout
from mm.data.layouts.layout import TEXTS
from mm.data.layouts.media import kind_of
from mm.data.sample import load_json


def ending(name: str) -> str:
    """The ending of a part's name, in lower case."""
    return name.rpartition(".")[2].lower()


def wanted(layout: str) -> tuple[str, ...]:
    """Endings of the parts that may have the text."""
    return TEXTS if layout == AUTO else find_layout(layout).texts


def text_part(names: Iterable[str], layout: str) -> str:
    """The part of a sample that has its text, of the parts with these names. Raises ValueError."""
    there = list(names)
    found = next((n for end in wanted(layout) for n in there if ending(n) == end), None)
    if found is None:
        raise ValueError(
            f"it has no {' or '.join(wanted(layout))} part (layout {layout}), only {', '.join(sorted(there))}"
        )
    return found


def looks_like(names: Iterable[str], payload: Callable[[str], bytes]) -> str | None:
    """The layout that a sample looks like; None where it is like none. payload: of a part; it may raise
    ValueError. A json is looked at first, then texts."""
    there = list(names)
    for part in (n for end in TEXTS for n in there if ending(n) == end):
        try:
            found = detect(record_of(payload(part), part, there), there)
        except ValueError:
            continue
        if found is not None:
            return found
    return None


def layout_of(found: Iterable[str | None]) -> str:
    """The layout of a shard: what most of its samples look like, ours where they look like none.

    It is one for all of them. A caption that has lost its picture is a broken sample, and no text.
    """
    counts = Counter(one for one in found if one is not None)
    return counts.most_common(1)[0][0] if counts else "segments"


def made_of(payload: bytes, part: str, layout: str, names: Iterable[str]) -> dict[str, Any]:
    """Segments or messages that a part stands for. names: of the payloads beside it, those that are used at
    least. Raises ValueError with what is wrong."""
    others = [] if layout == "segments" else [n for n in names if n != part]
    made = find_layout(layout).make(record_of(payload, part, others), others)
    if not isinstance(made, Mapping):
        raise ValueError(f"layout {layout} gave {made!r:.80}; needed: a mapping with segments or messages")
    return dict(made)


def record_of(payload: bytes, part: str, names: Iterable[str]) -> Any:
    """What a part has: a json's value, or a text as fields. Media beside it are fields by their endings."""
    media = {n: n for n in names if kind_of(n) is not None}
    if ending(part) == "json":
        found = load_json(payload)
        return {**media, **found, "json": found} if isinstance(found, Mapping) and media else found
    try:
        said = payload.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"its {part} is no text in UTF-8 ({error.reason} at byte {error.start})") from error
    return {**media, part: said, "text": said}

"""Find a layout by what a config says: a name, a mapping, or a function of the user's."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

from mm.data.layouts.captions import captions, is_captions, is_text, text
from mm.data.layouts.conversations import conversations, is_conversations, is_ours
from mm.data.layouts.interleaved import interleaved, is_interleaved
from mm.data.layouts.layout import TEXTS, Layout, Make
from mm.data.layouts.mapping import mapping_layout

GROUP = "polyrank.layouts"
AUTO = "auto"
Spec = str | Mapping[str, Any] | None  # as a config or an option has it


def segments(record: Any, names: Sequence[str]) -> dict[str, Any]:
    """Our own: segments or messages stay as they are."""
    if not isinstance(record, Mapping):
        raise ValueError(f"its json has no list of segments (it is {record!r:.80})")
    return dict(record)


ABOUT = (*TEXTS[1:], "json")  # a json is about the sample where there is a text beside it, as of img2dataset
BUILT_IN: dict[str, tuple[Make, tuple[str, ...]]] = {  # and endings of the part with the record
    "segments": (segments, ("json",)),
    "captions": (captions, ABOUT),
    "conversations": (conversations, ("json",)),
    "interleaved": (interleaved, ("json",)),
    "text": (text, ABOUT),
}
NAMES = (AUTO, *BUILT_IN)


def layout_name(spec: Spec) -> str:
    """A config's layout as text: "auto", a name, or a mapping as JSON. Raises ValueError (find_layout)."""
    if spec is None or spec == AUTO:
        return AUTO
    return find_layout(spec if isinstance(spec, str) else json.dumps(dict(spec))).name


def layout_key(name: str) -> str:
    """What an index that is made with a layout depends on."""
    return AUTO if name == AUTO else find_layout(name).key


@lru_cache(256)
def find_layout(name: str) -> Layout:
    """The layout of a name, a mapping as JSON, or module:function; not "auto". Raises ValueError in words.

    A function gets (record, names of payloads) and returns {"segments": ..} or {"messages": ..}. An installed
    package may name one by an entry point of the group polyrank.layouts.
    """
    if name in BUILT_IN:
        make, texts = BUILT_IN[name]
        return Layout(name, make, texts, name)
    if name.startswith("{"):
        return mapping_layout(json.loads(name), find_layout)
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name in points:
        made = points[name].load()
    elif ":" in name:
        made = _import(name)
    else:
        near = get_close_matches(name, [*NAMES, *points], 1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ValueError(
            f"there is no layout {name!r}{hint}; known: {', '.join([*NAMES, *points])}, a mapping of fields, "
            "or module:function"
        )
    if not callable(made):
        raise ValueError(f"layout {name} is {made!r:.80}; needed: a function of (record, names)")
    return Layout(name, made, key=f"{name} {_source_digest(made)}")


def _import(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"layout {name!r} cannot be imported: {error}") from error


def _source_digest(made: Any) -> str:
    """A digest of a function's source: an index that an older one has made is made again."""
    try:
        source = inspect.getsource(made)
    except (OSError, TypeError):  # not written in Python: the name must suffice
        source = ""
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def detect(record: Any, names: Sequence[str]) -> str | None:
    """The name of the layout that a record looks like; None where it is like none."""
    if isinstance(record, Mapping) and "segments" in record:
        return "segments"
    if is_conversations(record, names):
        return "segments" if "messages" in record and is_ours(record) else "conversations"
    if is_interleaved(record, names):
        return "interleaved"
    if is_captions(record, names):
        return "captions"
    return "text" if is_text(record, names) else None

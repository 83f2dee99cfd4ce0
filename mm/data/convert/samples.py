"""A record as a sample of ours: its json, and its media under names of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from mm.data.convert.records import Record, Unreadable
from mm.data.encode import parse_made
from mm.data.layouts.find import AUTO, detect, find_layout
from mm.data.layouts.layout import Layout
from mm.data.layouts.media import kind_of
from mm.data.layouts.tar import ending, looks_like, made_of, text_part
from mm.data.probes import metadata

PREFIXES = {"image": "img", "audio": "aud", "video": "vid"}


class Missing(ValueError):
    """A medium that is not there."""


class Made(NamedTuple):
    """A sample as a shard has it."""

    json: bytes
    parts: dict[str, bytes]  # by name


def layout_like(record: Record) -> str | None:
    """The layout that a record looks like."""
    if record.parts is not None:
        return looks_like(record.parts, record.parts.__getitem__)
    return None if isinstance(record.value, Unreadable) else detect(record.value, list(record.payloads))


def sample_of(record: Record, layout: str, roots: Sequence[Path]) -> Made:
    """A record in a layout, with its media. roots: folders that paths are found in, the first that has one.

    Raises ValueError with what is wrong with it, Missing where a medium is not there.
    """
    assert layout != AUTO
    if isinstance(record.value, Unreadable):
        raise record.value
    # A sample of a tar may name any of its parts, arrays too.
    made, payloads = _made(record, find_layout(layout)), {**(record.parts or {}), **record.payloads}
    names: dict[str, str] = {}
    parts: dict[str, bytes] = {}
    for holder, key in _items(made):
        name = holder[key]
        if name not in names:
            payload = payloads[name] if name in payloads else _read(name, roots)
            end = ending(urlsplit(name).path if "://" in name else name)
            prefix = PREFIXES.get(kind_of(f".{end}") or "", "item")
            names[name] = f"{prefix}{sum(n.startswith(prefix) for n in parts)}.{end}"
            parts[names[name]] = payload
            try:
                metadata(end, payload)
            except Exception as error:  # whatever a decoder raises
                raise ValueError(f"{name}: {error}") from error
        holder[key] = names[name]
    parse_made(made)
    value = record.value
    if isinstance(value, dict) and isinstance(value.get("id"), str | int):
        made["id"] = value["id"]
    return Made(json.dumps(made, ensure_ascii=False).encode(), parts)


def _made(record: Record, layout: Layout) -> dict[str, Any]:
    """What a layout makes of a record, as an object of its own."""
    if record.parts is not None and not layout.name.startswith("{"):
        part = text_part(record.parts, layout.name)
        found: Any = made_of(record.parts[part], part, layout.name, record.parts)
    else:
        found = layout.make(record.value, list(record.payloads))
    written = found if isinstance(found, dict) else {}
    keep = {k: written[k] for k in ("segments", "messages", "depends", "tools") if k in written}
    if "segments" not in keep and "messages" not in keep:
        raise ValueError(f"layout {layout.name} made {found!r:.80} of it; needed: segments or messages")
    parse_made(keep)
    copied: dict[str, Any] = json.loads(json.dumps(keep))
    return copied


def _items(made: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a sample that name media, each with the key that has the name."""
    for segment in made.get("segments", ()):
        kinds = [k for k in segment if len(segment) == 1 or k not in ("loss", "depends")]
        if kinds[0] != "text":
            yield segment, kinds[0]
    for message in made.get("messages", ()):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part["type"] != "text":
                yield part, part["type"]


def _read(name: str, roots: Sequence[Path]) -> bytes:
    """The content of a medium that a record names by its path or address."""
    if "://" in name and not name.startswith("file://"):
        url = urlsplit(name)
        tail = url.netloc + unquote(url.path) + (f"?{url.query}" if url.query else "")  # as wget -x writes it
        hint = f" (it is {tail} as wget -x writes it)"
    else:
        tail, hint = name.removeprefix("file://"), ""
    for root in roots:
        path = Path(os.path.abspath(root / tail))
        if not path.is_relative_to(os.path.abspath(root)):
            continue  # data of others must not bring in files from elsewhere
        try:
            return path.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise Missing(f"{name} cannot be read: {error}") from error
    raise Missing(f"{name} is not in {' or '.join(map(str, roots))}{hint}; --media names other folders")

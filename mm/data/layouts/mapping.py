"""A layout in a few lines of YAML: which fields make a sample.

    layout: {segments: [{vision: jpg}, {literal: "It is ", loss: false}, {text: caption, depends: vision}]}
    layout: {messages: [{user: [{image: jpg}, {text: question}]}, {assistant: answer}]}
    layout: {layout: conversations, fields: {conversations: dialog}, plain: true}

A field is a name, a path into it ("meta.caption", "answers[0]"), or several of which the first counts that is
there ("jpg;png"). In a tar the parts of a sample are fields too, by their endings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from mm.data.layouts.conversations import as_segments
from mm.data.layouts.layout import TEXTS, Layout, Make
from mm.data.published import MODULES

KEYS = ("layout", "fields", "plain", "segments", "messages")
MARKS = ("loss", "depends")


def mapping_layout(spec: Mapping[str, Any], base: Callable[[str], Layout]) -> Layout:
    """The layout of a mapping. base: gives the layout that its key "layout" names. Raises ValueError."""
    for key in spec:
        if key not in KEYS:
            near = get_close_matches(str(key), KEYS, 1)
            hint = f"; nearest: {near[0]}" if near else ""
            raise ValueError(f"a layout has no key {key!r}{hint}; known: {', '.join(KEYS)}")
    given = [k for k in ("layout", "segments", "messages") if k in spec]
    if len(given) != 1:
        raise ValueError(
            f"a layout has {' and '.join(given) or 'none of layout, segments, messages'}; needed: one of them"
        )
    fields = spec.get("fields", {})
    if not isinstance(fields, Mapping) or not all(isinstance(v, str) for v in fields.values()):
        raise ValueError(f"a layout has fields {fields!r:.80}; needed: our names with theirs")
    if "layout" in spec:
        make, texts = _renamed(base(spec["layout"]).make, fields), base(spec["layout"]).texts
        used = list(fields.values())
    else:
        make = _template(given[0], spec[given[0]], fields)
        texts, used = TEXTS, [*fields.values(), *_used(spec[given[0]])]
    plain = spec.get("plain", False)
    if not isinstance(plain, bool):
        raise ValueError(f"a layout has plain {plain!r}; needed: true or false")
    whole: Make = (lambda record, names: as_segments(make(record, names))) if plain else make
    name = json.dumps(spec, sort_keys=True, ensure_ascii=False)
    first = [f.partition(".")[0].partition("[")[0] for one in used for f in one.split(";")]
    return Layout(name, whole, tuple(dict.fromkeys([*(f for f in first if f in texts), *texts])), name)


def look_up(record: Any, field: str) -> Any:
    """What a record has at a field; None where it has nothing. A whole name is looked for before a path."""
    for one in field.split(";"):
        if isinstance(record, Mapping) and record.get(one) is not None:
            return record[one]
        found = record
        for step in re.findall(r"[^.\[\]]+", one):
            if isinstance(found, Mapping):
                found = found.get(step)
            elif isinstance(found, list) and step.isdigit() and int(step) < len(found):
                found = found[int(step)]
            else:
                found = None
        if found is not None:
            return found
    return None


def _renamed(make: Make, fields: Mapping[str, str]) -> Make:
    def renamed(record: Any, names: Sequence[str]) -> dict[str, Any]:
        own = {ours: look_up(record, theirs) for ours, theirs in fields.items()}
        rest = dict(record) if isinstance(record, Mapping) else {}
        return make({**rest, **own} if fields else record, names)

    return renamed


def _used(entries: Any) -> list[str]:
    """The fields that the entries of a template name."""
    out: list[str] = []
    for entry in entries if isinstance(entries, list) else []:
        for key, value in entry.items() if isinstance(entry, Mapping) else ():
            if isinstance(value, list):
                out += _used(value)
            elif isinstance(value, str) and key not in ("literal", *MARKS):
                out.append(value)
    return out


def _template(kind: str, entries: Any, fields: Mapping[str, str]) -> Make:
    if not isinstance(entries, list) or not entries or not all(isinstance(e, Mapping) for e in entries):
        raise ValueError(f"a layout has {kind} {entries!r:.80}; needed: a list of entries")
    check = _check_segment if kind == "segments" else _check_turn
    for entry in entries:
        check(entry)

    def value(record: Any, field: str) -> Any:
        return look_up(record, fields.get(field, field))

    def make(record: Any, names: Sequence[str]) -> dict[str, Any]:
        if kind == "segments":
            return {"segments": [s for entry in entries for s in _segments(entry, record, value)]}
        return {"messages": [_message(entry, record, value) for entry in entries]}

    return make


def _check_segment(entry: Mapping[str, Any]) -> None:
    kinds = [k for k in entry if k not in MARKS]
    if len(kinds) != 1 or not isinstance(entry[kinds[0]], str):
        raise ValueError(
            f"a layout has the segment {dict(entry)!r:.80}; needed: one of text, literal or a module, with a "
            "field (a text where it is literal), and loss or depends"
        )


def _check_turn(entry: Mapping[str, Any]) -> None:
    said = next(iter(entry.values())) if len(entry) == 1 else None
    parts = said if isinstance(said, list) else [{"text": said}]
    good = all(
        isinstance(p, Mapping)
        and len(p) == 1
        and next(iter(p)) in ("text", "literal", *MODULES)
        and isinstance(next(iter(p.values())), str)
        for p in parts
    )
    if not good:
        raise ValueError(
            f"a layout has the message {dict(entry)!r:.80}; needed: a role with a field, or with a list of "
            f"text, literal, {', '.join(MODULES)}"
        )


Value = Callable[[Any, str], Any]


def _text(record: Any, field: str, value: Value) -> str:
    found = value(record, field)
    if not isinstance(found, str | int | float) or isinstance(found, bool):
        have = ", ".join(map(str, record)) if isinstance(record, Mapping) else repr(record)
        raise ValueError(f"its field {field} is {found!r:.60}; needed: a text. It has: {have:.200}")
    return str(found)


def _names(record: Any, field: str, value: Value) -> list[str]:
    found = value(record, field)
    listed = found if isinstance(found, list) else [found]
    if not all(isinstance(n, str) and n for n in listed):
        raise ValueError(f"its field {field} is {found!r:.60}; needed: the name of a payload or its path")
    return listed


def _segments(entry: Mapping[str, Any], record: Any, value: Value) -> list[dict[str, Any]]:
    kind = next(k for k in entry if k not in MARKS)
    marks = {k: entry[k] for k in MARKS if k in entry}
    if kind == "literal":
        return [{"text": entry[kind], **marks}]
    if kind == "text":
        return [{"text": _text(record, entry[kind], value), **marks}]
    return [{kind: name} for name in _names(record, entry[kind], value)]


def _message(entry: Mapping[str, Any], record: Any, value: Value) -> dict[str, Any]:
    role, said = next(iter(entry.items()))
    if isinstance(said, str):
        return {"role": role, "content": _text(record, said, value)}
    content: list[dict[str, str]] = []
    for part in said:
        kind, field = next(iter(part.items()))
        if kind in ("text", "literal"):
            found = field if kind == "literal" else _text(record, field, value)
            content.append({"type": "text", "text": found})
        else:
            content += [{"type": kind, kind: name} for name in _names(record, field, value)]
    return {"role": role, "content": content}

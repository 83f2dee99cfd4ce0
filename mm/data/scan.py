"""Scan a shard: what its index holds, made from the tar itself.

The entries here are what a scan hands on; mm/data/columns keeps them as columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NotRequired, TypedDict

from mm.data.conversation import Conversation
from mm.data.encode import Written, parse_sample
from mm.data.layouts.find import AUTO, layout_key
from mm.data.layouts.tar import ending, layout_of, looks_like, text_part, wanted
from mm.data.probes import known, metadata
from mm.data.storage import LOCAL, Location, OpenFile, Storage
from mm.data.tar import BLOCK, File, Loss, contents_of, split_name

VERSION = 3


class PartEntry(TypedDict):
    """One payload."""

    offset: int  # of its first byte in the tar
    size: int  # bytes
    sha256: str  # of the payload, "" where it cannot be read
    meta: dict[str, Any]  # from the probe of its extension
    unreadable: NotRequired[str]  # why it cannot be used


class SegmentEntry(TypedDict):
    """One segment."""

    kind: str  # "text", or the module of an item
    part: NotRequired[str]  # of an item, the name of its payload
    bytes: NotRequired[int]  # of text, its length in UTF-8
    tokens: NotRequired[int]  # of text, its length in tokens of a tokenizer
    loss: NotRequired[bool]  # true where absent
    depends: NotRequired[str]


class SampleEntry(TypedDict):
    """One sample."""

    key: str
    segments: list[SegmentEntry]
    parts: dict[str, PartEntry]  # by name, the json among them
    layout: NotRequired[str]  # how its text part is written; "segments" where absent
    text: NotRequired[str]  # name of its text part; "json" where absent
    chat: NotRequired[bool]  # a conversation: only a tokenizer makes segments of it, and here are its items


def text_entry(sample: SampleEntry) -> PartEntry:
    """The part that has a sample's text."""
    return sample["parts"][sample.get("text", "json")]


class ShardIndex(TypedDict):
    """What a scan of a shard has found."""

    version: int
    bytes: int  # size of the shard
    mtime_ns: int  # when the shard was last changed, as it was before the scan
    layout: NotRequired[str]  # key of the layout that was asked for; "auto" where absent
    probes: dict[str, str | None]  # by extension, the identity of its probe; None where there was none
    samples: list[SampleEntry]
    broken: list[list[str]]  # [key, why] of each loss; the key is "" where it is unknown
    torn: bool  # the shard ends before its end mark
    ignored: int  # files whose names make no sample
    headers: str  # sha256 over the tar headers of all parts


def build_index(shard: Location, layout: str = AUTO, storage: Storage = LOCAL) -> ShardIndex:
    """Read a shard once and return its index: what is whole, and a note on each loss ("broken").

    layout: how samples are written, by name. Raises DataError for a compressed file.
    """
    with storage.scanning(shard) as tar:
        return _index_of(tar, shard, layout)


def _index_of(tar: OpenFile, shard: Location, layout: str) -> ShardIndex:
    was = tar.version  # before the scan: a shard that is written to meanwhile is indexed again
    found = contents_of(tar, shard)
    parts: dict[str, dict[str, PartEntry]] = {}
    texts: dict[str, dict[str, bytes]] = {}  # by key and name, payloads that may have the text
    lacking: set[str] = set()  # endings of files that a missing package would read
    endings = wanted(layout)
    ignored = 0
    for file in found.files:
        place = split_name(file.name)
        if place is None:
            ignored += 1
            continue
        key, name = place
        entry, payload = _part_entry(tar, file, name, lacking)
        if ending(name) in endings:
            texts.setdefault(key, {})[name] = payload
        if name in parts.setdefault(key, {}):
            entry["unreadable"] = f"{name} is there twice"
        parts[key][name] = entry
    broken = [_loss(loss, parts) for loss in found.lost]
    asked = layout
    if layout == AUTO:
        layout = layout_of(_look(entries, texts.get(key, {})) for key, entries in parts.items())
    samples: list[SampleEntry] = []
    for key, entries in parts.items():
        try:
            samples.append(_sample(key, entries, texts.get(key, {}), layout))
        except ValueError as error:
            broken.append([key, str(error)])
    extensions = sorted({ending(name) for entries in parts.values() for name in entries})
    index: ShardIndex = {
        "version": VERSION,
        "bytes": was.size,
        "mtime_ns": was.stamp,
        # An index that was made without a package is made again: it is of no probe that is known.
        "probes": {e: f"{known(e)} without a package" if e in lacking else known(e) for e in extensions},
        "samples": samples,
        "broken": broken,
        "torn": found.torn,
        "ignored": ignored,
        "headers": headers_digest(tar, (p["offset"] for s in samples for p in s["parts"].values())),
    }
    if asked != AUTO:
        index["layout"] = layout_key(asked)
    return index


def headers_digest(tar: OpenFile, offsets: Iterable[int]) -> str:
    """The sha256 over the tar headers before payloads at these offsets, as the shard has them now."""
    h = hashlib.sha256()
    for offset in offsets:
        h.update(tar.read_at(offset - BLOCK, BLOCK))
    return h.hexdigest()


def _loss(loss: Loss, keys: Collection[str]) -> list[str]:
    """[key, why] of a loss in a shard with these keys; the key is "" where the name may be damaged too."""
    place = split_name(loss.name)
    key = loss.name if place is None else place[0]
    if loss.sure or key in keys:
        return [key, f"{loss.name}: {loss.why}" if loss.name else loss.why]
    return ["", f"{loss.why} (its name reads {loss.name!r})"]


def _part_entry(tar: OpenFile, file: File, name: str, lacking: set[str]) -> tuple[PartEntry, bytes]:
    """The entry of a file of the tar, and its payload; the payload is empty where it cannot be read.

    lacking: takes the ending of a file that needs a package which is missing.
    """
    from encoders.media.errors import MissingPackage
    from encoders.media.limits import BOUNDS

    entry: PartEntry = {"offset": file.offset, "size": file.size, "sha256": "", "meta": {}}
    if file.size > BOUNDS.bytes:  # it would have to be held in memory
        entry["unreadable"] = f"{name} has {file.size} bytes; needed: at most {BOUNDS.bytes}"
        return entry, b""
    try:
        payload = tar.read_at(file.offset, file.size)
        if len(payload) < file.size:
            raise OSError(f"{len(payload)} of {file.size} bytes were read")
    except OSError as error:
        entry["unreadable"] = f"{name} cannot be read: {error}"
        return entry, b""
    entry["sha256"] = hashlib.sha256(payload).hexdigest()
    try:
        entry["meta"] = metadata(ending(name), payload)
    except MissingPackage as error:
        entry["unreadable"] = f"{name}: {error}"
        lacking.add(ending(name))
    except Exception as error:  # whatever a decoder raises: the part is unusable, and the error is noted
        entry["unreadable"] = f"{name}: {error}"
    return entry, payload


def _look(parts: Mapping[str, PartEntry], payloads: Mapping[str, bytes]) -> str | None:
    """The layout that a sample looks like."""
    return looks_like(parts, lambda name: _readable(parts, payloads, name))


def _readable(parts: Mapping[str, PartEntry], payloads: Mapping[str, bytes], name: str) -> bytes:
    if "unreadable" in parts[name]:
        raise ValueError(parts[name]["unreadable"])
    return payloads[name]


def _sample(key: str, parts: dict[str, PartEntry], payloads: Mapping[str, bytes], layout: str) -> SampleEntry:
    """The entry of a sample; raises ValueError where the sample cannot be used."""
    text = text_part(parts, layout)
    written = parse_sample(_readable(parts, payloads, text), layout, text, tuple(parts))
    entry: SampleEntry = {"key": key, "segments": _segments(parts, written), "parts": parts}
    if layout != "segments":
        entry["layout"] = layout
    if text != "json":
        entry["text"] = text
    if isinstance(written, Conversation):
        entry["chat"] = True
    return entry


def _segments(parts: Mapping[str, PartEntry], written: Written) -> list[SegmentEntry]:
    """The segments of a sample; of a conversation its items. Raises ValueError where one cannot be used."""
    if isinstance(written, Conversation):
        return [_item(parts, item.module, item.name) for item in written.items]
    out: list[SegmentEntry] = []
    for seg in written:
        if seg.text is None:
            out.append(_item(parts, seg.kind, seg.name))
        else:
            entry: SegmentEntry = {"kind": "text", "bytes": len(seg.text.encode())}
            if not seg.loss:
                entry["loss"] = False
            if seg.depends is not None:
                entry["depends"] = seg.depends
            out.append(entry)
    return out


def _item(parts: Mapping[str, PartEntry], module: str, name: str) -> SegmentEntry:
    if name not in parts:
        raise ValueError(f"its json names {name!r}, which the shard does not hold")
    if "unreadable" in parts[name]:
        raise ValueError(parts[name]["unreadable"])
    return {"kind": module, "part": name}

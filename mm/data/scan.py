"""Scan a shard: make the content of its index file from the tar itself.

The entries here are the JSON of that file; mm/data/index.py reads and writes it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from mm.data.conversation import Conversation
from mm.data.encode import Written, parse_sample
from mm.data.probes import known, metadata
from mm.data.tar import BLOCK, File, Loss, read_contents, split_name

VERSION = 2


class PartEntry(TypedDict):
    """One payload in an index file."""

    offset: int  # of its first byte in the tar
    size: int  # bytes
    sha256: str  # of the payload, "" where it cannot be read
    meta: dict[str, Any]  # from the probe of its extension
    unreadable: NotRequired[str]  # why it cannot be used


class SegmentEntry(TypedDict):
    """One segment in an index file."""

    kind: str  # "text", or the module of an item
    part: NotRequired[str]  # of an item, the name of its payload
    bytes: NotRequired[int]  # of text, its length in UTF-8
    tokens: NotRequired[int]  # of text, its length in a token index
    loss: NotRequired[bool]  # true where absent
    depends: NotRequired[str]


class SampleEntry(TypedDict):
    """One sample in an index file."""

    key: str
    segments: list[SegmentEntry]
    parts: dict[str, PartEntry]  # by name, the json among them
    chat: NotRequired[bool]  # a conversation: only a tokenizer makes segments of it, and here are its items


class ShardIndex(TypedDict):
    """The content of an index file, without its own sum."""

    version: int
    bytes: int  # size of the shard
    mtime_ns: int  # when the shard was last changed, as it was before the scan
    probes: dict[str, str | None]  # by extension, the identity of its probe; None where there was none
    samples: list[SampleEntry]
    broken: list[list[str]]  # [key, why] of each loss; the key is "" where it is unknown
    torn: bool  # the shard ends before its end mark
    ignored: int  # files whose names make no sample
    headers: str  # sha256 over the tar headers of all parts


def build_index(shard: Path) -> ShardIndex:
    """Read a shard once and return its index: what is whole, and a note on each loss ("broken").

    Raises DataError for a compressed file.
    """
    was = shard.stat()  # before the scan: a shard that is written to meanwhile is indexed again
    found = read_contents(shard)
    parts: dict[str, dict[str, PartEntry]] = {}
    jsons: dict[str, bytes] = {}
    lacking: set[str] = set()  # extensions of files that a missing package would read
    ignored = 0
    with shard.open("rb") as tar:
        for file in found.files:
            place = split_name(file.name)
            if place is None:
                ignored += 1
                continue
            key, name = place
            entry, payload = _part_entry(tar.fileno(), file, name, lacking)
            if name == "json":
                jsons[key] = payload
            if name in parts.setdefault(key, {}):
                entry["unreadable"] = f"{name} is there twice"
            parts[key][name] = entry
    broken = [_loss(loss, parts) for loss in found.lost]
    samples: list[SampleEntry] = []
    for key, entries in parts.items():
        try:
            written = _parsed(entries, jsons.get(key, b""))
            sample: SampleEntry = {"key": key, "segments": _segments(entries, written), "parts": entries}
            if isinstance(written, Conversation):
                sample["chat"] = True
            samples.append(sample)
        except ValueError as error:
            broken.append([key, str(error)])
    extensions = sorted({_extension(name) for entries in parts.values() for name in entries})
    return {
        "version": VERSION,
        "bytes": was.st_size,
        "mtime_ns": was.st_mtime_ns,
        # An index that was made without a package is made again: it is of no probe that is known.
        "probes": {e: f"{known(e)} without a package" if e in lacking else known(e) for e in extensions},
        "samples": samples,
        "broken": broken,
        "torn": found.torn,
        "ignored": ignored,
        "headers": headers_digest(shard, samples),
    }


def headers_digest(shard: Path, samples: Sequence[SampleEntry]) -> str:
    """The sha256 over the tar headers of all parts of `samples`, as the shard has them now."""
    h = hashlib.sha256()
    with shard.open("rb") as tar:
        for sample in samples:
            for part in sample["parts"].values():
                h.update(os.pread(tar.fileno(), BLOCK, part["offset"] - BLOCK))
    return h.hexdigest()


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _loss(loss: Loss, keys: Collection[str]) -> list[str]:
    """[key, why] of a loss in a shard with these keys; the key is "" where the name may be damaged too."""
    place = split_name(loss.name)
    key = loss.name if place is None else place[0]
    if loss.sure or key in keys:
        return [key, f"{loss.name}: {loss.why}" if loss.name else loss.why]
    return ["", f"{loss.why} (its name reads {loss.name!r})"]


def _part_entry(tar: int, file: File, name: str, lacking: set[str]) -> tuple[PartEntry, bytes]:
    """The entry of a file of the tar, and its payload; the payload is empty where it cannot be read.

    lacking: takes the extension of a file that needs a package which is missing.
    """
    from encoders.media.errors import MissingPackage
    from encoders.media.limits import BOUNDS

    entry: PartEntry = {"offset": file.offset, "size": file.size, "sha256": "", "meta": {}}
    if file.size > BOUNDS.bytes:  # it would have to be held in memory
        entry["unreadable"] = f"{name} has {file.size} bytes; needed: at most {BOUNDS.bytes}"
        return entry, b""
    try:
        payload = os.pread(tar, file.size, file.offset)
        if len(payload) < file.size:
            raise OSError(f"{len(payload)} of {file.size} bytes were read")
    except OSError as error:
        entry["unreadable"] = f"{name} cannot be read: {error}"
        return entry, b""
    entry["sha256"] = hashlib.sha256(payload).hexdigest()
    try:
        entry["meta"] = metadata(_extension(name), payload)
    except MissingPackage as error:
        entry["unreadable"] = f"{name}: {error}"
        lacking.add(_extension(name))
    except Exception as error:  # whatever a decoder raises: the part is unusable, and the error is noted
        entry["unreadable"] = f"{name}: {error}"
    return entry, payload


def _parsed(parts: Mapping[str, PartEntry], json: bytes) -> Written:
    """What a sample's json has; raises ValueError where the sample cannot be used."""
    if "json" not in parts:
        raise ValueError("it has no json part")
    if "unreadable" in parts["json"]:
        raise ValueError(parts["json"]["unreadable"])
    return parse_sample(json)


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

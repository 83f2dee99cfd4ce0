"""The index of a shard: where every payload lies, how long it is, and what must be known to plan with it.

A sample is `KEY.json` with its parts `KEY.img0.png`, `KEY.aud0.wav`, .. in a WebDataset tar. The json says
how they follow each other:

    {"segments": [{"vision": "img0.png"}, {"text": "sees "}, {"text": "3", "depends": "vision"}]}

A segment is text (optionally "loss": false, and "depends": the module that its tokens depend on), or an item
of a module. The index is made once a shard and kept beside it, with what made it: it is made anew for another
format, another probe or another shard. Text stays in the tar, its length is indexed.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import braceexpand

from mm.data.probes import known, metadata
from mm.data.probes import register_probe as register_probe  # where users look for it
from mm.data.tar import BLOCK, File, Loss, read_contents, split_name
from mm.errors import DataError

VERSION = 2


@dataclass(frozen=True)
class Part:
    """One payload: its shard, place and sha256, and its metadata (sizes; from a probe of its extension)."""

    shard: str
    name: str
    offset: int
    size: int
    sha256: str
    meta: Mapping[str, int]


@dataclass(frozen=True)
class Segment:
    """kind: "text" or a module. Text has text_bytes and no part, an item has a part and no text.

    written_bytes: of text that is cut to its first text_bytes, how many its json has.
    """

    kind: str
    text_bytes: int
    part: Part | None
    loss: bool
    depends: str | None
    written_bytes: int | None = None


@dataclass(frozen=True)
class Sample:
    """One training sequence; id counts over all shards of a data set in order. truncated: only its
    beginning is used, so that its end marker is not learned.
    """

    id: int
    key: str
    shard: str
    segments: tuple[Segment, ...]
    json: Part
    truncated: bool = False

    def items(self, module: str) -> tuple[Part, ...]:
        """The sample's items of a module, in order."""
        return tuple(s.part for s in self.segments if s.part is not None and s.kind == module)


@dataclass(frozen=True)
class Index:
    """The samples of a data set, and what could not even be indexed: (shard, key, why); the key is "" where
    nobody knows whose it was.

    shards: in order, those without a sample too. torn: those that end before their end mark. ignored: by
    shard, files whose names make no sample. skipped: by id, samples left out by config: (kind, why).
    """

    samples: tuple[Sample, ...]
    broken: tuple[tuple[str, str, str], ...]
    shards: tuple[str, ...] = ()
    torn: tuple[str, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def usable(self) -> list[Sample]:
        """The samples that are not left out."""
        return [s for s in self.samples if s.id not in self.skipped]

    @cached_property
    def digest(self) -> str:
        """A fingerprint of what the samples are, wherever their shards lie."""
        h = hashlib.sha256()
        for sample in self.samples:
            h.update(f"{sample.key} {sample.json.sha256}\n".encode())
        return h.hexdigest()[:16]


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies: beside it."""
    return shard.with_name(shard.name + ".index.json")


def build_index(shard: Path) -> dict[str, Any]:
    """Read a shard once and return its index as JSON: what is whole, and a note on each loss ("broken").

    Raises DataError for a compressed file.
    """
    was = shard.stat()  # before it is read: one that is written meanwhile is indexed again
    found = read_contents(shard)
    parts: dict[str, dict[str, dict[str, Any]]] = {}
    ignored = 0
    with shard.open("rb") as tar:
        for file in found.files:
            place = split_name(file.name)
            if place is None:
                ignored += 1
                continue
            key, name = place
            entry = _part_entry(tar.fileno(), file, name)
            if name in parts.setdefault(key, {}):
                entry["unreadable"] = f"{name} is there twice"
            parts[key][name] = entry
    broken, samples = [_loss(loss, parts) for loss in found.lost], []
    for key, entries in parts.items():
        try:
            samples.append({"key": key, "segments": _segments(entries), "parts": entries})
        except ValueError as error:
            broken.append([key, str(error)])
        for entry in entries.values():
            entry.pop("payload", None)
    extensions = sorted({_extension(name) for entries in parts.values() for name in entries})
    index = {
        "version": VERSION,
        "bytes": was.st_size,
        "mtime_ns": was.st_mtime_ns,
        "probes": {e: known(e) for e in extensions},
        "samples": samples,
        "broken": broken,
        "torn": found.torn,
        "ignored": ignored,
    }
    return {**index, "headers": _headers(shard, index)}


def _loss(loss: Loss, keys: Collection[str]) -> list[str]:
    """[key, why] of what a shard with these keys has lost; a name that is damaged may be nobody's."""
    place = split_name(loss.name)
    key = loss.name if place is None else place[0]
    if loss.sure or key in keys:
        return [key, f"{loss.name}: {loss.why}" if loss.name else loss.why]
    return ["", f"{loss.why} (its name reads {loss.name!r})"]


def _headers(shard: Path, index: Mapping[str, Any]) -> str:
    """A fingerprint of the headers of all parts of an index, as the shard has them now."""
    h = hashlib.sha256()
    with shard.open("rb") as tar:
        for sample in index["samples"]:
            for part in sample["parts"].values():
                h.update(os.pread(tar.fileno(), BLOCK, part["offset"] - BLOCK))
    return h.hexdigest()


def _part_entry(tar: int, file: File, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"offset": file.offset, "size": file.size, "sha256": "", "meta": {}}
    try:
        payload = os.pread(tar, file.size, file.offset)
        if len(payload) < file.size:
            raise OSError(f"{len(payload)} of {file.size} bytes were read")
    except OSError as error:
        return {**entry, "unreadable": f"{name} cannot be read: {error}"}
    entry["sha256"] = hashlib.sha256(payload).hexdigest()
    if name == "json":
        entry["payload"] = payload
    try:
        entry["meta"] = metadata(_extension(name), payload)
    except Exception as error:  # whatever a decoder raises, the part is unusable and named
        entry["unreadable"] = f"{name}: {error}"
    return entry


def _segments(parts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    if "json" not in parts:
        raise ValueError("it has no json part")
    if "unreadable" in parts["json"]:
        raise ValueError(parts["json"]["unreadable"])
    out = []
    for seg in parse_segments(parts["json"]["payload"]):
        if seg.text is None:
            if seg.name not in parts:
                raise ValueError(f"its json names {seg.name!r}, which the shard does not hold")
            if "unreadable" in parts[seg.name]:
                raise ValueError(parts[seg.name]["unreadable"])
            out.append({"kind": seg.kind, "part": seg.name})
        else:
            entry: dict[str, Any] = {"kind": "text", "bytes": len(seg.text.encode())}
            if not seg.loss:
                entry["loss"] = False
            if seg.depends is not None:
                entry["depends"] = seg.depends
            out.append(entry)
    return out


@dataclass(frozen=True)
class WrittenSegment:
    """A segment as the json has it: text, or the name of a part of module `kind`."""

    kind: str
    text: str | None
    name: str
    loss: bool
    depends: str | None


def parse_segments(payload: bytes) -> list[WrittenSegment]:
    """The segments of a sample's json; ValueError says what is wrong with it."""
    try:
        written = json.loads(payload)["segments"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"its json has no list of segments ({error})") from error
    if not isinstance(written, list):
        raise ValueError(f"its json has no list of segments (they are {written!r:.80})")
    out = []
    for i, seg in enumerate(written):
        kinds = list(seg) if isinstance(seg, dict) else []
        if len(kinds) > 1:  # a module of its own may be called loss or depends
            kinds = [k for k in kinds if k not in ("loss", "depends")]
        if len(kinds) != 1 or not isinstance(seg[kinds[0]], str):
            raise ValueError(f"segment {i} is {seg!r}; needed: one of text or a module, with a string")
        kind = kinds[0]
        is_text = kind == "text"
        marks = {k: v for k, v in seg.items() if k != kind}
        loss, depends = marks.get("loss", True), marks.get("depends")
        if not isinstance(loss, bool) or not isinstance(depends, str | None):
            needed = "loss true or false, depends the name of a module"
            raise ValueError(f"segment {i} has loss {loss!r}, depends {depends!r}; needed: {needed}")
        out.append(
            WrittenSegment(kind, seg[kind] if is_text else None, "" if is_text else seg[kind], loss, depends)
        )
    return out


def stored_index(shard: Path) -> dict[str, Any] | None:
    """The index beside a shard; None where it is missing, damaged, or of another shard, format or probe."""
    try:
        index = json.loads(index_path(shard).read_text())
        claimed = index.pop("sha256")
        return index if claimed == _sum(index) and _is_of(index, shard) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _sum(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, separators=(",", ":")).encode()).hexdigest()


def _is_of(index: Mapping[str, Any], shard: Path) -> bool:
    """Whether an index is what would be made now.

    A copy of a shard has another time. It is the same one where all headers are; a payload that is not shows
    when it is read. A probe that is not registered here is believed.
    """
    now = shard.stat()
    if index["version"] != VERSION or index["bytes"] != now.st_size:
        return False
    if any(known(e) not in (None, made) for e, made in index["probes"].items()):
        return False
    if index["mtime_ns"] == now.st_mtime_ns:
        return True
    return not index["broken"] and index["headers"] == _headers(shard, index)


def read_or_build(shard: Path, *, write: bool = True) -> dict[str, Any]:
    """The index of a shard, made anew where stored_index() has none; write: keep it beside the shard."""
    index = stored_index(shard)
    if index is not None:
        return index
    index = build_index(shard)
    if not write or not index["samples"]:
        return index  # perhaps not a shard at all: nothing is left beside it
    # Several ranks may do this at once, on several machines; the rename is atomic.
    path = index_path(shard)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        partial.write_text(json.dumps({**index, "sha256": _sum(index)}, separators=(",", ":")))
        os.replace(partial, path)
    except OSError:  # a read-only data set still trains; it is indexed at each start
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return index


def find_shards(patterns: Sequence[str], base: Path, made_by: str | None = None) -> list[Path]:
    """Shards that globs and brace patterns (relative to base) name; DataError where one names none.

    made_by: the command that makes them, for the error.
    """
    out: list[Path] = []
    for pattern in patterns:
        found = [
            Path(p) for one in braceexpand.braceexpand(pattern) for p in sorted(glob.glob(str(base / one)))
        ]
        if not found:
            folder = (base / pattern).parent
            have = sorted(p.name for p in folder.glob("*.tar")) if folder.is_dir() else None
            there = (
                "the folder does not exist" if have is None else f"it has {', '.join(have[:5]) or 'no tar'}"
            )
            hint = "" if made_by is None else f"; this makes it: {made_by}"
            raise DataError(f"no shard matches {pattern!r} in {folder}: {there}{hint}")
        out += found
    return out


def load_index(
    patterns: Sequence[str], base: Path, *, made_by: str | None = None, write: bool = True
) -> Index:
    """The data set that the patterns name; write: keep the indexes of its shards beside them; made_by as in
    find_shards. Raises DataError where there is no sample at all."""
    samples: list[Sample] = []
    broken: list[tuple[str, str, str]] = []
    shards, torn, ignored = [], [], {}
    for path in find_shards(patterns, base, made_by):
        shard, raw = str(path), read_or_build(path, write=write)
        shards.append(shard)
        torn += [shard] if raw["torn"] else []
        ignored[shard] = raw["ignored"]
        broken += [(shard, key, why) for key, why in raw["broken"]]
        samples += [_sample(len(samples) + k, shard, entry) for k, entry in enumerate(raw["samples"])]
    if not samples:
        why = "; ".join(f"{key or 'all'} of {shard}: {what}" for shard, key, what in broken[:3])
        raise DataError(f"no usable sample in {', '.join(patterns)}: {why or 'the shards are empty'}")
    return Index(tuple(samples), tuple(broken), tuple(shards), tuple(torn), ignored)


def _sample(number: int, shard: str, entry: Mapping[str, Any]) -> Sample:
    """A sample from its entry in the index of a shard."""
    parts = {
        name: Part(shard, name, p["offset"], p["size"], p["sha256"], p["meta"])
        for name, p in entry["parts"].items()
    }
    segments = tuple(
        Segment(
            s["kind"],
            s.get("bytes", 0),
            parts[s["part"]] if "part" in s else None,
            s.get("loss", True),
            s.get("depends"),
        )
        for s in entry["segments"]
    )
    return Sample(number, entry["key"], shard, segments, parts["json"])

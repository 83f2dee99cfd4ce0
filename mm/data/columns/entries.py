"""What a scan has found of shards, as columns, and a tokenizer's lengths of their texts.

An index has all of a shard. Its lines are samples that can be used as they are, in order, with segments whose
texts are measured in bytes. A table of texts has lines and segments alone, in tokens of a tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mm.data.columns.table import NO_CODE, Array, Spec, Strings, Table
from mm.data.layouts.find import AUTO
from mm.data.scan import VERSION, SegmentEntry, ShardIndex

TEXT = NO_CODE  # the kind of a segment that is no item
SEGMENTS = "segments"  # the layout of samples that say none
JSON = "json"  # the text part of samples that say none
SHA = ("u1", (32,))


def _dtype(fields: Mapping[str, Any]) -> np.dtype[Any]:
    # Packed: padding would have any content, and files of equal rows would differ.
    return np.dtype(
        [(name, *kind) if isinstance(kind, tuple) else (name, kind) for name, kind in fields.items()]
    )


# Numbers of rows count within the shard.
SAMPLE = _dtype(
    {
        "key": "u4",  # first byte of its key, and how many
        "key_bytes": "u4",
        "part": "u4",  # first of its parts, and how many
        "parts": "u4",
        "text": "u4",  # which of its parts has its text
        "layout": "i4",  # how that is written: code of a name
        "chat": "?",
    }
)
PART = _dtype({"offset": "i8", "size": "i8", "sha256": SHA, "known": "?", "name": "i4", "meta": "i4"})
LINE = _dtype({"sample": "u4", "segment": "u4", "segments": "u4"})
SEGMENT = _dtype(
    {
        "kind": "i4",  # TEXT, or code of its module's name
        "part": "u4",  # of an item: which of its sample's parts
        "tokens": "u4",  # of text
        "depends": "i4",  # code of a module's name, or NO_CODE
        "loss": "?",
    }
)
BYTE = np.dtype("u1")
INDEX = Spec(
    f"polyrank index {VERSION}",
    {
        "shards": _dtype(
            {
                "bytes": "i8",  # size of the shard
                "stamp": "i8",  # when it was last changed, as it was before the scan
                "headers": SHA,  # sha256 over the tar headers of all parts
                "sum": SHA,  # of what tables of texts stand on
                "ignored": "i8",  # files whose names make no sample
                "layout": "i4",  # key of the layout that was asked for: code
                "probes": "i4",  # by extension the identity of its probe, as JSON: code
                "torn": "?",  # it ends before its end mark
            }
        ),
        "path": BYTE,
        "notes": BYTE,  # [key, why] of each loss, as JSON
        "samples": SAMPLE,
        "keys": BYTE,
        "parts": PART,
        "lines": LINE,
        "segments": SEGMENT,
    },
    {
        ("shards", "layout"): "names",
        ("shards", "probes"): "probes",
        ("samples", "layout"): "names",
        ("parts", "name"): "names",
        ("parts", "meta"): "metas",
        ("segments", "kind"): "names",
        ("segments", "depends"): "names",
    },
)
TEXTS = Spec(
    f"polyrank texts {VERSION}",
    {
        "shards": _dtype({"of": SHA}),  # sum of the shard's index
        "path": BYTE,
        "notes": BYTE,  # [key, why] of samples that cannot be encoded, as JSON
        "lines": LINE,
        "segments": SEGMENT,
    },
    {("segments", "kind"): "names", ("segments", "depends"): "names"},
)


class _Codes:
    """Codes of strings, in order of first occurrence."""

    def __init__(self) -> None:
        self.known: dict[bytes, int] = {}

    def of(self, text: str) -> int:
        return self.known.setdefault(text.encode("utf-8", "surrogatepass"), len(self.known))

    @property
    def strings(self) -> Strings:
        return Strings.of(list(self.known))


class _Rows:
    """Rows of one column, by shard."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype, self.rows, self.sizes = dtype, list[Any](), list[int]()

    def add(self, rows: Sequence[Any] | bytes) -> None:
        self.rows.append(
            np.frombuffer(rows, dtype=BYTE)
            if isinstance(rows, bytes)
            else np.array(list(rows), dtype=self.dtype)
        )
        self.sizes.append(len(rows))

    @property
    def column(self) -> Array:
        return np.concatenate([np.empty(0, self.dtype), *self.rows])

    @property
    def first(self) -> Array:
        return np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)


def index_columns(found: Sequence[tuple[str, ShardIndex]]) -> Table:
    """The index of shards, by name: what a scan has found of each."""
    rows = {name: _Rows(dtype) for name, dtype in INDEX.columns.items()}
    codes = {name: _Codes() for name in INDEX.dictionaries}
    for path, index in found:
        _add_shard(rows, codes, index)
        rows["path"].add(path.encode("utf-8", "surrogateescape"))
    return _table(INDEX, rows, codes, {})


def _table(
    spec: Spec, rows: Mapping[str, _Rows], codes: Mapping[str, _Codes], header: Mapping[str, Any]
) -> Table:
    return Table(
        spec,
        {name: r.column for name, r in rows.items()},
        {name: r.first for name, r in rows.items()},
        {name: c.strings for name, c in codes.items()},
        header,
    )


def _add_shard(rows: Mapping[str, _Rows], codes: Mapping[str, _Codes], index: ShardIndex) -> None:
    names, metas = codes["names"], codes["metas"]
    samples, parts, keys = list[tuple[int, ...]](), list[tuple[Any, ...]](), list[bytes]()
    at = 0
    for sample in index["samples"]:
        key = sample["key"].encode("utf-8", "surrogatepass")
        places = list(sample["parts"])
        samples.append(
            (
                *(at, len(key), len(parts), len(places), places.index(sample.get("text", JSON))),
                *(names.of(sample.get("layout", SEGMENTS)), sample.get("chat", False)),
            )
        )
        for name, part in sample["parts"].items():
            sha = _sha(bytes.fromhex(part["sha256"] or "00" * 32))
            meta = metas.of(json.dumps(part["meta"], separators=(",", ":")))
            parts.append((part["offset"], part["size"], sha, bool(part["sha256"]), names.of(name), meta))
        keys.append(key)
        at += len(key)
    probes = codes["probes"].of(json.dumps(index["probes"], separators=(",", ":"), sort_keys=True))
    headers = bytes.fromhex(index["headers"])
    said = [
        (s["key"], s.get("text"), s.get("layout"), *(p["sha256"] for p in s["parts"].values()))
        for s in index["samples"]
    ]
    of = hashlib.sha256(headers + repr(said).encode("utf-8", "surrogatepass")).digest()
    rows["shards"].add(
        [
            (
                *(index["bytes"], index["mtime_ns"], _sha(headers), _sha(of)),
                *(index["ignored"], names.of(index.get("layout", AUTO)), probes, index["torn"]),
            )
        ]
    )
    rows["notes"].add(_notes(index["broken"]))
    rows["samples"].add(samples)
    rows["keys"].add(b"".join(keys))
    rows["parts"].add(parts)
    usable = [None if s.get("chat") else s["segments"] for s in index["samples"]]
    _add_lines(rows, names, [list(s["parts"]) for s in index["samples"]], usable)


def _sha(digest: bytes) -> Array:
    return np.frombuffer(digest, dtype=BYTE)


def _notes(broken: Sequence[Sequence[str]]) -> bytes:
    return json.dumps([list(b) for b in broken], separators=(",", ":")).encode() if broken else b""


def _add_lines(
    rows: Mapping[str, _Rows],
    names: _Codes,
    parts: Sequence[Sequence[str]],
    segments: Sequence[Sequence[SegmentEntry] | None],
) -> None:
    """Append a line for each sample that has segments. parts: by sample, their names."""
    lines, found = list[tuple[int, ...]](), list[tuple[int, ...]]()
    for k, (here, own) in enumerate(zip(parts, segments, strict=True)):
        if own is None:
            continue
        lines.append((k, len(found), len(own)))
        places = {name: n for n, name in enumerate(here)}
        for seg in own:
            depends = names.of(seg["depends"]) if "depends" in seg else NO_CODE
            item = "part" in seg
            found.append(
                (
                    *(names.of(seg["kind"]) if item else TEXT, places[seg["part"]] if item else 0),
                    *(seg.get("tokens", seg.get("bytes", 0)), depends, seg.get("loss", True)),
                )
            )
    rows["lines"].add(lines)
    rows["segments"].add(found)


class Listed(NamedTuple):
    """A sample of an index, as far as its text is encoded from it."""

    key: str
    parts: list[str]  # names, in order
    text: str  # name of its text part
    layout: str  # how that is written
    offset: int  # of its text part
    size: int


def listed(table: Table, shard: int) -> list[Listed]:
    """The samples of a shard's index."""
    keys, parts = table.rows("keys", shard).tobytes(), table.rows("parts", shard)
    names = [name.decode("utf-8", "surrogatepass") for name in table.strings["names"]]
    out = []
    for s in table.rows("samples", shard).tolist():
        at, size, first, count, text, layout, _ = s
        own = parts[first : first + count]
        key = keys[at : at + size].decode("utf-8", "surrogatepass")
        offset, length = int(own["offset"][text]), int(own["size"][text])
        parts_here = [names[n] for n in own["name"].tolist()]
        out.append(Listed(key, parts_here, parts_here[text], names[layout], offset, length))
    return out


def text_columns(
    found: Sequence[tuple[str, bytes, Sequence[Listed], Sequence[list[SegmentEntry] | str]]], tokenizer: str
) -> Table:
    """Lines and segments in tokens. found: by shard its name, the sum of its index, its samples, and of each
    its segments or why it has none. tokenizer: its key."""
    rows = {name: _Rows(dtype) for name, dtype in TEXTS.columns.items()}
    codes = {name: _Codes() for name in TEXTS.dictionaries}
    for path, of, samples, segments in found:
        rows["shards"].add([(_sha(of),)])
        rows["path"].add(path.encode("utf-8", "surrogateescape"))
        wrong = [[s.key, own] for s, own in zip(samples, segments, strict=True) if isinstance(own, str)]
        rows["notes"].add(_notes(wrong))
        usable = [None if isinstance(s, str) else s for s in segments]
        _add_lines(rows, codes["names"], [s.parts for s in samples], usable)
    return _table(TEXTS, rows, codes, {"tokenizer": tokenizer})


def notes_of(table: Table, shard: int) -> list[list[str]]:
    """[key, why] of what a shard has lost."""
    text = table.rows("notes", shard).tobytes()
    return [] if not text else [[str(key), str(why)] for key, why in json.loads(text)]

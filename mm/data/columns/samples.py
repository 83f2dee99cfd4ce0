"""The samples of a data set as a sequence of views: each is made from columns when it is asked for."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mm.data.columns.entries import TEXT
from mm.data.columns.file import forget_pages
from mm.data.columns.table import NO_CODE, Array, Numbers, Strings, Table
from mm.data.remote.urls import public
from mm.data.sample import Part, Sample, Segment, ShardSums, Views

LARGE = 64 << 20  # bytes of a table, or of what lies between rows, whose pages are given back
# Rows that lie apart, and views, until pages are given back: each maps what the page cache has as one piece.
MOST_APART, MOST_VIEWS = 256, 64


class Shard(NamedTuple):
    """A shard of a data set. table, texts: what has its samples and what has their segments, and as which
    shard it is there."""

    path: str
    source: str
    table: tuple[Table, int]
    texts: tuple[Table, int]


class Names:
    """Strings of several tables under codes of their own, each once."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self.texts: list[str] = []

    def code(self, text: str) -> int:
        """The code of a string, a new one where it is new."""
        if text not in self._known:
            self._known[text] = len(self.texts)
            self.texts.append(text)
        return self._known[text]

    def codes(self, strings: Strings) -> Numbers:
        """By code of a table, the code here; the last is for NO_CODE."""
        found = [self.code(s.decode("utf-8", "surrogatepass")) for s in strings]
        return np.asarray([*found, NO_CODE], dtype=np.int64)


class Pair(NamedTuple):
    """Tables that some shards have their samples and segments in, and what their codes are in the data set.

    names, modules: of the table and of the texts. metas: added to codes of metadata.
    """

    table: Table
    texts: Table
    names: Numbers
    modules: Numbers
    metas: int


@dataclass(frozen=True, eq=False)
class Segments:
    """Segments of some samples, a line a segment, in order of sample.

    of: by sample, how many. kind: a name's code, or TEXT. tokens: of text, 0 for items. depends: a name's
    code or NO_CODE. loss: bool. meta: of items a code of Samples.meta, else NO_CODE. content: of items a
    number, equal where payloads are; 0 for text. bytes: of an item's payload, 0 for text. markers: by sample,
    bool. source: by sample, the code of its source.
    """

    of: Numbers
    kind: Numbers
    tokens: Numbers
    depends: Numbers
    loss: Array
    meta: Numbers
    content: Numbers
    bytes: Numbers
    markers: Array
    source: Numbers


class Samples(Views):
    """The samples of shards, in order. A sample is a view; equal ones are equal, but not the same object."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        sizes = [int(np.diff(t.first["lines"][n : n + 2])[0]) for _, _, _, (t, n) in self.shards]
        self.first: Numbers = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        """By shard the number of its first sample, and how many samples there are."""
        self.names = Names()
        self.pairs, self._pair_of = self._pairs()
        self.sources = tuple(sorted({s.source for s in self.shards}))
        """The names of all sources, in alphabetical order."""
        codes = {name: k for k, name in enumerate(self.sources)}
        self._source_of = np.asarray([codes[s.source] for s in self.shards], dtype=np.int64)
        self._bases = {
            (kind, column): np.asarray([t.first[column][n] for t, n in tables], dtype=np.int64)
            for kind, tables, columns in (
                ("table", [s.table for s in self.shards], ("samples", "keys", "parts")),
                ("texts", [s.texts for s in self.shards], ("lines", "segments")),
            )
            for column in columns
        }
        self._metas: dict[int, Mapping[str, int]] = {}
        self._views = 0

    def _pairs(self) -> tuple[list[Pair], Numbers]:
        known: dict[tuple[int, int], int] = {}
        pairs, of, metas = list[Pair](), [], 0
        for shard in self.shards:
            (table, _), (texts, _) = shard.table, shard.texts
            key = id(table), id(texts)
            if key not in known:
                known[key] = len(pairs)
                names = self.names.codes(table.strings["names"])
                modules = names if texts is table else self.names.codes(texts.strings["names"])
                pairs.append(Pair(table, texts, names, modules, metas))
                metas += len(table.strings["metas"])
            of.append(known[key])
        return pairs, np.asarray(of, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.first[-1])

    def shard_of(self, which: Numbers) -> Numbers:
        """By sample number, the number of its shard."""
        found: Numbers = np.searchsorted(self.first, which, side="right") - 1
        return found

    def meta(self, code: int) -> Mapping[str, int]:
        """The metadata under a code of Segments.meta."""
        if code not in self._metas:
            pair = next(p for p in reversed(self.pairs) if p.metas <= code)
            self._metas[code] = json.loads(pair.table.strings["metas"][code - pair.metas])
        return self._metas[code]

    def rows(self, which: Numbers, column: str, field: str | None = None) -> Array:
        """By sample number, its row of "lines" or "samples", or one field of it."""
        shard = self.shard_of(which)
        line = which - self.first[shard] + self._bases["texts", "lines"][shard]
        lines = self._of_pairs(shard, line, "texts", "lines")
        if column == "lines":
            found = lines
        else:
            row = lines["sample"] + self._bases["table", "samples"][shard]
            found = self._of_pairs(shard, row, "table", "samples")
        return found if field is None else found[field]

    def _of_pairs(self, shard: Numbers, row: Numbers, kind: str, column: str) -> Array:
        """Rows of a column that several tables may have parts of."""
        tables: list[Table] = [getattr(p, kind) for p in self.pairs]
        if len(tables) == 1:
            return _gathered(tables[0], column, row)
        out = np.empty(len(row), tables[0].columns[column].dtype)
        of = self._pair_of[shard]
        for k, table in enumerate(tables):
            here = of == k
            out[here] = _gathered(table, column, row[here])
        return out

    def segments(self, which: Numbers) -> Segments:
        """The segments of samples with these numbers, in this order. O(segments), without a loop."""
        shard = self.shard_of(which)
        lines, samples = self.rows(which, "lines"), self.rows(which, "samples")
        of = lines["segments"].astype(np.int64)
        found, sample = self._segment_rows(shard, lines)
        of_shard = shard[sample]
        kind, depends = found["kind"].astype(np.int64), found["depends"].astype(np.int64)
        item = np.flatnonzero(kind != TEXT)
        owner = sample[item]
        part = found["part"][item] + samples["part"][owner] + self._bases["table", "parts"][shard[owner]]
        parts = self._of_pairs(shard[owner], part, "table", "parts")
        meta, content = np.full(len(kind), NO_CODE, dtype=np.int64), np.zeros(len(kind), dtype=np.int64)
        meta[item] = parts["meta"] + np.asarray([p.metas for p in self.pairs])[self._pair_of[shard[owner]]]
        content[item] = np.ascontiguousarray(parts["sha256"][:, :8]).view(np.int64)[:, 0]
        size = np.zeros(len(kind), dtype=np.int64)
        size[item] = parts["size"]
        pair = self._pair_of[of_shard]
        for k, p in enumerate(self.pairs):
            here = slice(None) if len(self.pairs) == 1 else pair == k
            kind[here], depends[here] = p.modules[kind[here]], p.modules[depends[here]]
        return Segments(
            of=of,
            kind=kind,
            tokens=found["tokens"].astype(np.int64),
            depends=depends,
            loss=found["loss"],
            meta=meta,
            content=content,
            bytes=size,
            markers=~samples["chat"],
            source=self._source_of[shard],
        )

    def fingerprints(self, first: int, stop: int) -> Iterator[bytes]:
        """The lines "key sha256\\n" of samples first .. stop - 1, those of a shard together: of their text
        parts."""
        for (table, n), rows in self._rows_by_shard(first, stop):
            own = table.rows("parts", n)[rows["part"].astype(np.int64) + rows["text"]]
            sums = [
                sha.hex() if known else "" for sha, known in zip(_bytes_of(own), own["known"], strict=True)
            ]
            keys = _keys_of(table, n, rows)
            yield b"".join(key + f" {sha}\n".encode() for key, sha in zip(keys, sums, strict=True))
            forget_pages(table)

    @cached_property
    def shard_sums(self) -> tuple[ShardSums, ...]:
        """By shard, digests of its samples. O(parts), once."""
        sizes = np.diff(self.first).tolist()
        filled = zip(self._rows_by_shard(0, len(self)), self.fingerprints(0, len(self)), strict=True)
        found = []
        for shard, size in zip(self.shards, sizes, strict=True):
            texts, parts = b"", b""
            if size:
                ((table, n), rows), texts = next(filled)
                used = _parts_of(table, n, rows)[0]
                # Each by itself: a view of two columns keeps the bytes between them, codes of this one table.
                parts = used["sha256"].tobytes() + used["size"].tobytes()
            name = public(shard.path).rpartition("/")[2]
            found.append(ShardSums(name, size, *(hashlib.sha256(x).hexdigest()[:16] for x in (texts, parts))))
        return tuple(found)

    def sums(self, number: int) -> Array:
        """By sample of a shard, four bytes of its key and of all its parts in their order: uint32."""
        (table, n), (texts, m) = self.shards[number].table, self.shards[number].texts
        rows = table.rows("samples", n)[texts.rows("lines", m)["sample"]]
        keys = np.asarray([zlib.crc32(key) for key in _keys_of(table, n, rows)], dtype=np.uint32)
        used, nth = _parts_of(table, n, rows)
        # Of parts that have the same content, and change places, the sum changes too.
        part = np.ascontiguousarray(used["sha256"][:, :4]).view("<u4")[:, 0] + used["size"].astype(np.uint32)
        part = (part * (2 * nth.astype(np.uint32) + 1)) * np.uint32(2654435761)
        of = np.repeat(np.arange(len(rows)), rows["parts"])
        np.add.at(keys, of, part)
        forget_pages(table)
        return keys

    def keys(self, first: int, stop: int) -> Iterator[bytes]:
        """The keys of samples first .. stop - 1 in UTF-8, without views."""
        for (table, n), rows in self._rows_by_shard(first, stop):
            yield from _keys_of(table, n, rows)
            forget_pages(table)

    def _rows_by_shard(self, first: int, stop: int) -> Iterator[tuple[tuple[Table, int], Array]]:
        """Rows of samples first .. stop - 1, those of a shard together, and where they are."""
        for shard, (begin, end) in zip(self.shards, pairwise(self.first.tolist()), strict=True):
            if max(first, begin) < min(stop, end):
                (table, n), (texts, m) = shard.table, shard.texts
                lines = texts.rows("lines", m)[max(first - begin, 0) : stop - begin]
                yield (table, n), table.rows("samples", n)[lines["sample"]]

    def _viewed(self, count: int) -> None:
        """Give pages back now and then: a process that looks here and there would hold the whole index."""
        self._views += count
        if self._views > MOST_VIEWS:
            self._views = 0
            tables = {id(t): t for p in self.pairs for t in (p.table, p.texts)}
            for table in (t for t in tables.values() if t.nbytes >= LARGE):
                forget_pages(table)

    def views(self, numbers: Sequence[int]) -> list[Sample]:
        """These samples as objects. Columns are gathered for all of them at once."""
        self._viewed(len(numbers))
        which = np.asarray(numbers, dtype=np.int64)
        shard, rows = self.shard_of(which), self.rows(which, "samples")
        found, sample = self._segment_rows(shard, self.rows(which, "lines"))
        item = np.flatnonzero(found["kind"] != TEXT)
        # The part of each item, and then the text part of each sample.
        at = np.concatenate([found["part"][item], rows["text"]])
        owner = np.concatenate([sample[item], np.arange(len(which))])
        parts = iter(self._parts(shard[owner], at + rows["part"][owner]))
        segments: list[list[Segment]] = [[] for _ in numbers]
        pairs = [self.pairs[k] for k in self._pair_of[shard].tolist()]
        for n, row in zip(sample.tolist(), found.tolist(), strict=True):
            segments[n].append(self._segment(pairs[n], parts, *row))
        first = self._bases["table", "keys"][shard].tolist()
        out = []
        for n, (key, size, _, _, _, layout, chat) in enumerate(rows.tolist()):
            own, pair, segs, begin = self.shards[int(shard[n])], pairs[n], tuple(segments[n]), first[n] + key
            name = pair.table.columns["keys"][begin : begin + size].tobytes()
            out.append(
                Sample(
                    id=int(which[n]),
                    key=name.decode("utf-8", "surrogatepass"),
                    shard=own.path,
                    segments=segs,
                    json=next(parts),
                    markers=not chat,
                    source=own.source,
                    layout=self._name(pair.names, layout),
                    names=tuple(dict.fromkeys(s.part.name for s in segs if s.part is not None)),
                )
            )
        return out

    def _segment_rows(self, shard: Numbers, lines: Array) -> tuple[Array, Numbers]:
        """Rows of the segments of samples with these lines, in order of sample, and by segment its sample."""
        of = lines["segments"].astype(np.int64)
        sample = np.repeat(np.arange(len(lines)), of)
        nth = np.arange(len(sample)) - np.repeat(np.cumsum(of) - of, of)
        row = lines["segment"][sample] + nth + self._bases["texts", "segments"][shard[sample]]
        return self._of_pairs(shard[sample], row, "texts", "segments"), sample

    def _name(self, codes: Numbers, code: int) -> str:
        return self.names.texts[int(codes[code])]

    def _segment(
        self, pair: Pair, parts: Iterator[Part], kind: int, part: int, tokens: int, depends: int, loss: bool
    ) -> Segment:
        """parts: gives the part of an item."""
        return Segment(
            kind="text" if kind == TEXT else self._name(pair.modules, kind),
            tokens=tokens,
            part=None if kind == TEXT else next(parts),
            loss=loss,
            depends=None if depends == NO_CODE else self._name(pair.modules, depends),
        )

    def _parts(self, shard: Numbers, part: Numbers) -> list[Part]:
        """The parts with these numbers in their shards."""
        rows = self._of_pairs(shard, part + self._bases["table", "parts"][shard], "table", "parts")
        columns = (rows[name].tolist() for name in ("offset", "size", "known", "name", "meta"))
        out = []
        for n, sha, offset, size, known, name, meta in zip(
            shard.tolist(), _bytes_of(rows), *columns, strict=True
        ):
            pair, digest = self.pairs[int(self._pair_of[n])], sha.hex() if known else ""
            path, called = self.shards[n].path, self._name(pair.names, name)
            out.append(Part(path, called, offset, size, digest, self.meta(pair.metas + meta)))
        return out


def _parts_of(table: Table, shard: int, rows: Array) -> tuple[Array, Numbers]:
    """The parts of rows of samples of a shard, in order, and which of its sample's each is."""
    of = rows["parts"].astype(np.int64)
    nth = np.arange(of.sum()) - np.repeat(np.cumsum(of) - of, of)
    return table.rows("parts", shard)[np.repeat(rows["part"].astype(np.int64), of) + nth], nth


def _keys_of(table: Table, shard: int, rows: Array) -> list[bytes]:
    """The keys of rows of samples of a shard."""
    keys = table.rows("keys", shard).tobytes()
    return [
        keys[a : a + size] for a, size in zip(rows["key"].tolist(), rows["key_bytes"].tolist(), strict=True)
    ]


def _bytes_of(parts: Array) -> list[bytes]:
    """The sums of parts."""
    data = np.ascontiguousarray(parts["sha256"]).tobytes()
    return [data[a : a + 32] for a in range(0, len(data), 32)]


def _gathered(table: Table, column: str, row: Numbers) -> Array:
    """Rows of a column. Of a large table the pages are given back meanwhile. O(rows)."""
    source = table.columns[column]
    if table.nbytes < LARGE or not len(row) or int(np.ptp(row)) * source.itemsize < LARGE:
        found: Array = source[row]
        return found
    out = np.empty(len(row), source.dtype)
    for at in range(0, len(row), MOST_APART):
        out[at : at + MOST_APART] = source[row[at : at + MOST_APART]]
        forget_pages(table)
    return out

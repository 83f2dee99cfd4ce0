"""Columns by shard: each column has the rows of one shard after those of another, and strings are coded.

A table of several shards is their rows joined: rows refer to others by their number within the shard, so that
they stay as they are. Only codes of strings change, where dictionaries differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Array = NDArray[Any]
NO_CODE = -1


@dataclass(frozen=True, eq=False)
class Strings:
    """Distinct byte strings, end to end. data: uint8 [bytes]. ends: of each, int64 [strings]."""

    data: Array
    ends: Numbers

    @staticmethod
    def of(strings: Sequence[bytes]) -> Strings:
        """These strings, in this order."""
        ends = np.cumsum([len(s) for s in strings], dtype=np.int64)
        return Strings(np.frombuffer(b"".join(strings), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, code: int) -> bytes:
        begin = int(self.ends[code - 1]) if code else 0
        return self.data[begin : int(self.ends[code])].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        data, begin = self.data.tobytes(), 0
        for end in self.ends.tolist():
            yield data[begin:end]
            begin = end


@dataclass(frozen=True)
class Spec:
    """What a table has. columns: by name, the dtype of its rows. coded: fields of columns that hold codes, by
    (column, field) the dictionary. The column "shards" has one row a shard, "path" and "notes" its bytes."""

    name: str
    columns: Mapping[str, np.dtype[Any]]
    coded: Mapping[tuple[str, str], str]

    @property
    def dictionaries(self) -> list[str]:
        """Names of its dictionaries."""
        return sorted(set(self.coded.values()))


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of several shards.

    columns: by name. first: by name, the first row of each shard and the end, int64 [shards + 1]. strings:
    dictionaries by name. header: what holds for all of it.
    """

    spec: Spec
    columns: Mapping[str, Array]
    first: Mapping[str, Numbers]
    strings: Mapping[str, Strings]
    header: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many shards."""
        return len(self.columns["shards"])

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return sum(c.nbytes for c in self.columns.values())

    def rows(self, column: str, shard: int) -> Array:
        """The rows of one shard: a view."""
        first = self.first[column]
        return self.columns[column][int(first[shard]) : int(first[shard + 1])]

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """By shard, its name."""
        data, ends = self.columns["path"].tobytes(), self.first["path"].tolist()
        return tuple(data[a:b].decode("utf-8", "surrogateescape") for a, b in pairwise(ends))

    def take(self, shards: Sequence[int]) -> Table:
        """These shards alone, in this order. Dictionaries stay as they are. O(rows)."""
        columns, first = {}, {}
        for name, column in self.columns.items():
            at = self.first[name]
            sizes = (at[1:] - at[:-1])[list(shards)]
            columns[name] = np.concatenate([self.rows(name, s) for s in shards] or [column[:0]])
            first[name] = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return Table(self.spec, columns, first, self.strings, self.header)


def join(tables: Sequence[Table]) -> Table:
    """The shards of all tables, in order; their strings coded once. At least one table. O(rows)."""
    spec, header = tables[0].spec, tables[0].header
    strings: dict[str, Strings] = {}
    codes: dict[str, list[Numbers]] = {}
    for name in spec.dictionaries:
        strings[name], codes[name] = _united([t.strings[name] for t in tables])
    columns, first = {}, {}
    for name, dtype in spec.columns.items():
        rows = np.concatenate([t.columns[name] for t in tables]).astype(dtype, copy=False)
        at = 0
        for k, table in enumerate(tables):
            n = len(table.columns[name])
            for (column, of), dictionary in spec.coded.items():
                if column == name:
                    mine = codes[dictionary][k]
                    old = rows[of][at : at + n]
                    rows[of][at : at + n] = np.where(old == NO_CODE, NO_CODE, mine[old])
            at += n
        columns[name] = rows
        sizes = [np.diff(t.first[name]) for t in tables]
        first[name] = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
    return Table(spec, columns, first, strings, header)


def _united(all_of_them: Sequence[Strings]) -> tuple[Strings, list[Numbers]]:
    """One dictionary for several, in order of first occurrence, and the new codes of each one's.

    The last of the new codes is for NO_CODE, so that a dictionary may be empty.
    """
    known: dict[bytes, int] = {}
    made: dict[int, Numbers] = {}
    for strings in all_of_them:
        if id(strings) not in made:
            codes = [known.setdefault(s, len(known)) for s in strings]
            made[id(strings)] = np.asarray([*codes, NO_CODE], dtype=np.int64)
    return Strings.of(list(known)), [made[id(s)] for s in all_of_them]

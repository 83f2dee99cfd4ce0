"""Indexes of shards that have none, made by several processes at once.

Shards are indexed once: an index is kept beside them (mm/data/columns/store.py), and is believed as long as
the shard, the probes and the format are what they were.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mm.data.columns.entries import INDEX, index_columns
from mm.data.columns.store import Store, writing
from mm.data.columns.table import Table, join
from mm.data.forks import ALONE, in_forks, tasks_of
from mm.data.layouts.energon import layout_of_shard
from mm.data.layouts.find import AUTO, layout_key
from mm.data.probes import known
from mm.data.remote.urls import is_remote
from mm.data.scan import build_index, headers_digest
from mm.data.storage import LOCAL, Say, Storage, Version
from mm.errors import DataError

TELL_S = 5.0  # how often progress is shown
KEEP_S = 60.0  # how often what is done is written, so that a build that is ended goes on from there


class Kept(NamedTuple):
    """The index of a shard: a table, and as which shard it is there."""

    table: Table
    shard: int


def kept_indexes(
    shards: Sequence[str],
    layout: str = AUTO,
    *,
    write: bool = True,
    again: bool = False,
    storage: Storage = LOCAL,
) -> list[Kept]:
    """The index of each shard, scanned where none is kept; write: keep new ones beside the shards.

    layout: how samples are written, by name. again: scan all of them. storage: what reads them; it says
    what takes long, and which have changed since they were indexed. Raises DataError for a compressed file
    and for one that cannot be read.
    """
    found: dict[str, Kept] = {}
    for folder, own in by_folder(shards, storage).items():
        work = _Work(folder, own, _asked(layout, own), storage, storage.say)
        found |= _of_folder(work, write, again)
    return [found[shard] for shard in shards]


def current_indexes(shards: Sequence[str], layout: str = AUTO, storage: Storage = LOCAL) -> dict[str, Kept]:
    """By shard, the index that is kept beside it and holds for it now."""
    found: dict[str, Kept] = {}
    for folder, own in by_folder(shards, storage).items():
        found |= _current(_Work(folder, own, _asked(layout, own), storage, lambda text: None))
    return found


def _asked(layout: str, shards: Sequence[str]) -> str:
    """The layout of all shards of a folder; what else lies in a remote one is not looked at."""
    return layout if is_remote(shards[0]) else layout_of_shard(layout, Path(shards[0]))


def by_folder(shards: Sequence[str], storage: Storage) -> dict[Path, list[str]]:
    """Shards by the folder that files about them are in, each once."""
    out: dict[Path, list[str]] = defaultdict(list)
    for shard in dict.fromkeys(shards):
        out[storage.folder_of(shard)].append(shard)
    return out


class _Work(NamedTuple):
    """Shards of a folder, how their samples are written, what reads them, and who hears of them."""

    folder: Path
    shards: Sequence[str]
    layout: str
    storage: Storage
    say: Say

    @property
    def indexes(self) -> Store:
        """Where their indexes are kept."""
        return Store(self.folder, INDEX, "index", with_shards=not is_remote(self.shards[0]))


def _of_folder(work: _Work, write: bool, again: bool) -> dict[str, Kept]:
    silent = work._replace(say=lambda text: None)
    found = {} if again else _current(silent)
    if len(found) == len(work.shards):
        return found
    if not write:
        return found | _scanned(_without(work, found), lambda table: None)
    with writing(work.folder, work.say):
        # Another process may have made them while this one waited.
        found = {} if again else _current(work)
        return found | _scanned(_without(work, found), work.indexes.add)


def _without(work: _Work, found: Collection[str]) -> _Work:
    return work._replace(shards=[s for s in work.shards if s not in found])


def _current(work: _Work) -> dict[str, Kept]:
    """By shard, the index that is kept and holds for it now."""
    entries: dict[str, list[Kept]] = defaultdict(list)
    for table in work.indexes.tables().values():
        for k, name in enumerate(table.paths):
            entries[name].append(Kept(table, k))
    out, changed = {}, []
    current = _Current(layout_key(work.layout), work.storage)
    for shard in work.shards:
        own = entries.get(Path(shard).name, [])
        now = _version(shard, work.storage)
        kept = next((k for k in own if current.of(k, shard, now)), None)
        if kept is not None:
            out[shard] = kept
        else:
            changed += [shard] if own else []
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        work.say(f"changed since indexed, indexing again: {', '.join(changed[:3])}{more}")
    return out


def _version(shard: str, storage: Storage) -> Version:
    try:
        return storage.version_of(shard)
    except OSError as error:
        raise DataError(f"{shard} cannot be read: {error}") from error


class _Current:
    """Tells whether a scan of a shard would give an index now. layout: key of the one that is asked for."""

    def __init__(self, layout: str, storage: Storage) -> None:
        self._storage = storage
        self._layout, self._probes = layout, dict[tuple[int, int, int], bool]()

    def of(self, kept: Kept, shard: str, now: Version) -> bool:
        """Whether an index is that of a shard as it is now.

        A copy of a shard has another time: it counts as the same shard where all headers are equal. A payload
        that differs is found when it is read. Entries of a probe that is not registered here are accepted.
        """
        table, k = kept
        own = table.columns["shards"][k]
        if own["bytes"] != now.size or not self._made_alike(table, int(own["layout"]), int(own["probes"])):
            return False
        if own["stamp"] == now.stamp:
            return True
        if len(table.rows("notes", k)) or is_remote(shard):  # a store's version stands for the content
            return False
        headers: str = own["headers"].tobytes().hex()
        with self._storage.reading(shard) as file:
            return headers_digest(file, table.rows("parts", k)["offset"].tolist()) == headers

    def _made_alike(self, table: Table, layout: int, probes: int) -> bool:
        """Whether layout and probes are those of now; looked up once for all shards of a table."""
        key = id(table), layout, probes
        if key not in self._probes:
            made = json.loads(table.strings["probes"][probes])
            same = all(known(e) in (None, by) for e, by in made.items())
            self._probes[key] = same and table.strings["names"][layout] == self._layout.encode()
        return self._probes[key]


def _scanned(work: _Work, keep: Callable[[Table], object]) -> dict[str, Kept]:
    """Scan the shards of a folder. keep: is given what is to be kept of them, now and then."""
    shards = work.shards
    sizes = [_version(shard, work.storage).size for shard in shards]
    path_of = {Path(shard).name: shard for shard in shards}
    progress = Progress(work.say, sum(sizes), len(shards), "indexed")
    out: dict[str, Kept] = {}
    waiting: list[Table] = []
    since = time.monotonic()
    for table, size in _scans(shards, sizes, partial(_scan, work.layout, work.storage)):
        waiting.append(table)
        progress.add(table.count, size)
        if time.monotonic() - since > KEEP_S or len(out) + sum(t.count for t in waiting) == len(shards):
            made = join(waiting)
            out |= {path_of[name]: Kept(made, k) for k, name in enumerate(made.paths)}
            # A file without a sample may be no shard at all: nothing is left beside it.
            some = [k for k in range(made.count) if len(made.rows("samples", k))]
            if some:
                keep(made.take(some))
            waiting, since = [], time.monotonic()
    return out


def _scans(
    shards: Sequence[str], sizes: Sequence[int], scan: Callable[[Sequence[str]], Table]
) -> Iterator[tuple[Table, int]]:
    """Indexes of shards and the bytes that these have, in order; a table has one or several."""
    tasks = tasks_of(sizes) if sum(sizes) > ALONE else [range(i, i + 1) for i in range(len(shards))]
    workers = len(os.sched_getaffinity(0)) if sum(sizes) > ALONE else 1
    sums = (sum(sizes[i] for i in task) for task in tasks)

    def work(task: range) -> Table:
        return scan([shards[i] for i in task])

    about = f"indexes shards, {shards[0]} among them," if shards else ""
    yield from zip(in_forks(work, tasks, workers, about), sums, strict=True)


def _scan(layout: str, storage: Storage, shards: Sequence[str]) -> Table:
    """The index of shards. Raises DataError."""
    found = []
    for shard in shards:
        try:
            found.append((Path(shard).name, build_index(shard, layout, storage)))
        except OSError as error:
            raise DataError(f"{shard} cannot be read: {error}") from error
    return index_columns(found)


class Progress:
    """Tells what is done and how long the rest takes, where it takes long."""

    def __init__(self, say: Say, size: int, count: int, done: str) -> None:
        self._say, self._size, self._count, self._done = say, max(size, 1), count, done
        self._since = self._last = time.monotonic()
        self._bytes = self._shards = 0

    def add(self, shards: int, size: int) -> None:
        self._shards, self._bytes = self._shards + shards, self._bytes + size
        now = time.monotonic()
        if now - self._last > TELL_S and self._size > ALONE:
            self._last = now
            left = (now - self._since) * (self._size / max(self._bytes, 1) - 1)
            self._say(
                f"{self._done} {self._shards:,} of {self._count:,} shards, {self._bytes / 2**30:.1f} of "
                f"{self._size / 2**30:.1f} GiB, {left:.0f} s left"
            )

"""Lengths in tokens: the segments of shards as a tokenizer makes them, kept beside the shards for each.

They stand on the index of the shard, and on the tokenizer with its chat template. Where either is another,
they are made again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mm.data.building import Kept, Progress, by_folder
from mm.data.columns.entries import TEXTS, Listed, listed, text_columns
from mm.data.columns.store import Store, writing
from mm.data.columns.table import Table, join
from mm.data.encode import TokenSegment, Written, encode_samples, parse_sample
from mm.data.forks import ALONE, in_forks, tasks_of
from mm.data.published import PublishedTokenizer
from mm.data.remote.urls import is_remote
from mm.data.scan import SegmentEntry
from mm.data.storage import LOCAL, OpenFile, Storage

BATCH_BYTES = 4 << 20  # of text that is encoded at once: enough for all cores, small beside a shard


def store_of(folder: Path, tokenizer: PublishedTokenizer, *, with_shards: bool = True) -> Store:
    """The lengths of a folder's shards; files have the beginning of the tokenizer's key in their names."""
    return Store(folder, TEXTS, f"tokens-{tokenizer.key[:12]}", with_shards)


def kept_texts(
    shards: Sequence[str],
    indexes: Sequence[Kept],
    tokenizer: PublishedTokenizer,
    *,
    write: bool = True,
    storage: Storage = LOCAL,
) -> list[Kept]:
    """The segments of each shard in tokens. Every text is encoded where none are kept; write: keep new ones.

    indexes: of the shards. storage: as in kept_indexes().
    """
    index_of = dict(zip(shards, indexes, strict=True))
    found: dict[str, Kept] = {}
    for folder, own in by_folder(shards, storage).items():
        found |= _of_folder(folder, {shard: index_of[shard] for shard in own}, tokenizer, write, storage)
    return [found[shard] for shard in shards]


def _of_folder(
    folder: Path, shards: dict[str, Kept], tokenizer: PublishedTokenizer, write: bool, storage: Storage
) -> dict[str, Kept]:
    store = store_of(folder, tokenizer, with_shards=not is_remote(next(iter(shards))))
    found = _current(store, shards, tokenizer)
    if len(found) == len(shards):
        return found
    if not write:
        return found | _encoded(_without(shards, found), tokenizer, storage)
    with writing(folder, storage.say):
        found = _current(store, shards, tokenizer)  # another process may have made them meanwhile
        made = _encoded(_without(shards, found), tokenizer, storage)
        for table in {id(kept.table): kept.table for kept in made.values()}.values():
            some = [k for k in range(table.count) if table.first["lines"][k] < table.first["lines"][k + 1]]
            if some:
                store.add(table.take(some))
    return found | made


def _without(shards: dict[str, Kept], found: dict[str, Kept]) -> dict[str, Kept]:
    return {shard: index for shard, index in shards.items() if shard not in found}


def _current(store: Store, shards: dict[str, Kept], tokenizer: PublishedTokenizer) -> dict[str, Kept]:
    """By shard, the segments that are kept of it, where they stand on the index that it has now."""
    entries: dict[tuple[str, bytes], Kept] = {}
    for table in store.tables().values():
        if table.header.get("tokenizer") == tokenizer.key:
            sums = table.columns["shards"]["of"]
            for k, name in enumerate(table.paths):
                entries[name, sums[k].tobytes()] = Kept(table, k)
    keys = {shard: (Path(shard).name, _sum(index)) for shard, index in shards.items()}
    return {shard: entries[key] for shard, key in keys.items() if key in entries}


def _sum(index: Kept) -> bytes:
    return bytes(index.table.columns["shards"]["sum"][index.shard].tobytes())


def _encoded(shards: dict[str, Kept], tokenizer: PublishedTokenizer, storage: Storage) -> dict[str, Kept]:
    """Encode the texts of shards, by several processes where there is much."""
    paths = list(shards)
    sizes = [_text_bytes(index) for index in shards.values()]
    tasks, tables = tasks_of(sizes), [text_columns([], tokenizer.key)]
    workers = len(os.sched_getaffinity(0)) if sum(sizes) > ALONE else 1
    progress = Progress(storage.say, sum(sizes), len(paths), "encoded the texts of")

    def encode(task: range) -> Table:
        of = [(paths[i], shards[paths[i]]) for i in task]
        return join([text_columns([], tokenizer.key), *(_shard(*one, tokenizer, storage) for one in of)])

    about = f"encodes texts of shards, {paths[0]} among them," if paths else ""
    for task, table in zip(tasks, in_forks(encode, tasks, workers, about), strict=True):
        tables.append(table)
        progress.add(len(task), sum(sizes[i] for i in task))
    made = join(tables)
    return {shard: Kept(made, k) for k, shard in enumerate(shards)}


def _text_bytes(index: Kept) -> int:
    """Bytes of the parts of a shard that have its texts."""
    samples, parts = index.table.rows("samples", index.shard), index.table.rows("parts", index.shard)
    return int(parts["size"][samples["part"].astype(np.int64) + samples["text"]].sum())


def _shard(shard: str, index: Kept, tokenizer: PublishedTokenizer, storage: Storage) -> Table:
    """The texts of a shard, encoded."""
    samples = listed(*index)
    segments: list[list[SegmentEntry] | str] = []
    with storage.reading(shard) as file:
        for batch in _batches(samples):
            segments += _encode(file, batch, tokenizer)
    return text_columns([(Path(shard).name, _sum(index), samples, segments)], tokenizer.key)


def _batches(samples: Sequence[Listed]) -> Iterator[list[Listed]]:
    """Samples in order, in batches of about BATCH_BYTES of text."""
    batch: list[Listed] = []
    size = 0
    for sample in samples:
        batch.append(sample)
        size += sample.size
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    file: OpenFile, samples: Sequence[Listed], tokenizer: PublishedTokenizer
) -> list[list[SegmentEntry] | str]:
    written: list[Written] = []
    out: list[list[SegmentEntry] | str] = []
    payloads = file.read_many([(sample.offset, sample.size) for sample in samples])
    for sample, payload in zip(samples, payloads, strict=True):
        try:
            if isinstance(payload, OSError):
                raise payload
            written.append(parse_sample(payload, sample.layout, sample.text, tuple(sample.parts)))
            out.append("")
        except (OSError, ValueError) as error:  # it has changed since the shard was indexed
            out.append(str(error))
    found = iter(encode_samples(written, tokenizer))
    for i, why in enumerate(out):
        if not why:
            segments = next(found)
            out[i] = segments if isinstance(segments, str) else [_entry(seg) for seg in segments]
    return out


def _entry(seg: TokenSegment) -> SegmentEntry:
    if seg.ids is None:
        return {"kind": seg.kind, "part": seg.name}
    entry: SegmentEntry = {"kind": "text", "tokens": len(seg.ids)}
    if not seg.loss:
        entry["loss"] = False
    if seg.depends is not None:
        entry["depends"] = seg.depends
    return entry
